"""The blueprints of `subgraphs/`: served, made of nodes and links that this ComfyUI has, and at work."""

import json
from pathlib import Path

import nodes
import pytest
import torch

from harness.boot import ROOT
from harness.convert import to_prompt
from harness.training import node

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
BY_NAME = pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda path: path.stem)
INSIDE, OUTSIDE = -10, -20  # the ends that a subgraph shows to the graph around it


def definition(file: Path) -> dict:
    """The one subgraph of a blueprint."""
    (inner,) = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    return inner


def test_every_blueprint_is_served_whole(client):
    offered = client.get("/global_subgraphs")
    ours = {v["name"]: key for key, v in offered.items() if v["info"]["node_pack"] == "custom_nodes.counterpoint"}
    assert BLUEPRINTS and set(ours) == {file.stem for file in BLUEPRINTS}
    for file in BLUEPRINTS:
        served = client.get(f"/global_subgraphs/{ours[file.stem]}")["data"]
        assert json.loads(served) == json.loads(file.read_text(encoding="utf-8"))


def test_blueprints_are_shipped():
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert not [line for line in left_out if "subgraphs" in line or line.strip() in ("*", "*.json")]


@BY_NAME
def test_nodes_inputs_and_link_types_are_those_of_this_comfyui(file: Path, client):
    inner, known = definition(file), client.get("/object_info")
    made_of = {part["id"]: part for part in inner["nodes"]}
    for part in made_of.values():
        kind = known[part["type"]]
        there = {k: v[0] for group in ("required", "optional") for k, v in kind["input"].get(group, {}).items()}
        types = {k: "COMBO" if isinstance(v, list) else v for k, v in there.items()}
        assert {i["name"]: i["type"] for i in part["inputs"]} == types
        assert [o["type"] for o in part["outputs"]] == kind["output"]
    for link in inner["links"]:
        starts = inner["inputs"] if link["origin_id"] == INSIDE else made_of[link["origin_id"]]["outputs"]
        ends = inner["outputs"] if link["target_id"] == OUTSIDE else made_of[link["target_id"]]["inputs"]
        start, end = starts[link["origin_slot"]], ends[link["target_slot"]]
        assert start["type"] == end["type"] == link["type"]
        assert link["id"] in (start.get("linkIds") or start["links"])
        assert link["id"] in end["linkIds"] if "linkIds" in end else link["id"] == end["link"]
    (outer,) = json.loads(file.read_text(encoding="utf-8"))["nodes"]
    assert outer["type"] == inner["id"] and inner["description"] and inner["category"].startswith("Counterpoint/")
    for side in ("inputs", "outputs"):
        assert [(i["name"], i["type"]) for i in outer[side]] == [(i["name"], i["type"]) for i in inner[side]]


class Reader:
    """Stands for a text encoder that can see, which takes gigabytes: it says how bright the picture is, and what it was
    asked and how."""

    def __init__(self):
        self.asked = []

    def tokenize(self, text, image=None, **how):
        self.asked.append((text, how))
        return image

    def generate(self, tokens, **how):
        self.asked[-1][1].update(how)
        return f"{tokens.shape[0]} of {tokens.mean():.1f}"

    def decode(self, ids):
        return ids


