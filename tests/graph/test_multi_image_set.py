"""Prompt per Picture, Multi-Image Set and Load Image Sets through ComfyUI's executor."""

import json

import nodes
import numpy
import pytest
import torch
from PIL import Image

from harness.executor import Graph
from harness.training import node, one_sentence

OBJECTS, SCENES = ["a red cat", "a small blue dog"], ["on a tree", "at sea", "in the snow", "on a hill"]
SMALL = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "width": 64, "height": 64, "steps": 2, "name": "sets"}


def sets(**inputs) -> dict[str, dict]:
    """1 models, 2 the sets: two of two pictures for each of two objects."""
    texts = {"objects": "\n".join(OBJECTS), "scenes": "\n".join(SCENES)}
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointMultiImageSet", **{**SMALL, **texts, "per_set": 2, **inputs}),
    }


def load(folder: str = "output/sets", **inputs) -> dict[str, dict]:
    return {"1": node("CounterpointLoadImageSets", folder=folder, **inputs), "2": node("PreviewAny", source=["1", 6])}


def pictures(run, id: str = "2") -> torch.Tensor:
    return torch.cat(run.outputs[id][0])


def times(folder) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.glob("*.png")}


# Prompt per Picture


def per_picture(texts: list[str], batch: int | list) -> dict[str, dict]:
    """Core's sampler with a prompt for each picture."""
    sampler = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 3, "steps": 2, "cfg": 2.0,
               "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}  # fmt: skip
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointPromptPerPicture", clip=["1", 1], prompts="\n".join(texts)),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
        "5": {"class_type": "KSampler", "inputs": sampler},
        "6": node("PreviewAny", source=["5", 0]),
    }


def test_each_picture_of_stock_ksampler_has_its_prompt(graph):
    texts = ["a red cat", "a dog at sea", "a hill"]
    got = graph(per_picture(texts, ["2", 1])).value("5")["samples"]
    assert len(got) == 3
    for i, text in enumerate(texts):
        alone = graph(per_picture([text], 3)).value("5")["samples"]
        assert (got[i] - alone[i]).abs().max() <= 1e-4 and (got[i] - alone[i - 1]).abs().max() > 0.1


@pytest.mark.parametrize("texts, words", [([" ", ""], ("no prompts", "line")), (["a", "a embedding:nobody"], ("embedding:nobody", "Use Embedding"))])  # fmt: skip
def test_prompts_that_say_nothing_known(graph, texts, words):
    one_sentence(graph(per_picture(texts, 2), check=False), *words)


def test_a_subject_goes_with_every_row_and_is_found_in_every_prompt(graph, pack):
    texts = ["a red cat", "a dog beside a red cat at sea"]
    job = per_picture(texts, 2)
    job["2"]["inputs"]["subject"] = "red cat"
    ((_, facts),) = graph(job).value("2")
    assert [int(named.sum()) for _, named in facts[pack.nodes.attention.words.SUBJECT]] == [2, 2]
    job["2"]["inputs"]["subject"] = "dog"
    one_sentence(graph(job, check=False), "'a red cat'", "'dog'")


# Multi-Image Set


def test_sets_are_pictures_texts_and_two_lists(graph, folders):
    run = graph(sets())
    folder = folders / "output" / "sets"
    prompts = [f"{o}, {s}" for o in OBJECTS for s in SCENES]
    assert run.outputs["2"][1] == prompts and run.outputs["2"][3] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [(folder / f"{i:05d}.txt").read_text() for i in range(8)] == prompts
    assert pictures(run).shape == (8, 64, 64, 3) and all(m.eq(1).all() for m in run.outputs["2"][4])
    manifest = json.loads((folder / "manifest.json").read_text())["pictures"]
    assert manifest[5] == {
        "file": "00005.png",
        "prompt": prompts[5],
        "set": 3,
        "object": OBJECTS[1],
        "scene": SCENES[1],
    }
    assert json.loads((folder / "metadata.json").read_text())[3] == {
        "filenames": ["00006.png", "00007.png"], "prompts": SCENES[2:], "objaverse_id": "", "category": "deformable"
    }  # fmt: skip
    assert not list(folder.glob("*.mask.png"))


