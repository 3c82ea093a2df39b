"""Train, save, load and use a word through ComfyUI's executor, on the small SD1.5."""

import math

import nodes
import pytest
import torch

from harness.executor import Graph
from harness.training import at_step, node, one_sentence, prompt, sound, steps, vectors

METHODS = ("plain", "paper", "reference point")

# The whole way


@pytest.mark.parametrize("method", METHODS)
def test_a_word_is_learned(graph, every_step, method):
    run = graph(prompt(method=method))
    learned = run.value("4")
    assert learned.vectors.keys() == {"clip_l"} and learned.vectors["clip_l"].shape == (2, 32) and learned.count == 2
    assert learned.vectors["clip_l"].isfinite().all() and not learned.vectors["clip_l"].is_inference()
    facts = {"method": method, "steps": 6, "seed": 0, "strength": 1.0, "start": "red cat"}
    assert facts.items() <= learned.facts.items()
    loss = run.value("4", 1)["loss"]
    assert len(loss) == 6 and all(math.isfinite(x) and x > 0 for x in loss)
    assert method in run.value("4", 2) and "6 steps" in run.value("4", 2) and "3 pictures" in run.value("4", 2)
    assert (
        len(run.outputs["4"]) == 4
        and run.value("4", 3) == learned.name
        and run.ui["4"]["counterpoint_loss"] == loss
        and run.ui["5"]["images"]
    )
    sound("training")


def test_progress_is_told_step_by_step(graph, every_step):
    """record() in the harness refuses anything that is not finite JSON."""
    run = graph(prompt())
    said = run.sent("counterpoint.progress")
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    for each in said:
        assert each["prompt_id"] == "in-process" and each["node_id"] == "4" and each["steps"] == 6
        assert each["loss"] > 0 and each["eta_s"] >= 0 and {"cosine", "removed", "norm"} <= each["stats"].keys()
    assert said[-1]["eta_s"] == 0 and run.sent("progress")[-1]["value"] == 6


@pytest.mark.parametrize("cut", [False, True], ids=["to the end", "interrupted"])
def test_model_and_clip_are_bit_identical_afterwards(graph, every_step, cut):
    shown = {**prompt(), "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red cat"}}}
    shown["7"] = node("PreviewAny", source=["6", 0])
    alone = {key: shown[key] for key in ("1", "6", "7")}
    first = graph(alone)
    modules = {
        "model": first.value("1", 0).model,
        "clip": first.value("1", 1).cond_stage_model,
        "vae": first.value("1", 2).first_stage_model,
    }
    before = {name: {k: t.clone() for k, t in m.state_dict().items()} for name, m in modules.items()}
    said = first.value("6")[0][0].clone()
    run = graph(shown, check=not cut, on_event=at_step(3, nodes.interrupt_processing) if cut else None)
    assert run.interrupted == cut and "1" not in run.executed
    for name, module in modules.items():
        assert all(torch.equal(t, before[name][k]) for k, t in module.state_dict().items()), name
    clip = first.value("1", 1)
    with torch.inference_mode():
        assert said.equal(clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))[0][0])
    sound("the run")


def test_strength_nothing_is_plain_bit_for_bit(graph):
    plain = vectors(graph(prompt(method="plain", negatives=None)))
    for method in METHODS[1:]:
        assert plain.equal(vectors(graph(prompt(method=method, strength=0.0))))
    assert not plain.equal(vectors(graph(prompt(method="paper"))))


def test_looking_at_it_changes_nothing(graph, folders):
    """Previews and snapshots on the way: the samplers use the global generator, the training must not notice."""
    plain = graph(prompt(run="plain"))
    seen = graph(prompt(run="seen", preview_every=2, snapshot_every=3))
    assert vectors(plain).equal(vectors(seen))
    folder = folders / "output" / "counterpoint" / "seen"
    assert sorted(f.name for f in (folder / "snapshots").iterdir()) == [
        "step-000003.safetensors",
        "step-000006.safetensors",
    ]
    assert sorted(f.name for f in (folder / "previews").iterdir()) == ["step-000002.jpg", "step-000004.jpg"]
    assert len(seen.sent("preview")) == 2
    last = graph(
        {
            "1": node("CounterpointLoadEmbedding", embedding="run: seen/snapshots/step-000006.safetensors"),
            "2": node("PreviewAny", source=["1", 0]),
        }
    )
    assert vectors(last, "1").equal(vectors(seen))


def test_one_picture_is_enough(graph, given):
    one = {**prompt(), "2": given("IMAGE", [torch.rand(1, 80, 64, 3)]), "3": given("IMAGE", [torch.rand(1, 64, 64, 3)])}
    one["4"]["inputs"].pop("captions")
    assert vectors(graph(one)).isfinite().all()


