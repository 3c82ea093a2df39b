"""Generate Set and Negative Set through ComfyUI's executor, on the small SD1.5."""

import json

import nodes
import numpy
import pytest
import torch
from PIL import Image

from harness.executor import Graph
from harness.training import node

PROMPTS = ["a red cat", "a dog", "a green bird on a tree", "a cow"]


SMALL = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "width": 64, "height": 64, "steps": 3, "batch": 2}


def generate(**inputs) -> dict[str, dict]:
    """1 models, 2 the set."""
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointGenerateSet", **{**SMALL, "prompts": "\n".join(PROMPTS), "name": "mine", **inputs}),
    }


def negatives(**inputs) -> dict[str, dict]:
    """1 models, 2 pictures with captions, 3 the negatives, 4 whoever wants them."""
    return {
        "1": node("SmallModelsLoadSD15"),
        "2": node("CounterpointPocketPictures", count=3, captions="content"),
        "3": node("CounterpointNegativeSet", **{**SMALL, "captions": ["2", 1], "name": "negatives", **inputs}),
        "4": node("PreviewAny", source=["3", 2]),
    }


def pictures(run, id: str = "2") -> torch.Tensor:
    """All pictures as (n, H, W, 3)."""
    assert all(p.shape[0] == 1 for p in run.outputs[id][0])
    return torch.cat(run.outputs[id][0])


@pytest.mark.parametrize("family", ["FLUX.2", "Qwen-Image", "Z-Image"])
def test_a_set_is_painted_whatever_latents_look_like(graph, folders, family):
    """16 pixels to a latent, latents of films, and texts that differ in length."""
    whole = {**generate(), "1": node("SmallModelsLoadFamily", family=family)}
    assert pictures(graph(whole)).shape == (4, 64, 64, 3)


def files(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix in (".png", ".txt")}


def times(folder) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.glob("*.png")}


def painted(run) -> bool:
    """Whether a sampler ran."""
    return bool(run.sent("progress"))


def one_sentence(run, *words: str) -> None:
    assert len(run.errors) == 1, run.errors
    said = run.errors[0]
    assert all(word in said for word in words), said
    assert len(said) < 500 and "\n" not in said


def interrupt_after(count: int, folder):
    """An on_event that cancels as soon as so many pictures lie on disk."""

    def on_event(name, data):
        if name == "progress" and len(list(folder.glob("*.png"))) >= count:
            nodes.interrupt_processing()

    return on_event


def test_a_set_is_pictures_texts_and_a_manifest(graph, folders):
    run = graph(generate())
    folder = folders / "output" / "mine"
    assert list(files(folder)) == [f"{i:05d}.{ending}" for i in range(4) for ending in ("png", "txt")]
    assert [(folder / f"{i:05d}.txt").read_text() for i in range(4)] == PROMPTS == run.outputs["2"][1]
    assert run.value("2", 2) == "mine"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(p["file"], p["prompt"]) for p in manifest["pictures"]] == [
        (f"{i:05d}.png", p) for i, p in enumerate(PROMPTS)
    ]
    assert {"seed": 1, "steps": 3, "width": 64, "height": 64}.items() <= manifest["recipe"].items()
    shown = pictures(run)
    assert shown.shape == (4, 64, 64, 3) and shown.min() >= 0 and shown.max() <= 1
    for i, picture in enumerate(shown):
        on_disk = numpy.asarray(Image.open(folder / f"{i:05d}.png").convert("RGB"), dtype=numpy.float32) / 255
        numpy.testing.assert_array_equal(picture.numpy(), on_disk)
    assert all((a - b).abs().mean() > 0.01 for i, a in enumerate(shown) for b in shown[:i])


def test_the_manifest_says_which_models_painted(graph, folders, pack):
    run, fingerprint = graph(generate()), pack.nodes.identity.fingerprint
    manifest = json.loads((folders / "output" / "mine" / "manifest.json").read_text())
    assert {fingerprint(run.value("1", slot)) for slot in range(3)} <= {str(v) for v in manifest.values()}


def test_a_picture_is_what_core_paints(graph, folders):
    """Number 2 of the set is KSampler's picture of that prompt with seed + 2."""
    core = {
        "1": node("SmallModelsLoadSD15"),
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": PROMPTS[2]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "ugly"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 12,
              "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "core"}},
    }  # fmt: skip
    ours = graph(generate(seed=10, cfg=2.0, negative="ugly", sampler="euler", scheduler="normal"))
    assert (pictures(ours)[2] - graph(core).value("6")[0]).abs().max() <= 2 / 255


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
def test_a_picture_does_not_depend_on_its_batch(graph, sampler):
    """At most 2 of 255 levels apart: sums are ordered differently in a batch of another size."""
    alone, together = (pictures(graph(generate(name=f"by-{batch}", batch=batch, sampler=sampler))) for batch in (1, 4))
    assert (alone - together).abs().max() <= 2 / 255


def test_the_same_prompt_twice_is_two_pictures(graph):
    a, b = pictures(graph(generate(prompts="a cat\na cat")))
    assert (a - b).abs().mean() > 0.01


