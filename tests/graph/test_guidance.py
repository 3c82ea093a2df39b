"""Guidance Curve in whole prompts, and the picture that it draws."""

import json

import pytest

from harness.training import node, one_sentence

NODE = "CounterpointGuidanceCurve"


def pictures(count: int, style: str, seed: int) -> dict:
    return node("CounterpointPocketPictures", count=count, style=style, seed=seed, captions="content and style")


def prompt(rows: int = 2, **inputs) -> dict:
    """1 features, 2 what was asked for and got, 3 the same content in another style, 4 the reference, 5 the curve."""
    connected = {f"rows.row{i}": [str(2 + i), 0] for i in range(rows)}
    given = {"features": ["1", 0], "captions": ["2", 1], "reference": ["4", 0], "labels": "good\nbad", **inputs}
    return {
        "1": node("CounterpointLoadFeatures"),
        "2": pictures(24, "comic", 1),
        "3": pictures(24, "chalk", 2),
        "4": pictures(40, "comic", 3),
        "5": node(NODE, **connected, **{k: v for k, v in given.items() if v is not None}),
    }


def test_the_better_setting_is_nearer_and_follows_its_captions(graph):
    run = graph(prompt())
    settings = json.loads(run.value("5", 2))["settings"]
    assert list(settings) == ["good", "bad"]
    good, bad = settings.values()
    assert good["CLIP score"]["low"] > bad["CLIP score"]["high"] and good["R-precision"]["value"] > 0.5
    assert good["KID"]["high"] < bad["KID"]["low"] and good["precision"]["value"] > bad["precision"]["value"]
    lines = run.value("5").splitlines()
    assert lines[0].split()[:3] == ["CLIP", "score", "R-precision"] and lines[1].startswith("good")
    assert run.value("5", 1).shape == (1, 420, 560, 3)


def test_its_figures_are_those_of_the_other_nodes(graph):
    whole = prompt()
    whole["6"] = node("CounterpointCompareSets", features=["1", 0], made=["3", 0], reference=["4", 0])
    whole["7"] = node("CounterpointPromptFidelity", features=["1", 0], images=["3", 0], captions=["2", 1])
    run = graph(whole)
    bad = json.loads(run.value("5", 2))["settings"]["bad"]
    assert bad["CMMD"] == json.loads(run.value("6", 2))["figures"]["CMMD"]
    fidelity = json.loads(run.value("7", 2))
    assert bad["CLIP score"]["value"] == pytest.approx(fidelity["CLIP score"]["mean"])
    assert bad["R-precision"]["low"] == pytest.approx(fidelity["R-precision"]["low"])


def test_settings_without_a_label_have_their_sockets_name_and_equal_labels_are_kept_apart(graph):
    assert list(json.loads(graph(prompt(labels="")).value("5", 2))["settings"]) == ["row0", "row1"]
    assert list(json.loads(graph(prompt(labels="a\na")).value("5", 2))["settings"]) == ["a", "a (row1)"]


def test_a_label_belongs_to_its_socket(graph):
    whole = prompt(labels="a\nb\nc\nd")
    whole["5"]["inputs"]["rows.row3"] = ["2", 0]
    assert list(json.loads(graph(whole).value("5", 2))["settings"]) == ["a", "b", "d"]


def test_one_caption_for_all_has_no_r_precision(graph, given):
    run = graph({**prompt(captions=["6", 0]), "6": given("STRING", ["a picture"])})
    good = json.loads(run.value("5", 2))["settings"]["good"]
    assert good["R-precision"]["value"] is None and "needs 2 different captions" in run.value("5")


@pytest.mark.parametrize("changed, words", [
    ({"captions": ["4", 1]}, ("40 captions for 24 pictures", "give 1 each")),
    ({"reference": None}, ("no pictures for 'reference'", "reference_folder")),
])  # fmt: skip
def test_what_cannot_be_drawn(graph, changed, words):
    one_sentence(graph(prompt(**changed), check=False), *words)


def test_one_setting_is_no_curve(graph):
    run = graph(prompt(rows=1), check=False)
    assert run.executed == [] and run.node_errors["5"]


def test_too_few_pictures_for_the_distance(graph):
    whole = prompt(distance="precision")
    whole["2"], whole["3"] = pictures(3, "comic", 1), pictures(3, "chalk", 2)
    one_sentence(graph(whole, check=False), "precision cannot be drawn", "'good'", "needs 6", "another distance")


def test_a_point_lies_where_its_figures_say(pack):
    """Two points: the better one right and below, in the label's and the line's colours."""
    import numpy

    drawing = pack.training.curve
    value = drawing.Value
    picture = numpy.asarray(
        drawing.curve(
            [drawing.Point("", value(10, 9, 11), value(5)), drawing.Point("", value(30), value(1, 0, 2))], "x", "y"
        )
    )
    line = (picture == drawing.LINE).all(-1)
    rows, columns = numpy.nonzero(line)
    assert rows[columns == columns.min()].mean() < rows[columns == columns.max()].mean()
    assert line[:, (drawing.LEFT + drawing.WIDTH - drawing.RIGHT) // 2].any()
