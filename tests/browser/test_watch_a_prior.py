"""What a person sees while a prior is trained: its curve, and all the figures of a look in one line."""

import re

import pytest

RENDERERS = {"classic": False, "nodes 2.0": True}

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
    const models = make("CounterpointLoadPocketModels", [20, 100]);
    const pictures = make("CounterpointPocketPictures", [20, 320], { count: 60, captions: "varied" });
    const pairs = make("CounterpointEmbedPairs", [350, 100]);
    const train = make("CounterpointTrainPrior", [350, 330], { steps: 5000, batch: 16, look_every: 7, ...values });
    const sample = make("CounterpointSamplePrior", [760, 100], { prompt: "a red cube on a meadow", count: 3, steps: 2 });
    const show = make("PreviewAny", [1200, 100]);
    join(models, 1, pairs, "clip");
    join(models, 3, pairs, "clip_vision");
    join(pictures, 0, pairs, "images");
    join(pictures, 1, pairs, "captions");
    join(pairs, 0, train, "pairs");
    join(train, 0, sample, "prior");
    join(models, 1, sample, "clip");
    join(sample, 2, show, "source");
    Object.assign(app.canvas.ds, { scale: 0.8, offset: [40, 0] });
    app.canvas.setDirty(true, true);
}"""
SEEN = """() => {
    const node = app.graph._nodes.find(({ type }) => type === "CounterpointTrainPrior");
    const { element } = node.widgets.find(({ type }) => type === "COUNTERPOINT_TRAINING");
    return Object.fromEntries([".status", ".contrast"].map((part) => [part, element.querySelector(part).textContent]));
}"""

WHOLE = """() => {
    const { scrollHeight, clientHeight } = document.querySelector(".counterpoint-training .contrast");
    return clientHeight > 0 && scrollHeight <= clientHeight;
}"""


@pytest.fixture(params=list(RENDERERS))
def page(request, browse):
    with browse({"Comfy.VueNodes.Enabled": RENDERERS[request.param]}) as page:
        yield page
    assert not page.errors_of("counterpoint")


def test_a_prior_is_trained_finished_early_and_sampled(page, request):
    renderer = request.node.callspec.params["page"]
    page.raw.evaluate(BUILD, {"seed": list(RENDERERS).index(renderer)})
    assert page.raw.evaluate(SEEN)[".status"].startswith("The loss curve appears here")
    page.raw.get_by_test_id("queue-button").first.click()
    page.raw.wait_for_function(f"() => ({SEEN})()['.contrast'].startsWith('held out')", timeout=60_000)
    said, number = page.raw.evaluate(SEEN)[".contrast"], r"-?\d+\.\d\d"
    figures = f"Frechet {number}, diversity {number}, length {number}, centred cos {number}"
    assert re.fullmatch(f"held out: {figures}", said)
    assert page.raw.evaluate(WHOLE), "a cosine that stands where the rest is cut off would be alone"
    page.shot(f"prior, {renderer}, at work")
    page.raw.locator(".counterpoint-training .finish").click()
    page.raw.wait_for_function("() => window.heard.length > 0", timeout=60_000)
    assert page.raw.evaluate("() => window.heard[0][0]") == "execution_success"
    page.raw.wait_for_function(f"() => /Finished early, at step/.test(({SEEN})()['.status'])", timeout=30_000)
    made = page.raw.evaluate("() => Object.values(app.nodeOutputs).flatMap(({ text }) => text ?? [])")
    assert any(text.startswith("3 of 128 numbers") for text in made)
    page.raw.wait_for_timeout(500)
    page.shot(f"prior, {renderer}, finished")
