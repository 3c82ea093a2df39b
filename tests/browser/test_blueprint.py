"""The blueprints that are nodes of ours, found by name as a person finds them, and run on Pocket."""

import json

import pytest

TOOLS = """
    const make = (type, pos, values = {}) => {
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        set(node, values);
        return node;
    };
    const set = (node, values) => {
        for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
    };
    const join = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
    const output = (node, name) => node.outputs.findIndex((output) => output.name === name);
    const blueprint = app.graph._nodes.find((node) => node.isSubgraphNode?.());
    blueprint.pos = [420, 100];
    const models = make("CounterpointLoadPocketModels", [20, 100]);
    ["model", "clip", "vae"].forEach((name, slot) => join(models, slot, blueprint, name));
    Object.assign(app.canvas.ds, { scale: 1, offset: [40, 0] });
    app.canvas.setDirty(true, true);
"""
LEARN = """
    const pictures = make("CounterpointPocketPictures", [20, 320], { count: 2 });
    ["images", "captions"].forEach((name, slot) => join(pictures, slot, blueprint, name));
    set(blueprint, { name: "inked", steps: 2 });
    const paint = make("CounterpointGenerateSet", [880, 100], { prompts: "a red cube in the style of embedding:inked", steps: 2 });
    join(models, 0, paint, "model");
    join(blueprint, output(blueprint, "CLIP"), paint, "clip");
    join(models, 2, paint, "vae");
    for (const [i, name] of ["word", "report"].entries())
        join(blueprint, output(blueprint, name), make("PreviewAny", [1320, 100 + 300 * i]), "source");
"""
PAINT = """
    const prompts = ["at sea", "in the snow", "at night"].map((place) => `a spotted heart ${place}`).join("\\n");
    set(blueprint, { prompts, subject: "spotted heart", steps: 4, cfg: 4, size: 128 });
    join(blueprint, output(blueprint, "images"), make("PreviewImage", [880, 100]), "images");
    join(blueprint, output(blueprint, "masks"), make("MaskPreview", [880, 500]), "mask");
"""
SIZES = """() => Promise.all(Object.values(app.nodeOutputs).flatMap(({ images }) => images ?? []).map(async (place) => {
    const picture = await createImageBitmap(await (await app.api.fetchApi(`/view?${new URLSearchParams(place)}`)).blob());
    return [picture.width, picture.height];
}))"""


@pytest.fixture
def page(browse):
    with browse({"Comfy.VueNodes.Enabled": False}) as page:
        yield page
    assert not page.errors_of("counterpoint")


def insert(page, name: str) -> None:
    """From the search box, as a person does it."""
    page.raw.evaluate("() => app.graph.clear()")
    page.raw.mouse.dblclick(800, 500)
    page.raw.keyboard.type(name, delay=20)
    page.raw.get_by_text(name, exact=False).first.wait_for(timeout=15_000)
    page.shot(f"{name}, found")
    page.raw.keyboard.press("Enter")
    page.raw.wait_for_function("() => app.graph._nodes.length === 1", timeout=15_000)
    page.raw.wait_for_timeout(500)
    page.raw.mouse.move(500, 250)
    page.raw.mouse.click(600, 300)  # until then it hangs on the pointer
    page.raw.wait_for_function("() => !app.graph._nodes[0].flags.ghost", timeout=15_000)


def join_and_run(page, name: str, around: str) -> list[str]:
    """Put the nodes around the blueprint and press Run; the names of the widgets that it shows."""
    told = page.raw.evaluate(
        f"async () => {{ {TOOLS} {around} return blueprint.widgets.map((widget) => widget.name); }}"
    )
    page.shot(f"{name}, inserted")
    assert page.press_run() == "execution_success"
    page.command("Comfy.Canvas.FitView")
    page.raw.wait_for_timeout(1000)
    page.shot(f"{name}, run")
    return told


def test_learn_a_style_is_found_inserted_and_run(page):
    insert(page, "Learn a Style")
    assert join_and_run(page, "Learn a Style", LEARN) == ["name", "steps"]
    said = json.dumps(page.raw.evaluate("() => Object.values(app.nodeOutputs).map(({ text }) => text ?? [])"))
    assert "embedding:inked" in said and "plain on Pocket, 2 steps on 2 pictures" in said


def test_consistent_batch_is_found_inserted_and_run(page):
    insert(page, "Consistent Batch")
    shown = join_and_run(page, "Consistent Batch", PAINT)
    assert shown == ["prompts", "subject", "seed", "steps", "cfg", "size"]
    assert page.raw.evaluate(SIZES) == [[128, 128]] * 6, "a picture and a mask for each of three prompts"
