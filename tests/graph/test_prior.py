"""A prior in whole prompts: pairs, training, sampling, files, and core's own nodes behind them."""

import copy
import gc
from dataclasses import replace
from importlib import import_module

import comfy.clip_vision
import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from harness.priors import captions, made, pictures, sampling, small_prior, small_vision, training
from harness.training import at_step, node, steps

TOLD = {"cosine", "centred cosine", "frechet", "energy", "diversity", "norm", "rank"}


@pytest.fixture
def learn(small_models, given):
    """`learn(**inputs)`: a prompt that trains a small prior on 48 pairs."""
    seen = given("CLIP_VISION", [small_vision(small_models.builders)])
    shown, said = given("IMAGE", pictures()), given("STRING", captions())
    return lambda **inputs: training(seen, shown, said, **inputs)


@pytest.fixture
def prior(pack):
    return small_prior(pack)


def given_prior(given, prior) -> dict[str, dict]:
    return {"1": node("SmallModelsLoadFamily", family="SD1.5"), "6": given("PRIOR", [prior])}


def weights(run) -> dict[str, torch.Tensor]:
    return run.value("6").network.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The whole way


def test_pocket_from_pictures_to_conditioning(graph, folders, no_network):
    """With Pocket's own CLIP, on which text and pictures lie in one space; and without asking another machine for anything."""
    whole = {
        "1": node("CounterpointLoadPocketModels"),
        "2": node("CounterpointPocketPictures", count=60, captions="varied"),
        "5": node("CounterpointEmbedPairs", clip=["1", 1], clip_vision=["1", 3], images=["2", 0], captions=["2", 1]),
        "f": node("CounterpointFitStartDistribution", pairs=["5", 0], kind="ridge"),
        "6": node("CounterpointTrainPrior", pairs=["5", 0], start=["f", 0], steps=4, batch=16, look_every=2),
        "7": node("LossGraphNode", loss=["6", 1]),
        "c": node("CounterpointTrainingCurves", run=["6", 3]),
        **sampling(count=2, best_of=2),
    }
    run = graph(whole)
    assert run.value("5", 1) == "60 pairs: 128 numbers for each picture, 128 for each caption."
    assert "ridge, fitted to 54 pairs" in run.value("f", 1) and "of 6 pictures that it has not seen" in run.value(
        "f", 1
    )
    made_prior, report = run.value("6"), run.value("6", 2)
    assert made_prior.space == "CLIP vision, 128 pixels, 128 numbers" and made_prior.facts["steps"] == 4
    assert (
        "4 steps on 60 pairs" in report
        and "soon known by heart" in report
        and "start ridge" in report
        and all(f"{k} " in report for k in TOLD)
    )
    assert steps(run) == sorted(set(steps(run))) and steps(run)[-1] == 4
    assert len([p for p in run.sent("preview") if p[1]["node_id"] == "6"]) == 2, "a plot of each look"
    assert len(run.value("6", 1)["loss"]) == 4 and run.value("c").shape[0] == 1
    kept = run.outputs["u"][0]
    assert len(kept) == 2, "a list: one conditioning for each embedding"
    for ((_, facts),), embedding in zip(kept, run.outputs["s"][0], strict=True):
        (entry,) = facts["unclip_conditioning"]
        assert entry["clip_vision_output"] is embedding and embedding.image_embeds.shape == (1, 128)
    assert "2 of 128 numbers" in run.value("s", 2) and "times as long as real ones" in run.value("s", 2)
    files = sorted((folders / "output" / "counterpoint" / "pairs").iterdir())
    again = graph({**whole, "5": {**whole["5"], "inputs": {**whole["5"]["inputs"], "recursive": True}}})
    assert again.value("6", 2).endswith("taken from disk.") and len(files) == 1
    assert same(weights(run), weights(again)) and torch.equal(made(run), made(again))
    assert not no_network


