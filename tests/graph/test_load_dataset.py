"""Load Dataset in whole prompts: what it hands on, when it runs again, what it refuses before and during a run."""

import logging
import os
import sys
from pathlib import Path

import nodes
import pytest
from PIL import Image

LOAD = "CounterpointLoadDataset"
COLOURS = {"1.png": (255, 0, 0), "2.png": (0, 255, 0), "10.png": (0, 0, 255)}


@pytest.fixture
def cats(folders: Path) -> Path:
    """input/cats: three pictures of different sizes, one with a caption, one with a mask."""
    folder = folders / "input" / "cats"
    folder.mkdir()
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (16 + 8 * number, 16), colour).save(folder / name)
    (folder / "2.txt").write_text("a green cat", encoding="utf-8")
    Image.new("L", (32, 16)).save(folder / "10.mask.png")
    return folder


def prompt(folder: str = "input/cats", **inputs) -> dict:
    """1 loads, 2 previews the pictures, 3 shows the report."""
    values = {"folder": folder, "recursive": False, "size": 0, "limit": 0, "caption_when_missing": "a cat"}
    values |= {"background": "#ffffff", "alpha_as_mask": False} | inputs
    return {
        "1": {"class_type": LOAD, "inputs": values},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 4]}},
    }


def refusal(run) -> str:
    """The one sentence that a person reads when the prompt is refused at queue time."""
    (error,) = run.node_errors["1"]["errors"]
    assert run.executed == []
    return error["details"]


def test_a_folder_through_a_whole_prompt(graph, cats):
    run = graph(prompt())
    images, captions, masks, names, (report,) = run.outputs["1"]
    assert names == ["1.png", "2.png", "10.png"]
    assert captions == ["a cat", "a green cat", "a cat"]
    assert [tuple(image.shape) for image in images] == [(1, 16, 16, 3), (1, 16, 24, 3), (1, 16, 32, 3)]
    assert [tuple(mask.shape) for mask in masks] == [(1, 16, 16), (1, 16, 24), (1, 16, 32)]
    assert [image[0, 0, 0].tolist() for image in images] == [[c / 255 for c in COLOURS[name]] for name in names]
    assert [mask.mean() for mask in masks] == [1, 1, 0]
    assert len(run.ui["2"]["images"]) == 3
    assert report == run.ui["1"]["text"][0] and report.startswith("3 of 3 pictures from input/cats: 16 x 16 to 32 x 16")
    assert run.sent("progress")[-1]["max"] == 3


def test_it_runs_again_only_when_something_changed(graph, cats):
    def again() -> bool:
        return "1" in graph(prompt()).executed

    assert again() and not again()
    Image.new("RGB", (16, 16)).save(cats / "3.png")
    assert graph(prompt()).outputs["1"][3] == ["1.png", "2.png", "3.png", "10.png"]
    (cats / "1.txt").write_text("a red cat", encoding="utf-8")
    assert graph(prompt()).outputs["1"][1][0] == "a red cat"
    (cats / "1.txt").write_text("a pink cat", encoding="utf-8")
    assert again() and not again()
    (cats / "notes.json").write_text("{}")
    assert not again()
    os.utime(cats / "10.mask.png", (1, 1))
    assert again()


def test_beyond_the_limit_nothing_counts(graph, cats):
    assert graph(prompt(limit=2)).outputs["1"][3] == ["1.png", "2.png"]
    Image.new("RGB", (16, 16)).save(cats / "11.png")
    assert graph(prompt(limit=2)).executed == []