def test_prompts_of_any_length_share_a_set(graph):
    long = "a cat and a dog and a bird and a cow " * 9
    run = graph(generate(prompts=f"a cat\n{long}\na dog\n\n  \n{long} again", batch=4))
    assert pictures(run).shape[0] == 4 and run.outputs["2"][1][2] == "a dog"
    alone = graph(generate(prompts="a cat", name="alone"))
    assert (pictures(alone)[0] - pictures(run)[0]).abs().max() <= 2 / 255


def test_interrupted_it_goes_on_with_what_is_missing(graph, folders):
    folder = folders / "output" / "cut"
    whole = graph(generate(name="whole"))
    cut = graph(generate(name="cut"), check=False, on_event=interrupt_after(2, folder))
    before = times(folder)
    assert cut.interrupted and list(before) and len(before) == 2
    rest = Graph()(generate(name="cut"))
    assert before.items() <= times(folder).items(), "a picture was painted twice"
    assert [run.sent("progress")[-1]["max"] for run in (whole, rest)] == [6, 3], "steps of two batches and of one"
    assert (pictures(rest) - pictures(whole)).abs().max() <= 2 / 255
    assert files(folder).keys() == files(folders / "output" / "whole").keys() and (folder / "manifest.json").exists()


def test_only_what_is_missing_is_painted(graph, folders):
    first, folder = graph(generate()), folders / "output" / "mine"
    before = times(folder)
    (folder / "00001.png").unlink()
    again = Graph()(generate())
    assert {n for n, t in times(folder).items() if before[n] != t} == {"00001.png"}
    assert (pictures(again) - pictures(first)).abs().max() <= 2 / 255


@pytest.mark.parametrize("name", ["mine", ""])
def test_with_nothing_changed_nothing_is_painted(graph, folders, name):
    first = graph(generate(name=name))
    folder = folders / "output" / first.value("2", 2)
    before = times(folder)
    again = Graph()(generate(name=name, batch=4))
    assert not painted(again) and pictures(again).equal(pictures(first)) and times(folder) == before
    assert len(list((folders / "output").iterdir())) == 1


CHANGES = {
    "seed": {"seed": 2}, "steps": {"steps": 4}, "cfg": {"cfg": 2.0}, "negative": {"negative": "ugly"}, "sampler": {"sampler": "dpmpp_2m"},
    "scheduler": {"scheduler": "karras"}, "width": {"width": 96}, "prompts": {"prompts": "a dog\na red cat"},
}  # fmt: skip


def test_another_recipe_under_the_same_name_is_refused(graph, folders):
    graph(generate())
    folder = folders / "output" / "mine"
    before = files(folder)
    for what, change in CHANGES.items():
        one_sentence(graph(generate(**change), check=False), "'mine'", what, "'mine-2'")
    other = generate()
    other["1"]["inputs"]["seed"] = 1
    one_sentence(graph(other, check=False), "'mine'", "model")
    assert files(folder) == before


def test_another_recipe_without_a_name_is_another_set(graph, folders):
    names = [graph(generate(name="", **change)).value("2", 2) for change in ({}, {"seed": 2}, {"prompts": "a dog"}, {})]
    assert len(set(names)) == 3 and names[0] == names[3] and all(n.startswith("generate-set-") for n in names)


def _with_word(given, pack, amount: float) -> dict:
    word = pack.training.embedding.Embedding({"clip_l": torch.full((2, 32), amount)}, "x")
    job = generate(name="", prompts="a cat in the style of embedding:style", clip=["4", 0])
    return {
        **job,
        "3": given("EMBEDDING", [word]),
        "4": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["3", 0], name="style"),
    }


def test_another_word_under_the_same_name_is_another_set(graph, given, pack):
    """Plain and contrastive, both used as embedding:style: the second set must not be the first one's pictures."""
    one, other = (graph(_with_word(given, pack, amount)) for amount in (0.5, -0.5))
    assert not pictures(one).equal(pictures(other))


@pytest.mark.parametrize("where", ["prompts", "negative"])
@pytest.mark.parametrize("said", ["a cat, embedding:styel, red", "a cat (embedding:styel:1.2)", "embedding:styel"])
def test_a_word_that_nobody_knows_is_named(graph, given, pack, where, said):
    """Core would leave it out and paint on."""
    job = _with_word(given, pack, 0.5)
    job["2"]["inputs"][where] = said
    one_sentence(graph(job, check=False), "embedding:styel,", "Use Embedding", "models/embeddings")
    job["2"]["inputs"][where] = said.replace("styel", "style")
    assert pictures(graph(job)).isfinite().all()


def test_another_layer_of_the_text_encoder_is_another_set(graph):
    skip = {**generate(name="", clip=["3", 0]), "3": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)}
    assert not pictures(graph(generate(name=""))).equal(pictures(graph(skip)))


