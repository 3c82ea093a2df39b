"""What a person sees on a node that trains: its loss curve, Finish now, and Continue for 200 more."""

import re

import pytest
from comfy_api.latest import io

from harness.browser import LISTEN, READY

RENDERERS = {"classic": False, "nodes 2.0": True}
TRAINER = "CounterpointTrainEmbedding"

BUILD = """(values) => {
    app.graph.clear();
    const make = (type, pos, values = {}) => {
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        for (const widget of node.widgets ?? []) {
            if (widget.name === "control_after_generate") widget.value = "fixed";
            if (widget.name in values) widget.value = values[widget.name];
        }
        return node;
    };
    const join = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
    const models = make("SmallModelsLoadSD15", [20, 100]);
    const pictures = make("CounterpointPocketPictures", [20, 250], { count: 2 });
    const negatives = make("CounterpointPocketPictures", [20, 550], { count: 2, style: "engraving" });
    const train = make("CounterpointTrainEmbedding", [340, 100], { method: "reference point", batch: 2, size: 64, preview_every: 0, ...values });
    const use = make("CounterpointUseEmbedding", [720, 100]);
    const text = make("CLIPTextEncode", [720, 300], { text: "a red cat, embedding:my-style" });
    const latent = make("EmptyLatentImage", [720, 560], { width: 64, height: 64 });
    const sampler = make("KSampler", [1170, 100], { steps: 2 });
    const decode = make("VAEDecode", [1170, 420]);
    const preview = make("PreviewImage", [1170, 520]);
    join(models, 0, train, "model");
    join(models, 1, train, "clip");
    join(models, 2, train, "vae");
    join(pictures, 0, train, "images");
    join(negatives, 0, train, "negatives");
    join(models, 1, use, "clip");
    join(train, 0, use, "embedding");
    join(use, 0, text, "clip");
    join(models, 0, sampler, "model");
    join(text, 0, sampler, "positive");
    join(text, 0, sampler, "negative");
    join(latent, 0, sampler, "latent_image");
    join(sampler, 0, decode, "samples");
    join(models, 2, decode, "vae");
    join(decode, 0, preview, "images");
    Object.assign(app.canvas.ds, { scale: 1, offset: [40, 0] });
    app.canvas.setDirty(true, true);
}"""
FIND = """
    const graphs = [app.graph, ...app.rootGraph.subgraphs.values()];
    const node = graphs.flatMap((graph) => graph._nodes).find((node) => node.type === "CounterpointTrainEmbedding");
    const { element } = node.widgets.find((widget) => widget.type === "COUNTERPOINT_TRAINING");
    const part = (name) => element.querySelector(name);
    const curve = {
        dots: (part(".raw").getAttribute("d") ?? "").split("M").length - 1,
        line: part(".line").getAttribute("d") ?? "",
        status: part(".status").textContent,
        contrast: part(".contrast").textContent,
        enabled: !part(".finish").disabled,
        going: getComputedStyle(part(".continue")).display !== "none",
    };"""
BUTTON = ".counterpoint-training .finish"
CONTINUE = ".counterpoint-training .continue"


@pytest.fixture
def page(request, browse):
    with browse({"Comfy.VueNodes.Enabled": RENDERERS[request.param]}) as page:
        yield page
    assert not page.errors_of("counterpoint")


both = pytest.mark.parametrize("page", RENDERERS, indirect=True)


def curve(page) -> dict:
    return page.raw.evaluate(f"() => {{ {FIND} return curve; }}")


def wait_for_curve(page, condition: str, timeout: float = 180) -> dict:
    page.raw.wait_for_function(f"() => {{ {FIND} return {condition}; }}", timeout=timeout * 1000)
    return curve(page)


def saved_values(page) -> list:
    saved = page.raw.evaluate("() => app.graph.serialize()")
    return next(node for node in saved["nodes"] if node["type"] == TRAINER)["widgets_values"]