@pytest.mark.parametrize("count", [40, 100, 300])
def test_the_papers_preset_with_few_pairs(graph, small_models, given, count):
    """It has fewer clusters then: one for 8 pairs."""
    seen = given("CLIP_VISION", [small_vision(small_models.builders, projection_dim=32)])
    shown, said = given("IMAGE", pictures(count)), given("STRING", captions(count))
    run = graph({**training(seen, shown, said, preset="paper", steps=2, look_every=0), **sampling()})
    start = run.value("6").start
    assert (start.kind, start.scale) == ("clusters as published", 5.0)
    assert len(start.tensors["start.mean"]) == (count - count // 10) // 8 and made(run).isfinite().all()


def test_what_is_told_of_a_look_is_told_together(graph, learn, every_step):
    said = [event["stats"] for event in graph(learn()).sent("counterpoint.progress")]
    assert len(said) == 4
    assert not TOLD & said[0].keys() and said[1].keys() >= TOLD and said[3].keys() >= TOLD


# Training stops and goes on


def test_stopped_and_run_again_it_goes_on_to_the_same_end(graph, learn, every_step, folders):
    whole = graph(learn(run="whole", steps=6))
    stop = at_step(3, comfy.model_management.interrupt_current_processing)
    first = graph(learn(run="cut", steps=6), check=False, on_event=stop)
    assert first.interrupted and "6" not in first.outputs and steps(first) == [1, 2, 3]
    assert (folders / "output" / "counterpoint" / "cut" / "checkpoint.safetensors").exists()
    again = graph(learn(run="cut", steps=6))
    assert steps(again) == [4, 5, 6] or steps(again) == [5, 6], "it stopped within one step"
    assert same(weights(whole), weights(again)) and "6 steps" in again.value("6", 2)


def test_finish_now_gives_what_there_is(pack, graph, learn, every_step):
    finish = pack.nodes.progress.finish

    def on_event(name, data):
        if name == "counterpoint.progress" and data["step"] == 2:
            finish(data["prompt_id"], data["node_id"])

    run = graph(learn(steps=50), on_event=on_event)
    assert steps(run) == [1, 2] and "Finished early, at step 2 of 50, because you asked." in run.value("6", 2)
    assert run.value("6").facts["steps"] == 2 and len(run.value("6", 1)["loss"]) == 2


def test_looking_at_it_changes_nothing(graph, learn):
    seen, unseen = (weights(graph(learn(run=f"every-{every}", look_every=every))) for every in (1, 0))
    assert same(seen, unseen)


def test_one_name_for_two_trainings(graph, learn):
    graph(learn(run="mine"))
    for changed in ({"seed": 1}, {"network": "medium"}):
        run = graph(learn(run="mine", **changed), check=False)
        assert len(run.errors) == 1 and "exists with other settings" in run.errors[0] and "'mine-2'" in run.errors[0]


# Sampling


def test_a_saved_prior_makes_the_same_embeddings(graph, learn, folders):
    run = graph({**learn(), **sampling(count=2), "k": node("CounterpointSavePrior", prior=["6", 0], name="mine")})
    assert run.value("k") == "mine" and (folders / "models" / "clip_priors" / "mine.safetensors").is_file()
    load = {
        "1": node("SmallModelsLoadFamily", family="SD1.5"),
        "6": node("CounterpointLoadPrior", prior="mine.safetensors"),
    }
    again = graph({**load, **sampling(count=2)})
    assert torch.equal(made(run), made(again)) and "5" not in again.executed
    loaded, own = again.value("6"), run.value("6")
    assert (loaded.text, loaded.image, loaded.space, loaded.facts) == (own.text, own.image, own.space, own.facts)
    assert "CLIP: CLIP vision, 32 pixels, 24 numbers" in again.value("6", 1) and "steps: 4" in again.value("6", 1)


def test_seeds_counts_and_the_mean(graph, prior, given):
    base = given_prior(given, prior)
    three, one, other = (graph({**base, **sampling(**i)}) for i in ({"count": 3}, {"seed": 4}, {"seed": 9}))
    x = made(three)
    assert x.shape == (3, 24) and torch.allclose(made(one)[0], x[1], atol=1e-5), "embedding i has the seed 3 + i"
    assert torch.cdist(x, x).fill_diagonal_(9).min() > 1e-3 and not torch.allclose(made(other), x[:1], atol=1e-3)
    mean = three.value("s", 1)
    assert torch.allclose(mean.image_embeds, x.mean(0, keepdim=True)) and mean.space == prior.space
    for embedding in [*three.outputs["s"][0], mean]:
        assert embedding.image_embeds.dtype == torch.float32 and embedding.image_embeds.device.type == "cpu"
    assert torch.equal(made(graph({**base, **sampling(count=3)})), x)


def test_the_best_of_several(graph, pack, given):
    """By the text's own score: never worse with more draws, and another for each seed."""
    base, scores = given_prior(given, small_prior(pack, dim=32)), []
    for n in (1, 2, 8):
        run = graph({**base, **sampling(count=4, best_of=n)})
        text = run_text(run)
        scores.append(F.cosine_similarity(made(run), text))
        assert len(made(run).unique(dim=0)) == 4
    assert (scores[1] >= scores[0] - 1e-5).all() and (scores[2] >= scores[1] - 1e-5).all()
    assert scores[2].mean() > scores[0].mean() + 1e-3


def run_text(run) -> torch.Tensor:
    """(1, d) of the prompt, as core projects it."""
    clip = run.value("1", 1)
    module = clip.cond_stage_model.clip_l
    tokens = clip.tokenizer.clip_l.tokenize_with_weights("a red picture")
    with torch.inference_mode():
        module.set_clip_options({"layer": None, "projected_pooled": True})
        pooled = module.encode([[t for t, _ in tokens[0]]])[1]
        module.reset_clip_options()
    return pooled.float()


def test_variations_of_a_picture(graph, prior, given):
    """At 1 the picture is forgotten, and only then."""
    seen = comfy.clip_vision.Output()
    seen.image_embeds = (prior.start.norm.mean + prior.start.norm.std * torch.linspace(-2, 2, 24))[None]
    base = {**given_prior(given, prior), "p": given("CLIP_VISION_OUTPUT", [seen])}
    little, all_of_it = (made(graph({**base, **sampling(image=["p", 0], variation=v)})) for v in (0.3, 1.0))
    plain = made(graph({**base, **sampling()}))
    assert torch.allclose(all_of_it, plain, atol=1e-3) and not torch.allclose(little, plain, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_weights_say_nearly_the_same(graph, prior, given, dtype):
    """They stay small. A CPU, which is slow with them, computes as if they were not."""
    smaller = copy.deepcopy(prior)
    smaller.network.to(dtype)
    back = replace(smaller, network=copy.deepcopy(smaller.network).float())
    full, half, cast = (made(graph({**given_prior(given, p), **sampling(count=2)})) for p in (prior, smaller, back))
    assert F.cosine_similarity(full, half).min() >= 0.999 and not torch.equal(full, half)
    assert {p.dtype for p in smaller.network.parameters()} == {dtype}
    assert torch.equal(half, cast) or comfy.model_management.get_torch_device().type != "cpu"


def test_nothing_global_changes_and_nothing_stays_loaded(pack, graph, learn):
    network = import_module(f"{pack.__name__}.training.prior.network").PriorNetwork
    state = torch.get_rng_state()
    run = graph({**learn(), **sampling(count=2), "k": node("CounterpointSavePrior", prior=["6", 0], name="mine")})
    assert torch.equal(torch.get_rng_state(), state)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models if m.model is not None]
    assert not any(isinstance(part, network) for model in loaded for part in model.modules())
    assert not comfy.model_management.in_training
    assert {p.device.type for p in run.value("6").network.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in run.value("6").network.parameters())


def test_what_was_made_for_sampling_is_gone_afterwards(pack, graph, given, prior):
    """Here a copy in another precision; a prior may be 2 GB large."""
    network = import_module(f"{pack.__name__}.training.prior.network").PriorNetwork
    smaller = replace(prior, network=copy.deepcopy(prior.network).half())

    def alive() -> list:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is network]

    before = alive()
    graph({**given_prior(given, smaller), **sampling()})
    assert {id(each) for each in alive()} <= {id(each) for each in before}