def test_a_batch_and_a_list_of_pictures_are_the_same(graph, given):
    pictures, negatives = torch.rand(3, 64, 64, 3), torch.rand(3, 64, 64, 3)
    learned = []
    for cut in (1, 2, 3):
        both = {"2": given("IMAGE", list(pictures.split(cut))), "3": given("IMAGE", list(negatives.split(cut)))}
        job = {**prompt(run=f"cut-{cut}"), **both}
        job["4"]["inputs"].pop("captions")
        learned.append(vectors(graph(job)))
    assert learned[0].equal(learned[1]) and learned[0].equal(learned[2])


@pytest.mark.parametrize("use", ["caption", "dropout"])
@pytest.mark.parametrize(
    "template", ["a picture in the style of {token}", "{token} art", "{token}, painted in the style of a child"]
)
def test_captions_can_be_used(graph, use, template):
    assert vectors(graph(prompt(caption_use=use, template=template))).isfinite().all()


@pytest.mark.parametrize("use", ["template", "caption", "dropout"])
@pytest.mark.parametrize(
    "template", ["a picture in the style of {token}", "{token} art", "{token} in the style of a child"]
)
def test_every_way_of_captioning_has_the_word_once(pack, use, template):
    ways = pack.nodes.training_job.ways_to_caption(["a red cube", " a dog. ", ""], template, use)
    assert len(ways) == 3 and [len(w) for w in ways] == [2 if use == "dropout" else 1] * 3
    assert all(caption.count("{token}") == 1 for each in ways for caption in each), ways
    assert (template in ways[0]) == (use != "caption") and any("a red cube" in caption for caption in ways[0]) == (
        use != "template"
    )


@pytest.mark.parametrize(
    ("inputs", "used"),
    [
        ({"method": "plain"}, "its caption"),
        ({"method": "plain", "captions": None}, "the template"),
        ({"method": "paper"}, "the template"),
        ({"method": "paper", "strength": 0.0}, "its caption"),
        ({"method": "plain", "caption_use": "template"}, "the template"),
    ],
)
def test_auto_uses_captions_where_there_are_some_and_no_contrast(graph, inputs, used):
    run = graph(prompt(steps=2, **{"caption_use": "auto", **inputs}))
    assert f"each with {used}, " in run.value("4", 2)


def test_the_packs_own_word_is_found_by_every_clip(graph):
    """`01 learn a style` paints with it before anything is trained."""
    text = "a star in the style of {}"
    job = {"1": node("CounterpointLoadPocketModels")}
    for id, word in {"2": "embedding:pocket-ink-and-wash", "3": "picture"}.items():
        job[id] = node("CLIPTextEncode", clip=["1", 1], text=text.format(word))
        job[id + "0"] = node("PreviewAny", source=[id, 0])
    run = graph(job)
    assert not torch.equal(_conditioning(run, "2"), _conditioning(run, "3"))


def test_recommended_is_a_method_by_its_name(graph):
    taken = graph(prompt(method="recommended", run="taken"))
    assert "plain on SD 1.5" in taken.value("4", 2)
    assert vectors(taken).equal(vectors(graph(prompt(method="plain", run="plain"))))
    sentence = graph(prompt(method="recommended", captions=None, run="one-sentence"))
    assert "paper on SD 1.5" in sentence.value("4", 2)
    assert vectors(sentence).equal(vectors(graph(prompt(method="paper", captions=None, run="paper"))))


def test_mirror_learns_from_both_sides(graph, given):
    pictures, negatives = torch.rand(3, 64, 64, 3), torch.rand(3, 64, 64, 3)
    both = {
        "2": given("IMAGE", [torch.cat([pictures, pictures.flip(2)])]),
        "3": given("IMAGE", [torch.cat([negatives, negatives.flip(2)])]),
    }
    one = {"2": given("IMAGE", [pictures]), "3": given("IMAGE", [negatives])}
    by_hand = graph({**prompt(run="by-hand", captions=None), **both})
    mirrored = graph({**prompt(run="mirrored", captions=None, mirror=True), **one})
    assert vectors(mirrored).equal(vectors(by_hand))
    assert not vectors(mirrored).equal(vectors(graph({**prompt(run="one-side", captions=None), **one})))


def half_white(side: int) -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, side * 32 : side * 32 + 32] = 1
    return mask


