"""Saved graphs 05 and 06 with what a person draws in them: a checkpoint of another family, a folder, captions of a model."""

import json

import pytest
from PIL import Image

from harness.boot import ROOT
from harness.convert import to_prompt

FAMILIES = {"SD 1.5": ["SD 1.5"], "SDXL": ["SDXL"], "FLUX.1": ["FLUX.1 model", "FLUX.1 text encoders", "FLUX.1 VAE"]}
MISSING = {"value_not_in_list"}  # the file that this machine does not have


class Saved:
    """A saved graph in which links can be drawn as on the canvas."""

    def __init__(self, name: str):
        (file,) = (ROOT / "workflows").glob(f"{name} *.json")
        self.graph = json.loads(file.read_text(encoding="utf-8"))

    def titled(self, title: str) -> dict:
        (found,) = [n for n in self.graph["nodes"] if n.get("title") == title]
        return found

    def draw(self, start: str, kind: str, end: str, input: str = "") -> None:
        """From the output of a type to an input, which loses the link it had; a node that was off is switched on."""
        source, target = self.titled(start), self.titled(end)
        source["mode"] = 0
        slot = next(i for i, out in enumerate(source["outputs"]) if kind in (out["type"], out["name"]))
        place = next(i for i, given in enumerate(target["inputs"]) if given["name"] == input)
        number = target["inputs"][place]["link"]
        (link,) = [each for each in self.graph["links"] if each[0] == number]
        before = next(n for n in self.graph["nodes"] if n["id"] == link[1])
        before["outputs"][link[2]]["links"].remove(number)
        source["outputs"][slot]["links"] = [*(source["outputs"][slot]["links"] or []), number]
        link[1:3] = [source["id"], slot]

    def prompt(self, folder, url: str) -> dict:
        file = folder / "drawn.json"
        file.write_text(json.dumps(self.graph), encoding="utf-8")
        return to_prompt(file, url)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_taken_by_drawing_three_outputs(family, server, graph, tmp_path):
    saved, loaders = Saved("05"), FAMILIES[family]
    ids = [str(saved.titled(title)["id"]) for title in loaders]
    for i, kind in enumerate(("MODEL", "CLIP", "VAE")):
        saved.draw(loaders[i % len(loaders)], kind, kind.lower())
    prompt = saved.prompt(tmp_path, server.url)
    used = [v[0] for n in prompt.values() for k, v in n["inputs"].items() if k in ("model", "clip", "vae") and v]
    assert "CounterpointLoadPocketModels" not in {prompt[each]["class_type"] for each in used}
    assert set(ids) <= set(used)
    _, error, _, node_errors = graph.validate(prompt)
    assert error is None or node_errors, error
    assert sorted(node_errors) == sorted(ids)
    for each in node_errors.values():
        assert {fault["type"] for fault in each["errors"]} == MISSING, each


@pytest.fixture
def a_picture(folders):
    Image.new("RGB", (64, 64)).save(folders / "input" / "1.png")


@pytest.mark.usefixtures("a_picture")
def test_a_folder_is_taken_by_drawing_two_outputs(server, graph, tmp_path):
    saved = Saved("05")
    for kind in ("images", "captions"):
        saved.draw("Your folder", kind, "Learn the style", kind)
    prompt = saved.prompt(tmp_path, server.url)
    (train,) = [n for n in prompt.values() if n["class_type"] == "CounterpointTrainEmbedding"]
    folder = str(saved.titled("Your folder")["id"])
    assert train["inputs"]["images"] == [folder, 0] and train["inputs"]["captions"] == [folder, 1]
    valid, error, _, node_errors = graph.validate(prompt)
    assert valid and not error and not node_errors


@pytest.mark.usefixtures("a_picture")
def test_captions_of_a_model_are_taken_by_drawing_one_output(server, graph, tmp_path):
    saved = Saved("06")
    saved.draw("Your folder", "images", "pictures")
    saved.draw("Caption Images: switch on with a model of yours", "captions", "captions")
    saved.titled("Keep pictures and captions as a folder")["mode"] = 0
    prompt = saved.prompt(tmp_path, server.url)
    kinds = {n["class_type"]: key for key, n in prompt.items()}
    for kind, input in (("CounterpointInspectDataset", "captions"), ("CounterpointNegativeSet", "captions"),
                        ("SaveImageTextDataSetToFolder", "texts")):  # fmt: skip
        assert prompt[kinds[kind]]["inputs"][input] == [kinds["CounterpointCaptionImages"], 0]
    assert prompt[kinds["CounterpointCaptionImages"]]["inputs"]["images"] == [kinds["CounterpointLoadDataset"], 0]
    valid, error, _, node_errors = graph.validate(prompt)
    assert valid and not error and not node_errors