def test_a_set_does_not_depend_on_the_other_sets(graph):
    whole = pictures(graph(sets()))
    alone = pictures(graph(sets(objects=OBJECTS[1], name="alone", sets_per_object=1)))
    assert alone.equal(whole[4:6])
    assert not pictures(graph(sets(objects=OBJECTS[1], name="other", sets_per_object=1, seed=2))).equal(alone)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_set_is_one_batch_from_its_own_noise(graph, pack, sampler):
    """Its pictures are those of core's sampler in one batch; also where the sampler draws noise for the whole batch."""
    run = graph(sets(sampler=sampler, scheduler="normal", cfg=2.0))
    (each,) = pack.training.image_sets.deal(OBJECTS[:1], SCENES, 2, "in order", 1, most=1)
    job = per_picture([f"{OBJECTS[0]}, {s}" for s in SCENES[:2]], 2)
    job["5"]["inputs"] |= {"sampler_name": sampler, "seed": each.seed}
    job["7"] = node("VAEDecode", samples=["5", 0], vae=["1", 2])
    job["8"] = node("PreviewImage", images=["7", 0])
    # KSampler draws all noise from one generator, a set one after another: the first picture's is the same.
    assert sampler != "euler" or (graph(job).value("7")[0] - pictures(run)[0]).abs().max() <= 2 / 255
    assert (
        graph(sets(sampler=sampler, scheduler="normal", cfg=2.0, name="again"))
        .outputs["2"][0][7]
        .equal(run.outputs["2"][0][7])
    )


def test_pictures_of_a_set_see_each_other_and_no_other_set(graph):
    shared = {"model": ["3", 0], "name": "shared"}
    attention = {"3": node("CounterpointSharedAttention", model=["1", 0])}
    apart, together = pictures(graph(sets())), pictures(graph({**sets(**shared), **attention}))
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(apart, together, strict=True))
    alone = graph({**sets(**{**shared, "name": "one"}, objects=OBJECTS[1], sets_per_object=1), **attention})
    assert pictures(alone).equal(together[4:6])
    assert not Graph()({**sets(**shared), **attention}).sent("progress"), "what was painted is used again"


def test_a_set_that_is_not_whole_is_painted_again_whole(graph, folders):
    first, folder = graph(sets()), folders / "output" / "sets"
    before = times(folder)
    (folder / "00003.png").unlink()
    again = Graph()(sets())
    assert {n for n, t in times(folder).items() if before[n] != t} == {"00002.png", "00003.png"}
    assert pictures(again).equal(pictures(first)) and again.sent("progress")[-1]["max"] == 2
    assert not Graph()(sets()).sent("progress"), "with nothing missing nothing is painted"


def test_interrupted_it_goes_on_set_by_set(graph, folders):
    folder = folders / "output" / "sets"

    def cancel(name, data):
        if name == "progress" and len(list(folder.glob("*.png"))) >= 4:
            nodes.interrupt_processing()

    assert graph(sets(), check=False, on_event=cancel).interrupted
    before = times(folder)
    rest = Graph()(sets())
    assert len(before) == 4 and before.items() <= times(folder).items()
    assert rest.sent("progress")[-1]["max"] == 4, "two sets of two steps"
    assert pictures(rest).equal(pictures(graph(sets(name="whole"))))


def test_prompts_of_any_length_are_one_set(graph):
    long = "a cat and a dog and a bird and a cow " * 9
    run = graph(sets(scenes=f"at sea\n{long}", objects=OBJECTS[0]))
    assert pictures(run).isfinite().all() and len(pictures(run)) == 2


def test_a_family_that_cannot_fill_up_says_so_before_it_paints(graph, folders):
    job = {
        **sets(scenes="at sea\non a very high and very green hill"),
        "1": node("SmallModelsLoadFamily", family="Z-Image"),
    }
    one_sentence(graph(job, check=False), "ZImage", "different lengths", "equally long")
    assert not list((folders / "output" / "sets").glob("*.png"))
    same = {**sets(scenes="at sea\non sand", objects="a red cat"), "1": node("SmallModelsLoadFamily", family="Z-Image")}
    assert len(pictures(graph(same | {"2": {**same["2"], "inputs": {**same["2"]["inputs"], "name": "same"}}}))) == 2


def test_found_masks_lie_beside_their_pictures(graph, folders, pack, monkeypatch):
    found = torch.zeros(2, 4, 4)
    found[0, :2], found[1, :, 3] = 1, 1
    monkeypatch.setattr(pack.nodes.generate, "found_masks", lambda model, latents: found)
    run = graph(sets(objects=OBJECTS[0], scenes="\n".join(SCENES[:2])))
    folder = folders / "output" / "sets"
    shown = numpy.asarray(Image.open(folder / "00000.mask.png"))
    assert shown.shape == (64, 64) and shown[:24].min() == 255 and shown[40:].max() == 0
    loaded = graph(load())
    for first, second in zip(run.outputs["2"][4], loaded.outputs["1"][4], strict=True):
        assert first.equal(second) and 0.1 < first.mean() < 0.6
    dataset = {"1": node("CounterpointLoadDataset", folder="output/sets"), "2": node("PreviewAny", source=["1", 4])}
    assert graph(dataset).outputs["1"][2][1].equal(loaded.outputs["1"][4][1])