def test_what_a_mask_hides_is_not_learned(graph, given):
    """Pictures that differ on the right only, learned from their left."""
    pictures = torch.rand(2, 3, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    pictures[1, :, :, :32] = pictures[0, :, :, :32]
    learned = {}
    for i, side in ((0, 0), (1, 0), (1, 1)):
        job = {
            **prompt(captions=None, method="plain", negatives=None, masks=["6", 0]),
            "2": given("IMAGE", [pictures[i]]),
        }
        del job["3"]
        learned[i, side] = vectors(graph({**job, "6": given("MASK", [half_white(side)])}))
    left = (learned[0, 0] - learned[1, 0]).norm()  # a VAE and a UNet look a little across the border
    assert left < 0.3 * (learned[0, 0] - learned[1, 1]).norm()


# Several words at once

TWO = {"template": "a {token:cat} in the style of {token}", "captions": None}


def test_two_words_are_learned_at_once(graph, pack, folders):
    job = {
        **prompt(**TWO, run="two", snapshot_every=3),
        "6": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["4", 0], name="fresh"),
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["6", 0], "text": "a embedding:fresh-cat in the style of embedding:fresh"}},
        "8": node("CounterpointSaveEmbedding", embedding=["4", 0], name="saved"),
        "9": node("PreviewAny", source=["7", 0]),
    }  # fmt: skip
    run = graph(job)
    learned = run.value("4")
    assert learned.others.keys() == {"cat"} and learned.others["cat"]["clip_l"].shape == (2, 32)
    assert "for each of 2 words" in run.value("4", 2) and tuple(run.ui["8"]["text"]) == (
        "Saved. In prompts: embedding:saved and embedding:saved-cat",
    )
    text = "a embedding:saved-cat in the style of embedding:saved"
    later = {"1": node("SmallModelsLoadSD15"), "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}},
             "3": node("PreviewAny", source=["2", 0]),
             "4": node("CounterpointLoadEmbedding", embedding="run: two/snapshots/step-000006.safetensors"), "5": node("PreviewAny", source=["4", 0])}  # fmt: skip
    after = Graph()(later)
    assert (_conditioning(run, "7") - _conditioning(after, "2")).abs().max() <= 1e-6
    assert after.value("4").others["cat"]["clip_l"].equal(learned.others["cat"]["clip_l"])
    start = pack.nodes.bridge.starting_vectors(run.value("1", 1), "cat", 2)["clip_l"]
    assert (
        not learned.others["cat"]["clip_l"].equal(start)
        and (learned.others["cat"]["clip_l"] - start).norm() < start.norm()
    )


def test_a_word_may_stand_in_the_captions_alone(graph, given):
    captions = given("STRING", ["a {token:cat}", "a dog", "two {token:cat} in the style of {token}"])
    run = graph({**prompt(captions=["6", 0], method="plain", caption_use="caption"), "6": captions})
    assert run.value("4").others.keys() == {"cat"}


def test_vectors_that_no_picture_reaches_are_told_of(graph, given, pack):
    """FLUX.1 with a caption longer than the 77 tokens of which its clip_l is summed up."""
    long = " ".join(["a red cat on green grass under a blue sky,"] * 20)
    job = {**prompt(captions=["6", 0], method="plain", caption_use="caption"), "6": given("STRING", [long] * 3)}
    job["1"] = node("SmallModelsLoadFamily", family="FLUX.1")
    said = graph(job).value("4", 2)
    assert "The vectors of {token} for clip_l did not move" in said and "t5xxl did not" not in said


# Saved, loaded, used


def _conditioning(run, id: str) -> torch.Tensor:
    return run.value(id)[0][0]


def test_a_word_means_the_same_from_memory_and_from_disk(graph):
    text = "a cat in the style of embedding:{}, (embedding:{}:1.2) on grass"
    job = {
        **prompt(),
        "6": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["4", 0], name="fresh"),
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["6", 0], "text": text.format("fresh", "fresh")}},
        "8": node("CounterpointSaveEmbedding", embedding=["4", 0], name="saved", preview=["2", 0]),
        "9": node("PreviewAny", source=["7", 0]),
    }
    first = graph(job)
    assert first.value("6", 1) == "embedding:fresh"
    assert set(first.outputs["8"][0]) == {"saved"}, "three previews are three calls with the same word: one file"
    later = {  # as after a restart: another executor, other loaders
        "1": node("SmallModelsLoadSD15"),
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text.format("saved", "saved")}},
        "3": node("CounterpointLoadEmbedding", embedding="saved.safetensors"),
        "4": node("CounterpointUseEmbedding", clip=["1", 1], embedding=["3", 0], name="again"),
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 0], "text": text.format("again", "again")}},
        "6": node("PreviewAny", source=["2", 0]),
        "7": node("PreviewAny", source=["5", 0]),
    }
    second = Graph()(later)
    for id in ("2", "5"):
        assert (_conditioning(first, "7") - _conditioning(second, id)).abs().max() <= 1e-6
    assert second.value("3").facts["method"] == "reference point" and second.value("3").facts["steps"] == 6


@pytest.mark.parametrize("name", ["my style", "../style", "a/b", "style,", ""])
@pytest.mark.parametrize("which", ["CounterpointUseEmbedding", "CounterpointSaveEmbedding"])
def test_a_name_that_prompts_cannot_say_is_refused(graph, pack, given, which, name):
    word = pack.training.embedding.Embedding({"clip_l": torch.zeros(1, 32)}, "x")
    job = {
        "1": given("EMBEDDING", [word]),
        "2": node("SmallModelsLoadSD15"),
        "3": node(which, embedding=["1", 0], name=name),
    }
    if which == "CounterpointUseEmbedding":
        job["3"]["inputs"]["clip"] = ["2", 1]
        job["4"] = node("PreviewAny", source=["3", 1])
    run = graph(job, check=False)
    assert run.node_errors, "before a training is begun for it"
    one_sentence(run, "cannot be used as an embedding", "for example")
