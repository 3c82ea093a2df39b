"""The blueprint "Learn a Style", found by its name as a person finds it, and run on Pocket."""

import json

import pytest

JOIN = """async () => {
    const make = (type, pos, values = {}) => {
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
        return node;
    };
    const join = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
    const learn = app.graph._nodes.find((node) => node.isSubgraphNode?.());
    learn.pos = [420, 100];
    const models = make("CounterpointLoadPocketModels", [20, 100]);
    const pictures = make("CounterpointPocketPictures", [20, 320], { count: 2 });
    ["model", "clip", "vae"].forEach((name, slot) => join(models, slot, learn, name));
    ["images", "captions"].forEach((name, slot) => join(pictures, slot, learn, name));
    const values = { name: "inked", steps: 2 };
    for (const widget of learn.widgets) if (widget.name in values) widget.value = values[widget.name];
    const output = (name) => learn.outputs.findIndex((output) => output.name === name);
    const paint = make("CounterpointGenerateSet", [880, 100], { prompts: "a red cube in the style of embedding:inked", steps: 2 });
    join(models, 0, paint, "model");
    join(learn, output("CLIP"), paint, "clip");
    join(models, 2, paint, "vae");
    for (const [i, name] of ["word", "report"].entries()) {
        const shown = make("PreviewAny", [1320, 100 + 300 * i]);
        join(learn, output(name), shown, "source");
    }
    Object.assign(app.canvas.ds, { scale: 1, offset: [40, 0] });
    app.canvas.setDirty(true, true);
    return learn.widgets.map((widget) => widget.name);
}"""


@pytest.fixture
def page(browse):
    with browse({"Comfy.VueNodes.Enabled": False}) as page:
        yield page
    assert not page.errors_of("counterpoint")


def test_learn_a_style_is_found_inserted_and_run(page):
    page.raw.evaluate("() => app.graph.clear()")
    page.raw.mouse.dblclick(800, 500)
    page.raw.keyboard.type("Learn a Style", delay=20)
    page.raw.get_by_text("Learn a Style", exact=False).first.wait_for(timeout=15_000)
    page.shot("blueprint, found")
    page.raw.keyboard.press("Enter")
    page.raw.wait_for_function("() => app.graph._nodes.length === 1", timeout=15_000)
    page.raw.wait_for_timeout(500)
    page.raw.mouse.move(500, 250)
    page.raw.mouse.click(600, 300)  # until then it hangs on the pointer
    page.raw.wait_for_function("() => !app.graph._nodes[0].flags.ghost", timeout=15_000)
    assert page.raw.evaluate(JOIN) == ["name", "steps"]
    page.shot("blueprint, inserted")
    assert page.press_run() == "execution_success"
    page.command("Comfy.Canvas.FitView")
    page.raw.wait_for_timeout(1000)
    page.shot("blueprint, run")
    said = json.dumps(page.raw.evaluate("() => Object.values(app.nodeOutputs).map(({ text }) => text ?? [])"))
    assert "embedding:inked" in said and "plain on Pocket, 2 steps on 2 pictures" in said
