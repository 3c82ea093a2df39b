"""What a person does in the browser: opens one of our graphs from the templates, presses Run, sees the picture."""

import re

import pytest

from harness.boot import ROOT

RENDERERS = {"classic": False, "nodes 2.0": True}
TEMPLATES = [("small_models", "small picture"), ("counterpoint", "00 first picture")]
SHIPPED = [
    each for each in TEMPLATES if each[0] != "counterpoint" or (ROOT / "workflows" / f"{each[1]}.json").is_file()
]

PICTURES_ON_NODES = """() => {
    const shown = (image) => image && image.naturalWidth > 0;
    const drawn = app.graph._nodes.flatMap((node) => node.imgs ?? []).filter(shown).length;
    const inPage = [...document.querySelectorAll(".lg-node img")].filter(shown).length;
    return drawn + inPage;
}"""


@pytest.fixture(params=list(RENDERERS))
def page(request, browse):
    with browse({"Comfy.VueNodes.Enabled": RENDERERS[request.param]}) as page:
        yield page
    assert not page.errors_of("counterpoint")


@pytest.mark.parametrize(("pack", "template"), SHIPPED, ids=[template for _, template in SHIPPED])
def test_a_template_paints_its_picture(page, pack, template, request):
    page.open_template(pack, template)
    page.shot(f"{template}, {request.node.callspec.params['page']}, opened")
    assert page.press_run() == "execution_success"
    page.raw.wait_for_function(f"() => ({PICTURES_ON_NODES})() > 0", timeout=30_000)
    page.raw.wait_for_timeout(500)
    page.shot(f"{template}, {request.node.callspec.params['page']}, painted")


VALUES_AFTER_LOADING = """async (types) => {
    app.graph.clear();
    for (const type of types) app.graph.add(LiteGraph.createNode(type));
    const values = (saved) => saved.nodes.map((node) => [node.type, node.widgets_values ?? []]);
    for (const node of app.graph._nodes)
        for (const [i, widget] of (node.widgets ?? []).entries()) {
            const { values } = widget.options ?? {};
            if (Array.isArray(values) && values.length) widget.value = values.at(-1);
            else if (typeof widget.value === "number") widget.value += 8;
            else if (typeof widget.value === "string" && widget.type !== "color") widget.value = `text ${i}`;
        }
    const before = app.graph.serialize();
    await app.loadGraphData(structuredClone(before), true, true);
    return [values(before), values(app.graph.serialize())];
}"""


def test_what_is_typed_survives_saving_and_loading(page, schemas):
    """The page drops a value of a saved node when it takes it for one of an older ComfyUI: it counts them, and a node
    with one socket-only text and one `control after generate` has the old number."""
    before, after = page.raw.evaluate(VALUES_AFTER_LOADING, [schema.node_id for schema in schemas])
    assert len(before) == len(schemas) and sum(len(values) for _, values in before) > 50
    assert before == after


def test_a_node_shows_its_help(page, schemas, request):
    if not schemas:
        pytest.skip("the pack has no nodes yet")
    page.select_new_node(schemas[0].node_id)
    page.raw.get_by_test_id("info-button").first.click()
    written = (ROOT / "js" / "docs" / f"{schemas[0].node_id}.md").read_text(encoding="utf-8")
    sentence = next(line for line in written.splitlines() if re.match(r"[A-Z][\w ,]{20,}", line))
    page.raw.get_by_text(re.match(r"[\w ,]+", sentence).group().strip(), exact=False).first.wait_for(timeout=15_000)
    page.shot(f"help, {request.node.callspec.params['page']}")


STRENGTH = """(value) => {
    const shares = app.graph._nodes.find((node) => node.type === "CounterpointSharedAttention" && node.mode === 0);
    shares.widgets.find((widget) => widget.name === "strength").value = value;
}"""
SAVED = "() => app.graph.serialize().nodes.map((node) => [node.type, node.widgets_values ?? null])"


def test_what_a_node_says_stands_under_it(page, request):
    """And is no part of the saved graph."""
    page.open_template("counterpoint", "10 one object, many scenes")
    strength = (
        0.9 if RENDERERS[request.node.callspec.params["page"]] else 0.8
    )  # what the server has kept says nothing again
    page.raw.evaluate(STRENGTH, strength)
    before = page.raw.evaluate(SAVED)
    assert page.press_run() == "execution_success"
    said = page.raw.locator(".counterpoint-said")
    said.filter(has_text="each picture sees its own 64 tokens").wait_for(timeout=15_000)
    said.filter(has_text="4 masks").wait_for(timeout=15_000)
    assert page.raw.evaluate(SAVED) == before
    page.shot(f"said, {request.node.callspec.params['page']}")
