"""Load Features and Compare Sets in whole prompts."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from harness.training import node, one_sentence

CONNECTED = "the pictures that are connected"


def pictures(count: int, style: str = "any", seed: int = 1, **more) -> dict:
    return node("CounterpointPocketPictures", count=count, style=style, seed=seed, **more)


def prompt(made: dict, reference: dict, **inputs) -> dict:
    """1 features, 2 made, 3 reference, 4 the comparison."""
    return {
        "1": node("CounterpointLoadFeatures"),
        "2": made,
        "3": reference,
        "4": node("CounterpointCompareSets", features=["1", 0], made=["2", 0], reference=["3", 0], **inputs),
    }


def figures(run) -> dict:
    return json.loads(run.value("4", 2))["figures"]


@pytest.fixture
def saved(folders: Path, pack):
    """save(name, n, seed): a folder of painted pictures inside input/."""

    def save(name: str, n: int, seed: int) -> torch.Tensor:
        pocket = pack.training.pocket
        images = pocket.painter.paint(pocket.world.sample_scenes(n, seed)).image.movedim(1, -1)
        folder = folders / "input" / name
        folder.mkdir()
        for i, image in enumerate(images):
            Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(folder / f"{i}.png")
        return images

    return save


def test_another_style_is_further_than_other_pictures_of_the_same(graph):
    near = figures(graph(prompt(pictures(40, "comic", seed=1), pictures(40, "comic", seed=2))))
    far = figures(graph(prompt(pictures(40, "chalk", seed=1), pictures(40, "comic", seed=2))))
    for metric in ("FID", "KID", "CMMD"):
        assert far[metric]["value"] > 2 * abs(near[metric]["value"])
    assert near["precision"]["value"] > 0.5 > far["precision"]["value"]
    assert far["KID"]["low"] > near["KID"]["high"]


def test_the_table_the_plot_and_the_warning(graph):
    run = graph(prompt(pictures(12), pictures(20, seed=2)))
    table = run.value("4")
    assert table.splitlines()[0] == "12 pictures against 20, as Pocket sees them"
    assert [line.split()[0] for line in table.splitlines()[2:9]] == list(figures(run))
    assert "mostly noise below 257 pictures" in table
    assert run.ui["4"]["text"] == [table] and len(run.ui["4"]["images"]) == 1
    assert run.value("4", 1).shape[2] == 560


def test_a_folder_is_the_same_as_its_pictures(graph, folders, saved):
    saved("a", 8, 1)
    saved("b", 9, 2)
    load = {
        "3": node("CounterpointLoadDataset", folder="input/b"),
        "2": node("CounterpointLoadDataset", folder="input/a"),
    }
    by_socket = graph({**prompt(**{"made": load["2"], "reference": load["3"]})})
    of_folders = node("CounterpointCompareSets", features=["1", 0], made_folder="input/a", reference_folder="input/b")
    by_folder = graph({"1": node("CounterpointLoadFeatures"), "4": of_folders})
    assert by_folder.value("4") == by_socket.value("4")


def test_what_was_measured_once_is_kept_until_a_picture_changes(graph, folders, saved, pack, monkeypatch):
    images = saved("a", 8, 1)
    extracted = []
    extract = pack.nodes.metrics.extract
    monkeypatch.setattr(pack.nodes.metrics, "extract", lambda *a: extracted.append(1) or extract(*a))

    def compare(seed: int):
        given = node("CounterpointCompareSets", features=["1", 0], made_folder="input/a", reference=["3", 0], seed=seed)
        return graph({"1": node("CounterpointLoadFeatures"), "3": pictures(8, seed=2), "4": given})

    compare(0)
    assert len(extracted) == 2
    compare(1)
    assert len(extracted) == 2
    assert len(list((folders / "output" / "counterpoint" / "features").rglob("*.safetensors"))) == 2
    Image.fromarray(255 - (images[0] * 255).to(torch.uint8).numpy()).save(folders / "input" / "a" / "0.png")
    compare(1)
    assert len(extracted) == 3


def test_a_picture_that_cannot_be_read_is_skipped_and_named(graph, folders, saved, caplog):
    saved("a", 6, 1)
    (folders / "input" / "a" / "2.png").write_bytes(b"broken")
    given = node("CounterpointCompareSets", features=["1", 0], made_folder="input/a", reference=["3", 0])
    run = graph({"1": node("CounterpointLoadFeatures"), "3": pictures(8, seed=2), "4": given})
    assert run.value("4").startswith("5 pictures against 8")
    assert "Compare Sets skipped 2.png" in caplog.text


def test_a_folder_that_changes_while_it_is_read(graph, folders, saved, pack, monkeypatch):
    saved("a", 6, 1)
    load, late = pack.training.folder.load, folders / "input" / "a" / "late.png"

    def load_and_add(entry, how):
        if not late.exists():
            Image.fromarray(numpy.zeros((128, 128, 3), numpy.uint8)).save(late)
        return load(entry, how)

    monkeypatch.setattr(pack.training.folder, "load", load_and_add)
    given = node("CounterpointCompareSets", features=["1", 0], made_folder="input/a", reference=["3", 0])
    whole = {"1": node("CounterpointLoadFeatures"), "3": pictures(8, seed=2), "4": given}
    one_sentence(graph(whole, check=False), "'input/a' changed while it was read", "run again")
    assert not list((folders / "output" / "counterpoint" / "features").rglob("a*.safetensors"))
    assert graph(whole).value("4").startswith("7 pictures against 8")


def test_every_class_by_itself(graph, given):
    labels = ["cube"] * 8 + ["star"] * 8
    whole = prompt(pictures(16), pictures(16, seed=2), made_labels=["5", 0], reference_labels=["6", 0])
    run = graph({**whole, "5": given("STRING", labels), "6": given("STRING", labels[::-1] + [])})
    classes = json.loads(run.value("4", 2))["classes"]
    assert list(classes) == ["cube", "star"] and classes["cube"]["KID"]["value"] is not None
    *_, cube, star, mean, _, warning = run.value("4").splitlines()
    assert cube.startswith("cube") and star.startswith("star") and mean.startswith("mean of classes")
    assert "shaky below 50" in warning


@pytest.mark.parametrize("labels, words", [
    (["cube"] * 7, ("7 labels for the 8 pictures", "'made'", "give 1 each")),
    (["dog"] * 8, ("no class in common", "'dog'")),
])  # fmt: skip
def test_labels_that_do_not_match(graph, given, labels, words):
    whole = prompt(pictures(8), pictures(8, seed=2), made_labels=["5", 0], reference_labels=["6", 0])
    run = graph({**whole, "5": given("STRING", labels), "6": given("STRING", ["cube"] * 8)}, check=False)
    one_sentence(run, *words)


def test_nothing_to_compare(graph):
    whole = prompt(pictures(8), pictures(8, seed=2))
    del whole["4"]["inputs"]["made"]
    one_sentence(graph(whole, check=False), "no pictures for 'made'", "made_folder")


def test_a_folder_outside_is_refused_before_anything_runs(graph):
    run = graph(prompt(pictures(8), pictures(8), made_folder="../secret"), check=False)
    assert run.executed == [] and run.node_errors["4"]


def test_the_connected_clip_vision(graph):
    whole = prompt(pictures(8), pictures(8, seed=2))
    whole["1"] = node("CounterpointLoadFeatures", extractor="the CLIP_VISION that is connected")
    one_sentence(graph(whole, check=False), "No CLIP_VISION is connected", "choose another")
    whole["5"] = node("CounterpointLoadPocketModels")
    whole["1"]["inputs"]["clip_vision"] = ["5", 3]
    run = graph(whole)
    assert run.value("4").startswith("8 pictures against 8, as CLIP vision, 128 pixels sees them")


def test_cancel_stops_measuring_and_keeps_nothing_half(graph, folders):
    def cancel(event, data):
        if event == "executing" and data.get("node") == "4":
            import comfy.model_management

            comfy.model_management.interrupt_current_processing()

    run = graph(prompt(pictures(8), pictures(8, seed=2)), check=False, on_event=cancel)
    assert "4" not in run.outputs
    assert not list((folders / "output").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["CounterpointCompareSets", "CounterpointGuidanceCurve"])
def test_a_folder_named_by_another_node_is_looked_at_every_time(pack, kind):
    """ComfyUI does not know the name yet when it asks what may have changed."""
    import nodes

    once, again = (
        nodes.NODE_CLASS_MAPPINGS[kind].fingerprint_inputs(reference_folder=(None,), recursive=(False,)) for _ in "ab"
    )
    assert once != again


def test_kept_features_are_no_folder_of_pictures(graph, folders, pack):
    graph(prompt(pictures(8), pictures(8, seed=2)))
    assert (folders / "output" / "counterpoint" / "features").is_dir()
    assert not [choice for choice in pack.nodes.dataset.choices() if "features" in choice]
