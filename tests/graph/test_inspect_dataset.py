"""Inspect Dataset in whole prompts."""

from harness.training import node, one_sentence


def prompt(**inputs) -> dict:
    """1 paints 12 pictures, 2 inspects them."""
    given = {"images": ["1", 0], "captions": ["1", 1], "size": 128, "style_words": "cube", **inputs}
    return {
        "1": node("CounterpointPocketPictures", count=12, shape="cube"),
        "2": node("CounterpointInspectDataset", **{k: v for k, v in given.items() if v is not None}),
    }


def test_the_sheet_and_the_table(graph):
    run = graph(prompt())
    lines = run.value("2", 1).splitlines()
    assert lines[0] == "12 pictures, 128 x 128 pixels, 12 square; trained on as squares of 128"
    assert "'cube'" in lines[1]
    assert "all: with a caption that names the style" in lines
    assert run.value("2").shape[0] == 1 and run.ui["2"]["text"] == [run.value("2", 1)]


def test_without_captions(graph):
    assert graph(prompt(captions=None)).value("2", 1).splitlines()[1] == "Nothing to look at was found."


def test_a_size_that_is_too_large_for_them_is_said_of_all(graph):
    table = graph(prompt(captions=None, size=512)).value("2", 1)
    assert "all: too small for 512 pixels" in table and "- picture 12: enlarged 4.0 times" in table


def test_captions_of_another_set(graph, given):
    whole = prompt(captions=["3", 0])
    one_sentence(
        graph({**whole, "3": given("STRING", ["a", "b"])}, check=False), "2 captions for 12 pictures", "give 1 each"
    )