def test_another_sampling_of_the_model_is_another_set(graph):
    other = {
        **generate(name="", model=["3", 0]),
        "3": node("ModelSamplingDiscrete", model=["1", 0], sampling="v_prediction", zsnr=False),
    }
    assert not pictures(graph(generate(name=""))).equal(pictures(graph(other)))


def test_a_folder_of_somebody_else_is_left_alone(graph, folders):
    """Frames and captions of another program have such names too."""
    folder = folders / "output" / "mine"
    folder.mkdir()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(folder / "00001.png")
    (folder / "00002.txt").write_text("my own caption, an hour of work")
    before = files(folder)
    run = graph(generate(), check=False)
    assert before.items() <= files(folder).items(), "a file was overwritten"
    assert run.errors or not torch.allclose(pictures(run)[1], torch.tensor([200, 10, 10]) / 255), (
        "a stranger's picture became part of the set"
    )


def test_cancel_stops_within_a_step(graph, folders):
    def cancel(name, data):
        if name == "progress":
            nodes.interrupt_processing()

    run = graph(generate(steps=50), check=False, on_event=cancel)
    assert run.interrupted and len(run.sent("progress")) == 1 and "2" not in run.outputs
    assert pictures(graph(generate(steps=50, name="other", prompts="a cat"))).isfinite().all()


@pytest.mark.parametrize("name", ["../mine", "/tmp/mine", "..", "."])
def test_a_set_stays_in_the_output_folder(graph, folders, name):
    one_sentence(graph(generate(name=name), check=False), "output folder", "name")
    assert not (folders / "mine").exists()


@pytest.mark.parametrize("prompts", ["", " \n \n"])
def test_nothing_to_paint_is_said(graph, prompts):
    one_sentence(graph(generate(prompts=prompts), check=False), "no prompts")


def test_model_and_clip_that_do_not_belong_together(graph, given, small_models, monkeypatch):
    monkeypatch.setattr(small_models.builders, "CLIP_TEXT", {**small_models.builders.CLIP_TEXT, "hidden_size": 48})
    with torch.inference_mode():
        wider = small_models.builders.sd15_clip()
    job = {**generate(clip=["3", 0]), "3": given("CLIP", [wider])}
    one_sentence(graph(job, check=False), "MODEL and CLIP do not belong together", "32", "48")


# Negatives


def test_negatives_say_the_content_and_a_generic_word(graph, folders):
    run = graph(negatives(generic="painting"))
    captions = run.outputs["2"][1]
    assert run.outputs["3"][1] == [f"{c} in the style of painting" for c in captions]
    assert pictures(run, "3").shape == (3, 64, 64, 3) and len(files(folders / "output" / "negatives")) == 6
    alone = graph(generate(prompts="\n".join(run.outputs["3"][1]), name="same"))
    assert pictures(alone).equal(pictures(run, "3")), "it is a preset of Generate Set"


def test_negatives_without_a_name_belong_to_their_captions(graph):
    names = []
    for seed in (1, 2, 1):
        job = negatives(name="")
        job["2"]["inputs"]["seed"] = seed
        names.append(graph(job).value("3", 2))
    assert names[0] == names[2] != names[1] and names[0].startswith("negative-set-")


@pytest.mark.parametrize(
    "template, word",
    [("{caption}", "{generic}"), ("in the style of {generic}", "{caption}"), ("", "{caption} and {generic}")],
)
def test_a_template_without_its_words_is_refused_before_anything_runs(graph, template, word):
    run = graph(negatives(template=template), check=False)
    one_sentence(run, word)
    assert run.executed == [] and list(run.node_errors) == ["3"]


@pytest.mark.parametrize("template, word", [("{caption} in the style of {generic}", None), ("{caption}", "{generic}")])
def test_a_template_from_another_node(graph, template, word):
    run = graph({**negatives(template=["5", 0]), "5": node("PrimitiveString", value=template)}, check=False)
    if word:
        one_sentence(run, word)
    else:
        assert not run.errors and len(pictures(run, "3")) == 3


@pytest.mark.parametrize("caption", ["a {caption} cat", "a cat\nand a dog", "a {token}"])
def test_captions_are_taken_as_they_are(graph, given, caption):
    run = graph({**negatives(captions=["5", 0]), "5": given("STRING", [caption])})
    assert run.outputs["3"][1] == [f"{caption} in the style of picture"]


def test_no_captions_are_refused(graph, given):
    one_sentence(
        graph({**negatives(captions=["5", 0]), "5": given("STRING", [])}, check=False), "no prompts", "captions"
    )


def test_the_sets_use_their_own_progress_bar(graph):
    run = graph(generate())
    assert run.sent("progress")[-1] | {"prompt_id": None} == {"value": 6, "max": 6, "prompt_id": None, "node": "2"}


def test_a_set_shows_its_first_pictures_where_they_lie(graph, folders):
    run = graph(generate(prompts="a red cat\na dog", per_prompt=9))
    shown = run.ui["2"]["images"]
    assert len(shown) == 16 and shown[0]["filename"] == "00000.png" and shown[0]["type"] == "output"
    assert all((folders / "output" / each["subfolder"] / each["filename"]).is_file() for each in shown)