def test_interrupted_within_one_step(graph, prior, given):
    told = []

    def on_event(name, data):
        if name == "progress" and data["node"] == "s":
            told.append(data["value"])
            comfy.model_management.interrupt_current_processing()

    run = graph({**given_prior(given, prior), **sampling(steps=20)}, check=False, on_event=on_event)
    assert run.interrupted and told == [1]
    assert len(made(graph({**given_prior(given, prior), **sampling(steps=20)}))) == 1, "and works again afterwards"


# Image embeddings


def test_mixed_saved_loaded_and_handed_on(graph, prior, given, folders):
    base = {**given_prior(given, prior), **sampling(), "s2": sampling(prompt="a dark picture", seed=8)["s"]}
    for name, share in (("m0", 0.0), ("m1", 1.0), ("mh", 0.5)):
        base[name] = node("CounterpointMixImageEmbeddings", a=["s", 0], b=["s2", 0], share=share)
    base["w"] = node("CounterpointSaveImageEmbedding", embedding=["mh", 0], name="half")
    base["i"] = node("CounterpointToIpAdapter", embedding=["mh", 0])
    base |= {
        f"v{k}": node("PreviewAny", source=source)
        for k, source in enumerate((["m0", 0], ["m1", 0], ["i", 0], ["i", 1]))
    }
    run = graph(base)
    a, b, half = (run.value(k).image_embeds for k in ("s", "s2", "mh"))
    assert torch.equal(run.value("m0").image_embeds, a) and torch.equal(run.value("m1").image_embeds, b)
    angle = F.cosine_similarity(a, b).acos()
    assert torch.allclose(F.cosine_similarity(half, a).acos(), angle / 2, atol=1e-3)
    assert torch.allclose(F.cosine_similarity(half, b).acos(), angle / 2, atol=1e-3)
    assert torch.allclose(half.norm(), (a.norm() + b.norm()) / 2)
    positive, negative = run.value("i", 0), run.value("i", 1)
    assert torch.equal(positive, half) and positive.shape == (1, 24)
    assert negative.shape == (1, 24) and not negative.any()
    later = graph(
        {
            "l": node("CounterpointLoadImageEmbedding", embedding="half.safetensors"),
            "v": node("PreviewAny", source=["l", 0]),
        }
    )
    loaded = later.value("l")
    assert torch.equal(loaded.image_embeds, half) and (loaded.image, loaded.space) == (prior.image, prior.space)
    assert loaded.facts == {"mixed": 0.5}