@pytest.mark.parametrize("template, word", [("{scene}", "{object}"), ("a cat, {scene}", "{object}"), ("{object}", "{scene}"), ("", "{object} and {scene}")])  # fmt: skip
def test_prompts_that_do_not_name_the_object_are_refused_before_anything_runs(graph, template, word):
    run = graph(sets(template=template), check=False)
    one_sentence(run, word, "'{object}, {scene}'")
    assert run.executed == []
    wired = graph({**sets(template=["3", 0]), "3": node("PrimitiveString", value=template)}, check=False)
    one_sentence(wired, word)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"per_set": ["3", 0]}, ("2 pictures or more", "Generate Set")),
        ({"per_set": 5}, ("4 scenes", "sets of 5")),
        ({"objects": " \n"}, ("no objects",)),
        ({"objects": "a embedding:nobody"}, ("embedding:nobody",)),
        ({"name": "../sets"}, ("output folder",)),
    ],
)
def test_what_cannot_be_painted_is_said(graph, change, words):
    one_sentence(graph({**sets(**change), "3": node("PrimitiveInt", value=1)}, check=False), *words)


def test_other_objects_under_the_same_name_are_refused(graph):
    graph(sets())
    one_sentence(graph(sets(objects="a cow"), check=False), "'sets'", "'sets-2'")
    one_sentence(graph(sets(dealing="shuffled for each object"), check=False), "'sets'", "'sets-2'")


# Load Image Sets


def test_sets_are_loaded_as_they_were_painted(graph):
    painted, loaded = graph(sets()), graph(load())
    assert [loaded.outputs["1"][k] for k in (1, 3)] == [painted.outputs["2"][k] for k in (1, 3)]
    assert pictures(loaded, "1").equal(pictures(painted)) and loaded.value("1", 2) == "output/sets"
    assert loaded.value("1", 6) == "4 of 4 sets from output/sets: 8 pictures, 0 with a mask"
    some = graph(load(first=2, limit=2))
    assert some.outputs["1"][3] == [2, 2, 3, 3] and pictures(some, "1").equal(pictures(painted)[2:6])


def published(folders, missing: bool = False) -> None:
    folder = folders / "input" / "syncd"
    (folder / "masks").mkdir(parents=True)
    names = [f"cat_0_0_0_{i}.jpg" for i in range(3)]
    for i, name in enumerate(names):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / name)
        mask = Image.new("L", (8, 8))
        mask.paste(255, (2, 2, 6, 6))
        mask.save(folder / "masks" / name)
    extra = ["gone.jpg"] if missing else []
    record = {
        "filenames": [f"out/{n}" for n in names + extra],
        "prompts": ["a", "b", "c", "d"][: 3 + missing],
        "objaverse_id": "",
        "category": "deformable",
    }
    (folder / "metadata_0.json").write_text(json.dumps([record]))


def test_syncds_published_layout_is_loaded(graph, folders):
    published(folders)
    run = graph(load("input/syncd", size=16))
    images, captions, _, numbers, masks, names, (report,) = run.outputs["1"]
    assert captions == ["a", "b", "c"] and numbers == [1, 1, 1] and names[2] == "cat_0_0_0_2.jpg"
    assert {tuple(i.shape) for i in images} == {(1, 16, 16, 3)} and set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert 0.15 < masks[0].mean() < 0.35 and "3 with a mask" in report


def test_a_missing_file_is_left_out_named_and_counted(graph, folders):
    published(folders, missing=True)
    (folders / "input" / "syncd" / "cat_0_0_0_1.jpg").write_bytes(b"no picture")
    run = graph(load("input/syncd"))
    assert run.outputs["1"][1] == ["a", "c"]
    report = run.value("1", 6)
    assert (
        "2 pictures, 2 left out" in report
        and "out/gone.jpg: set 1 names it" in report
        and "cat_0_0_0_1.jpg: damaged" in report
    )
    assert report == run.ui["1"]["text"][0]


def test_it_loads_again_only_when_something_changed(graph, folders):
    published(folders)
    assert "1" in graph(load("input/syncd")).executed
    assert graph(load("input/syncd")).executed == []
    Image.new("RGB", (32, 32), (1, 2, 3)).save(folders / "input" / "syncd" / "cat_0_0_0_0.jpg")
    assert "1" in graph(load("input/syncd")).executed


def test_folders_without_sets_are_refused_at_queue_time(graph, folders):
    (folders / "input" / "plain").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "input" / "plain" / "a.png")
    run = graph(load("input/plain"), check=False)
    one_sentence(run, "no metadata.json", "Load Dataset")
    assert run.executed == []
    published(folders)
    one_sentence(graph(load("input/syncd", first=2), check=False), "is number 1", "first to load is 2")