@both
def test_a_training_is_watched_finished_early_and_not_repeated(page, schemas, request):
    renderer = request.node.callspec.params["page"]
    page.raw.evaluate(BUILD, {"steps": 2000, "seed": list(RENDERERS).index(renderer)})
    page.raw.wait_for_timeout(500)
    assert curve(page)["status"].startswith("The loss curve appears here")
    assert not curve(page)["enabled"] and not curve(page)["going"]

    widgets = [each for schema in schemas if schema.node_id == TRAINER for each in schema.inputs]
    widgets = [each for each in widgets if isinstance(each, io.WidgetInput) and not each.force_input]
    assert len(saved_values(page)) == len(widgets)

    page.raw.get_by_test_id("queue-button").first.click()
    training = wait_for_curve(page, "curve.dots >= 5")
    assert training["enabled"] and not training["going"]
    assert re.fullmatch(r"Step \d+ of 2000, .* left", training["status"])
    assert re.fullmatch(r"shared with negatives: cos -?\d\.\d\d, removed \d\.\d\d(; .+)?", training["contrast"])
    page.shot(f"training, {renderer}, at work")

    page.raw.route("**/counterpoint/finish", lambda route: route.fulfill(status=500, json={"error": "Not today."}))
    page.raw.locator(BUTTON).click()
    page.raw.get_by_text("Not today.").first.wait_for(timeout=60_000)
    page.raw.unroute("**/counterpoint/finish")
    assert curve(page)["enabled"]
    page.shot(f"training, {renderer}, refused")

    page.raw.locator(BUTTON).click()
    wait_for_curve(page, "/^Finishing after this step|Finished early/.test(curve.status)", timeout=60)
    page.raw.wait_for_function("() => window.heard.length > 0", timeout=120_000)
    assert page.raw.evaluate("() => window.heard[0][0]") == "execution_success"
    assert page.raw.evaluate("() => Object.values(app.nodeOutputs).some(({ images }) => images?.length)")
    finished = wait_for_curve(page, "/Finished early, at step [0-9]+ of 2000/.test(curve.status)", timeout=60)
    assert not finished["enabled"]
    page.raw.wait_for_timeout(500)
    page.shot(f"training, {renderer}, finished early")

    graph = page.raw.evaluate("() => app.graph.serialize()")
    page.raw.reload(wait_until="domcontentloaded")
    page.raw.wait_for_function(READY, timeout=120_000)
    page.raw.evaluate(LISTEN)
    page.raw.wait_for_timeout(1500)
    page.close_dialogs()
    page.raw.evaluate("(graph) => app.loadGraphData(graph, true, true)", graph)
    assert page.press_run() == "execution_success"
    assert not curve(page)["line"], "nothing has changed, and it was trained again"


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_the_curve_is_found_inside_a_sub_graph(page):
    page.raw.evaluate(BUILD, {"steps": 12, "seed": 12})
    page.raw.evaluate(
        f"() => app.graph.convertToSubgraph(new Set(app.graph._nodes.filter((node) => node.type === '{TRAINER}')))"
    )
    assert page.press_run() == "execution_success"
    trained = wait_for_curve(page, "curve.line", timeout=60)
    assert trained["dots"] > 0
    assert "12 steps on 2 pictures" in trained["status"]
    page.raw.evaluate("() => app.canvas.setGraph([...app.rootGraph.subgraphs.values()][0])")
    page.command("Comfy.Canvas.FitView")
    page.raw.wait_for_timeout(1000)
    page.shot("training, inside a sub-graph")


STEPS = f"() => app.graph._nodes.find(({{ type }}) => type === '{TRAINER}').widgets.find(({{ name }}) => name === 'steps').value"


@both
def test_a_training_is_continued(page, request):
    """Also after the page was loaded again, and where steps was 0, which is 1000 here."""
    renderer = request.node.callspec.params["page"]
    seed = 20 + list(RENDERERS).index(renderer)
    page.raw.evaluate(BUILD, {"steps": 0, "seed": seed, "method": "plain", "batch": 1})
    page.raw.wait_for_timeout(500)
    values = saved_values(page)
    page.raw.get_by_test_id("queue-button").first.click()
    assert not wait_for_curve(page, "curve.dots >= 2")["going"]
    page.raw.locator(BUTTON).click()
    page.raw.wait_for_function("() => window.heard.length > 0", timeout=120_000)
    finished = wait_for_curve(page, "curve.going && /Finished early/.test(curve.status)", timeout=60)
    done = int(re.search(r"at step (\d+) of 1000", finished["status"])[1])
    page.raw.wait_for_timeout(500)
    assert saved_values(page) == values and page.raw.locator(CONTINUE).inner_text() == "Continue for 200 more"
    page.shot(f"training, {renderer}, to be continued")

    graph = page.raw.evaluate("() => app.graph.serialize()")
    page.raw.reload(wait_until="domcontentloaded")
    page.raw.wait_for_function(READY, timeout=120_000)
    page.raw.evaluate(LISTEN)
    page.raw.wait_for_timeout(1500)
    page.close_dialogs()
    page.raw.evaluate("(graph) => app.loadGraphData(graph, true, true)", graph)
    wait_for_curve(page, "curve.going", timeout=30)
    page.raw.evaluate(WATCH)
    page.raw.locator(CONTINUE).click()
    wait_for_curve(page, "curve.dots > 1 && !curve.going", timeout=60)
    page.raw.wait_for_function("() => window.heard.length > 0", timeout=180_000)
    wait_for_curve(page, f"curve.going && / {done + 200} steps on 2 pictures/.test(curve.status)", timeout=60)
    assert page.raw.evaluate(STEPS) == done + 200
    steps = page.raw.evaluate("() => window.steps")
    assert steps[0][0] > done and steps[-1] == [done + 200] * 2, "it began again instead of going on"

    page.raw.evaluate(STEPS.replace(".value", ".value = 1"))
    assert page.press_run() == "execution_success"
    whole = wait_for_curve(page, "curve.going && /taken from disk/.test(curve.status)", timeout=60)
    assert whole["line"] and "NaN" not in whole["line"] and not whole["dots"]
    assert page.raw.locator(CONTINUE).get_attribute("title").startswith(f"Set steps to {done + 400} ")

    page.raw.evaluate(STEPS.replace(".value", f".value = {done + 5000}"))
    page.raw.get_by_test_id("queue-button").first.click()
    wait_for_curve(page, "curve.dots >= 2", timeout=60)
    page.command("Comfy.Interrupt")
    cancelled = wait_for_curve(page, "/^Cancelled at step/.test(curve.status)", timeout=60)
    assert not cancelled["going"], "what is unfinished goes on by Run, and not from the result before it"


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_steps_that_come_from_another_node_are_left_to_it(page):
    page.raw.evaluate(BUILD, {"seed": 25})
    page.raw.evaluate(
        f"""() => {{
            const number = LiteGraph.createNode("PrimitiveInt");
            app.graph.add(number);
            number.widgets[0].value = 4;
            const train = app.graph._nodes.find(({{ type }}) => type === "{TRAINER}");
            number.connect(0, train, train.inputs.findIndex(({{ name }}) => name === "steps"));
        }}"""
    )
    assert page.press_run() == "execution_success"
    wait_for_curve(page, "curve.going", timeout=60)
    page.raw.locator(CONTINUE).click()
    page.raw.get_by_text("Set them to 204 there").first.wait_for(timeout=30_000)