def test_caption_pictures_gives_a_caption_for_each_picture_of_a_list(server, graph, monkeypatch, pack):
    """The prompt as ComfyUI's people's own converter makes it of the blueprint; core's node runs, and only the reader is
    a stand-in."""
    (text,) = [n for n in to_prompt(ROOT / "subgraphs" / "Caption pictures.json", server.url).values()]
    assert text["class_type"] == "TextGenerate"
    reader = Reader()
    given = {
        "IMAGE": [torch.full((1, 8, 8 + i, 3), i / 10) for i in range(3)],
        "CLIP": [reader],
    }
    for kind, values in given.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, f"Given{kind}", giver(kind, values))
    prompt = {"1": {"class_type": "GivenIMAGE", "inputs": {}}, "2": {"class_type": "GivenCLIP", "inputs": {}}}
    text["inputs"] |= {"image": ["1", 0], "clip": ["2", 0]}
    run = graph({**prompt, "3": text, "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}}})
    assert run.outputs["3"][0] == ["1 of 0.0", "1 of 0.1", "1 of 0.2"]
    words, how = reader.asked[0]
    assert pack.nodes.caption.PROMPT in words
    assert how["max_length"] == 60 and not how["do_sample"] and not how["thinking"] and not how["skip_template"]


def learn_a_style(url: str, **values) -> tuple[dict[str, dict], str, str]:
    """The blueprint as a prompt, on the small SD1.5 (nodes 1) and three pictures (2): with its trainer's id and Use Embedding's."""
    inside = to_prompt(ROOT / "subgraphs" / "Learn a Style.json", url)
    ids = {node["class_type"]: key for key, node in inside.items()}
    trainer, use = ids.pop("CounterpointTrainEmbedding"), ids.pop("CounterpointUseEmbedding")
    assert not ids
    inside[trainer]["inputs"] |= {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], **values}
    inside[use]["inputs"] |= {"clip": ["1", 1]}
    pictures = node("CounterpointPocketPictures", count=3)
    return {"1": node("SmallModelsLoadSD15"), "2": pictures, **inside}, trainer, use


def test_learn_a_style_says_what_its_two_nodes_say_by_themselves(server, graph):
    """Every widget that was not promoted stands at its node's own default, and only the word goes from one to the other."""
    prompt, trainer, use = learn_a_style(server.url)
    for key in (trainer, use):
        own = node(prompt[key]["class_type"])["inputs"]
        assert {k: v for k, v in prompt[key]["inputs"].items() if not isinstance(v, list)} == own
    assert prompt[use]["inputs"]["embedding"] == [trainer, 0]


def test_learn_a_style_learns_a_word_that_the_prompt_behind_it_knows(server, graph):
    quick = {"captions": ["2", 1], "vectors": 1, "steps": 4, "batch": 2, "size": 64, "preview_every": 0}
    prompt, trainer, use = learn_a_style(server.url, **quick)
    for key, text in (("a", "a cat, embedding:my-style"), ("b", "a cat, picture")):  # the word began as "picture"
        prompt[key] = node("CLIPTextEncode", clip=[use, 0], text=text)
        prompt[f"{key} shown"] = node("PreviewAny", source=[key, 0])
    run = graph(prompt)
    assert run.value(use, 1) == "embedding:my-style"
    assert "4 steps on 3 pictures at 64, each with its caption" in run.value(trainer, 2)
    taught, plain = (run.value(key)[0][0] for key in "ab")
    assert taught.shape == plain.shape and not taught.equal(plain)


def test_consistent_batch_shares_what_it_finds_and_shows_it(server, graph):
    """Its size is both sides; taken past Shared Attention the sampler paints something else."""
    inside = to_prompt(ROOT / "subgraphs" / "Consistent Batch.json", server.url)
    ids = {each["class_type"]: key for key, each in inside.items()}
    of = {kind: inside[key]["inputs"] for kind, key in ids.items()}
    prompts, sharing = ids["CounterpointPromptPerPicture"], ids["CounterpointSharedAttention"]
    assert of["EmptyLatentImage"] == {"width": 1024, "height": 1024, "batch_size": [prompts, 1]}
    assert of["KSampler"]["model"] == of["CounterpointSubjectMask"]["model"] == [sharing, 0]
    of["CounterpointPromptPerPicture"] |= {
        "prompts": "a spotted heart at sea\na spotted heart at night",
        "subject": "spotted heart",
    }
    of["EmptyLatentImage"] |= {"width": 128, "height": 128}
    of["KSampler"] |= {"steps": 4, "cfg": 4.0}
    of["CounterpointSharedAttention"]["model"] = ["pocket", 0]
    of["CounterpointPromptPerPicture"]["clip"] = of["CLIPTextEncode"]["clip"] = ["pocket", 1]
    of["VAEDecode"]["vae"] = ["pocket", 2]
    shown = {
        "a": node("PreviewImage", images=[ids["VAEDecode"], 0]),
        "b": node("MaskPreview", mask=[ids["CounterpointSubjectMask"], 0]),
    }
    prompt = {"pocket": node("CounterpointLoadPocketModels"), **inside, **shown}
    run = graph(prompt)
    together, masks = run.value(ids["VAEDecode"]), run.value(ids["CounterpointSubjectMask"])
    assert together.shape == (2, 128, 128, 3) and masks.shape == (2, 128, 128)
    assert all(0 < mask.mean() < 1 for mask in masks)
    of["KSampler"]["model"] = ["pocket", 0]
    del prompt["b"]
    alone = graph(prompt).value(ids["VAEDecode"])
    assert not any(a.equal(b) for a, b in zip(alone, together, strict=True))


def giver(kind: str, values: list) -> type:
    class Given:
        RETURN_TYPES, OUTPUT_IS_LIST, FUNCTION, CATEGORY = (kind,), (True,), "give", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def give(self):
            return (values,)

    return Given