def test_a_picture_of_cores_own_is_saved_too(graph, small_models, given, folders):
    whole = {
        "4": given("CLIP_VISION", [small_vision(small_models.builders)]),
        "2": given("IMAGE", pictures(2)),
        "e": node("CLIPVisionEncode", clip_vision=["4", 0], image=["2", 0], crop="center"),
        "w": node("CounterpointSaveImageEmbedding", embedding=["e", 0], name="seen"),
    }
    run = graph(whole)
    assert run.outputs["w"][0] == ["seen", "seen-2"]
    later = graph(
        {
            "l": node("CounterpointLoadImageEmbedding", embedding="seen-2.safetensors"),
            "v": node("PreviewAny", source=["l", 0]),
        }
    )
    assert torch.equal(later.value("l").image_embeds, run.outputs["e"][0][1].image_embeds)
    assert later.value("l").image == ""


def test_pairs_are_read_from_a_folder_and_kept(graph, small_models, given, folders):
    """A picture that is broken is left out with its caption, and only what is new is measured again."""
    place = folders / "input" / "set"
    place.mkdir()
    for i, (picture, caption) in enumerate(zip(pictures(5), captions(5), strict=True)):
        Image.fromarray((picture[0] * 255).byte().numpy()).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption)
    (place / "2.png").write_bytes(b"broken")
    vision = small_vision(small_models.builders)
    whole = {
        "1": node("SmallModelsLoadFamily", family="SD1.5"), "4": given("CLIP_VISION", [vision]),
        "5": node("CounterpointEmbedPairs", clip=["1", 1], clip_vision=["4", 0], images_folder="input/set"),
        "v": node("PreviewAny", source=["5", 1]),
    }  # fmt: skip
    run = graph(whole)
    pairs = run.value("5")
    assert "4 pairs" in run.value("5", 1) and "1 skipped, 2.png" in run.value("5", 1) and len(pairs) == 4
    direct = {
        **whole, "2": given("IMAGE", [p for i, p in enumerate(pictures(5)) if i != 2]),
        "3": given("STRING", [c for i, c in enumerate(captions(5)) if i != 2]),
        "5": node("CounterpointEmbedPairs", clip=["1", 1], clip_vision=["4", 0], images=["2", 0], captions=["3", 0]),
    }  # fmt: skip
    other = graph(direct).value("5")
    assert torch.allclose(pairs.pooled, other.pooled, atol=1e-5)
    assert torch.allclose(pairs.images, other.images, atol=0.05)  # 8 bits
    log = folders / "output" / "counterpoint" / "pairs"
    assert len(list(log.iterdir())) == 2