WATCH = """() => {
    window.steps = [];
    app.api.addEventListener("counterpoint.progress", ({ detail }) => window.steps.push([detail.step, detail.steps]));
}"""


CHOOSE = f"""(trainer) => {{
    const find = (type) => app.graph._nodes.find((node) => node.type === type);
    const join = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex((input) => input.name === name));
    const [models, pictures, word] = [find("SmallModelsLoadSD15"), find("CounterpointPocketPictures"), find("{TRAINER}")];
    const values = Object.fromEntries(word.widgets.map(({{ name, value }}) => [name, value]));
    const make = (type, pos, values) => {{
        const node = LiteGraph.createNode(type);
        node.pos = pos;
        app.graph.add(node);
        for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
        return node;
    }};
    const train = make(trainer, [340, 100], {{ ...values, rank: 2, learning_rate: 0.05 }});
    const grid = make("CounterpointSnapshotGrid", [760, 100], {{ width: 64, height: 64, steps: 2 }});
    const lora = trainer.endsWith("Lora");
    const keep = make(lora ? "SaveLoRA" : "CounterpointSaveEmbedding", [1200, 100], {{}});
    ["model", "clip", "vae"].forEach((name, slot) => [train, grid].forEach((to) => join(models, slot, to, name)));
    join(pictures, 0, train, "images");
    join(train, train.outputs.findIndex(({{ name }}) => name === "run"), grid, "run");
    const wrong = join(pictures, 0, grid, "learned");
    join(train, 0, grid, "learned");
    const kept = join(grid, 0, keep, lora ? "lora" : "embedding");
    const others = app.graph._nodes.filter((node) => ![models, pictures, train, grid, keep].includes(node));
    others.forEach((node) => app.graph.remove(node));
    return [wrong == null, kept != null, grid.outputs[0].type];
}}"""


@both
@pytest.mark.parametrize("trainer", [TRAINER, "CounterpointTrainStyleLora"], ids=["word", "lora"])
def test_a_snapshot_is_chosen(page, request, trainer):
    """The grid takes both kinds and nothing else, and its output has the type of what came in."""
    renderer = request.node.callspec.params["page"]
    page.raw.evaluate(
        BUILD,
        {"steps": 4, "snapshot_every": 2, "seed": 30 + list(RENDERERS).index(renderer), "method": "plain", "batch": 1},
    )
    expected = "LORA_MODEL" if trainer.endswith("Lora") else "EMBEDDING"
    assert page.raw.evaluate(CHOOSE, trainer) == [True, True, expected]
    assert page.press_run() == "execution_success"
    page.raw.wait_for_function(
        "() => Object.values(app.nodeOutputs).some(({ text }) => text?.some((said) => said.endsWith('there are 2, 4.')))",
        timeout=60_000,
    )
    page.raw.wait_for_timeout(1000)
    page.shot(f"snapshot grid, {renderer}, {expected}")
