"""Saved graphs with what a person draws in them: a checkpoint of another family, a folder, captions of a model, masks, a mesh."""

import json

import nodes
import pytest
import torch
from PIL import Image

from harness.boot import ROOT
from harness.convert import to_prompt

FAMILIES = {"SD 1.5": ["SD 1.5"], "SDXL": ["SDXL"], "FLUX.1": ["FLUX.1 model", "FLUX.1 text encoders", "FLUX.1 VAE"]}
GRAPHS = {"05": FAMILIES, "10": ["SDXL", "FLUX.1"], "11": ["SDXL"], "12": ["FLUX.1"]}
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

    def switch_on(self, group: str) -> None:
        """Every node that begins in the group of this title."""
        (left, top, width, height) = next(g["bounding"] for g in self.graph["groups"] if g["title"].startswith(group))
        for part in self.graph["nodes"]:
            x, y = part["pos"]
            if left <= x < left + width and top <= y < top + height:
                part["mode"] = 0

    def prompt(self, folder, url: str) -> dict:
        file = folder / "drawn.json"
        file.write_text(json.dumps(self.graph), encoding="utf-8")
        return to_prompt(file, url)


@pytest.mark.parametrize(("number", "family"), [(n, family) for n, families in GRAPHS.items() for family in families])
def test_a_family_is_taken_by_drawing_three_outputs(number, family, server, graph, tmp_path):
    saved, loaders = Saved(number), FAMILIES[family]
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


class Segmenter:
    """Stands for a BiRefNet, which takes a gigabyte: it sees a disc everywhere, and keeps what it was shown."""

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        self.shown = image
        side = torch.linspace(-1, 1, image.shape[1])
        return (side[:, None].hypot(side) < 0.5).float().repeat(len(image), 1, 1)


def test_core_segments_what_was_painted_by_itself_when_its_group_is_switched_on(
    server, graph, folders, tmp_path, monkeypatch
):
    saved, segmenter = Saved("10"), Segmenter()
    saved.switch_on("5.")
    weights = folders / "models" / "background_removal" / "birefnet.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.touch()
    loader = nodes.NODE_CLASS_MAPPINGS["LoadBackgroundRemovalModel"].execute
    monkeypatch.setitem(loader.__globals__, "load", lambda path: segmenter)
    prompt = saved.prompt(tmp_path, server.url)
    for part in prompt.values():
        if part["class_type"] == "KSampler":
            part["inputs"]["steps"] = 2
    run = graph(prompt)
    titles = ("Each by itself", "Together", "Together, with these masks")
    painted = [run.value(str(saved.titled(title)["id"]))["samples"] for title in titles]
    decoded = next(
        k for k, n in prompt.items() if n["inputs"].get("samples") == [str(saved.titled(titles[0])["id"]), 0]
    )
    assert segmenter.shown.equal(run.value(decoded)) and len(segmenter.shown) == 4
    assert not any(painted[a].equal(painted[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_mesh_is_taken_by_drawing_two_outputs(server, graph, tmp_path):
    saved = Saved("11")
    for kind in ("images", "correspondences"):
        saved.draw("Views of your mesh", kind, {"images": "views"}.get(kind, kind))
    prompt = saved.prompt(tmp_path, server.url)
    mesh = str(saved.titled("Views of your mesh")["id"])
    (encode,) = [n for n in prompt.values() if n["class_type"] == "VAEEncode"]
    (warp,) = [n for n in prompt.values() if n["class_type"] == "CounterpointFeatureWarp"]
    assert encode["inputs"]["pixels"] == [mesh, 0] and warp["inputs"]["correspondences"] == [mesh, 5]
    _, _, _, node_errors = graph.validate(prompt)
    assert [(k, e["type"], e["details"]) for k, n in node_errors.items() for e in n["errors"]] == [
        (mesh, "required_input_missing", "mesh")
    ]