def test_a_bad_file_among_good_ones_is_named_everywhere(graph, cats, caplog):
    (cats / "2.png").write_bytes((cats / "2.png").read_bytes()[:60])
    (cats / "2.txt").write_bytes("eine grüne Katze".encode("cp1252"))
    (cats / "1.txt").write_bytes("eine süße Katze".encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        run = graph(prompt())
    images, captions, _, names, (report,) = run.outputs["1"]
    assert names == ["1.png", "10.png"] and len(images) == 2 and captions[0] == "eine süße Katze"
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for place in (report, run.ui["1"]["text"][0], "\n".join(warned)):
        assert "2.png: damaged" in place and "1.txt: not UTF-8" in place


def test_settings_reach_the_pictures(graph, cats):
    Image.new("RGBA", (20, 30), (255, 0, 0, 51)).save(cats / "1.png")
    Image.new("RGB", (4, 4)).save(cats / "more.png")
    (cats / "deep").mkdir()
    (cats / "more.png").rename(cats / "deep" / "more.png")
    run = graph(prompt(recursive=True, size=8, background="#00ff00", alpha_as_mask=True, caption_when_missing="x"))
    images, captions, masks, names, _ = run.outputs["1"]
    assert names == ["1.png", "2.png", "10.png", "deep/more.png"] and captions[0] == "x"
    assert {tuple(image.shape) for image in images} == {(1, 8, 8, 3)}
    assert images[0][0, 4, 4].tolist() == pytest.approx([0.2, 0.8, 0], abs=1e-5)
    assert masks[0].mean().item() == pytest.approx(0.2, abs=1e-5)


def test_the_menu_offers_what_is_there(pack, cats, folders):
    (folders / "output" / "run-1" / "previews").mkdir(parents=True)

    def menu() -> list[str]:
        return nodes.NODE_CLASS_MAPPINGS[LOAD].INPUT_TYPES()["required"]["folder"][1]["options"]

    assert menu() == ["input/cats", "output/run-1", "output/run-1/previews", "input", "output"]
    (folders / "input" / "dogs").mkdir()
    assert "input/dogs" in menu()


@pytest.mark.parametrize("folder", ["cats", "input/x/../cats", "{}/input/cats"])
def test_a_program_may_send_what_the_menu_does_not_offer(graph, cats, folders, folder):
    assert len(graph(prompt(folder.format(folders))).outputs["1"][0]) == 3


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("../secret", "lies outside ComfyUI's input and output folders"),
        ("{}/secret", "lies outside ComfyUI's input and output folders"),
        ("input/dogs", "There is no folder 'input/dogs': put the pictures into"),
        ("input/empty", "There is no picture in 'input/empty': put PNG"),
        ("", "No folder is chosen"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_queued(graph, cats, folders, folder, sentence):
    (folders / "secret").mkdir()
    (folders / "input" / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(folders / "secret" / "1.png")
    assert sentence in refusal(graph(prompt(folder.format(folders)), check=False))


def failure(run) -> str:
    (sentence,) = run.errors
    return sentence


def test_a_folder_of_bad_files_only_is_one_sentence(graph, cats):
    for name in COLOURS:
        (cats / name).write_bytes(b"not a picture")
    run = graph(prompt(), check=False)
    assert failure(run).startswith(f"{LOAD} 1: None of the pictures in 'input/cats' could be read (1.png: damaged")
    assert "2" not in run.outputs


def test_pictures_in_sub_folders_only(graph, cats, folders):
    cats.rename(folders / "input" / "pets")
    cats.mkdir()
    (folders / "input" / "pets").rename(cats / "pets")
    assert "3 in its sub-folders: turn `recursive` on" in failure(graph(prompt(), check=False))
    assert graph(prompt(recursive=True)).outputs["1"][3][0] == "pets/1.png"


def test_a_wrong_colour_is_one_sentence(graph, cats):
    assert "'greenish' is no colour" in failure(graph(prompt(background="greenish"), check=False))


def test_a_wired_folder_is_read_at_every_run(graph, cats):
    """What a wire will bring is not known when the fingerprint is taken."""
    switch = {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_true": ["5", 0], "on_false": ["5", 0]}}
    text = {"class_type": "PrimitiveString", "inputs": {"value": "input/cats"}}
    wired = prompt() | {"4": switch, "5": text}
    wired["1"]["inputs"]["folder"] = ["4", 0]
    assert len(graph(wired).outputs["1"][0]) == 3
    Image.new("RGB", (16, 16)).save(cats / "3.png")
    assert len(graph(wired).outputs["1"][0]) == 4


def test_an_interrupt_stops_between_two_pictures(graph, cats, monkeypatch):
    files, loaded = sys.modules[nodes.NODE_CLASS_MAPPINGS[LOAD].__module__].files, []
    load = files.load

    def load_and_stop(entry, how):
        loaded.append(entry.name)
        nodes.interrupt_processing()
        return load(entry, how)

    monkeypatch.setattr(files, "load", load_and_stop)
    run = graph(prompt(), check=False)
    assert run.interrupted and loaded == ["1.png"] and "1" not in run.outputs
