"""Image tokens in whole prompts: trained, put into a prompt, painted from, saved and loaded, with core's own nodes around them."""

import comfy.clip_vision
import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.small_nets import numbers
from harness.training import at_step, node, one_sentence, steps

FAMILIES = ("SD1.5", "SD2", "SDXL")
SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_act": "quick_gelu",
                "num_channels": 3, "patch_size": 16, "image_size": 32, "projection_dim": 24, "model_type": "clip_vision_model"}  # fmt: skip


@pytest.fixture
def vision(small_models, given):
    """A node that gives a small CLIP_VISION of 24 numbers; others by name."""

    def vision(seed: int = 0, **config):
        made = comfy.clip_vision.ClipVisionModel({**SMALL_VISION, **config})
        small_models.builders.draw_weights(made.model, seed)
        return given("CLIP_VISION", [made])

    return vision


def training(vision: dict, family: str = "SD1.5", **inputs) -> dict[str, dict]:
    """1 models, 2 three pictures, 3 CLIP_VISION, 4 training, 5 the loss plot."""
    wanted = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "clip_vision": ["3", 0], "images": ["2", 0], "size": 64, "steps": 4,
        "batch": 2, "preview_every": 2, "snapshot_every": 2, "rank": 2, "tokens": 3, "learning_rate": 0.01, "empty": 0.3, **inputs,
    }  # fmt: skip
    return {
        "1": node("SmallModelsLoadFamily", family=family),
        "2": node("CounterpointPocketPictures", count=3, style="comic"),
        "3": vision,
        "4": node("CounterpointTrainImageTokens", **wanted),
        "5": node("LossGraphNode", loss=["4", 1]),
    }


def painting(tokens: list, **inputs) -> dict[str, dict]:
    """o another picture, e its embedding, t the prompt, a Apply Image Tokens, l core's loader, p what KSampler paints."""
    wanted = {"positive": ["t", 0], "image_tokens": tokens, "clip_vision_output": ["e", 0], **inputs}
    return {
        "o": node("CounterpointPocketPictures", count=1, style="photo", seed=5),
        "e": node("CLIPVisionEncode", clip_vision=["3", 0], image=["o", 0], crop="center"),
        "t": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "a": node("CounterpointApplyImageTokens", **wanted),
        "l": node("LoraModelLoader", model=["1", 0], lora=["a", 2], strength_model=1.0, bypass=False),
        "n": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "p": node("KSampler", model=["l", 0], positive=["a", 0], negative=["a", 1], latent_image=["n", 0], seed=1, steps=2, cfg=2.0,
                  sampler_name="euler", scheduler="normal", denoise=1.0),
        "s": node("SaveLatent", samples=["p", 0], filename_prefix="x"),
    }  # fmt: skip


def prompt_of(run, id: str = "a", slot: int = 0) -> tuple[torch.Tensor, dict]:
    ((states, facts),) = run.value(id, slot)
    return states, facts


@pytest.fixture
def file(pack, folders):
    """A file of image tokens for SD1.5's 32 numbers, trained on a CLIP_VISION of 24: `file(name, rank, **facts)`."""
    training = pack.training

    def file(name: str = "some", width: int = 32, **facts):
        import importlib

        it = importlib.import_module(f"{training.__name__}.image_tokens")
        empty = training.protocols.Conditioning(numbers(1, 77, width), numbers(1, width, seed=2))
        learned = {k: v + 0.1 for k, v in it.starting_projection(24, 3, width, 1).items()}
        made = it.Projector.of(learned, it.moments(numbers(5, 24, seed=3)), empty, name, {}, facts)
        place = folders / "models" / "image_tokens"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.safetensors").write_bytes(it.to_bytes(made))
        folder_paths.filename_list_cache.clear()
        return made

    return file


def loaded(vision: dict, name: str = "some.safetensors", **inputs) -> dict[str, dict]:
    return {
        "1": node("SmallModelsLoadFamily", family="SD1.5"), "3": vision, "4": node("CounterpointLoadImageTokens", image_tokens=name),
        **painting(["4", 0], **inputs),
    }  # fmt: skip


# The whole way


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_painted_from_saved_and_loaded(graph, folders, vision, family):
    seen = vision()
    whole = {
        **training(seen, family),
        **painting(["4", 0]),
        "k": node("CounterpointSaveImageTokens", image_tokens=["4", 0], name="mine"),
    }
    run = graph(whole)
    made, width = run.value("4"), {"SDXL": 64}.get(family, 32)
    assert (made.dim, made.count, made.width) == (24, 3, width) and run.value("k") == "mine"
    report = run.value("4", 2)
    assert (
        "4 steps on 3 pictures at 64, each with its own embedding of 24 numbers, 3 tokens, " in report
        and "layers of rank 2" in report
    )
    assert (
        steps(run)[-1] == 4
        and len([p for p in run.sent("preview") if p[1]["node_id"] == "4"]) == 1
        and len(run.value("4", 1)["loss"]) == 4
    )
    states, facts = prompt_of(run)
    ((text, before),) = run.value("t")
    assert (
        states.shape == (1, 77 + 3, width)
        and states[:, :77].equal(text)
        and facts["pooled_output"].equal(before["pooled_output"])
    )
    assert prompt_of(run, slot=1)[0][:, :77].equal(made.tensors["empty.states"][None]), (
        "without a negative: the empty prompt"
    )
    layers = {key.rpartition(".lora_")[0] for key in run.value("a", 2) if ".lora_" in key}
    assert layers and all(layer.startswith("diffusion_model.") and ".attn2." in layer for layer in layers)
    assert len(run.value("l").patches) == len(layers), "core's loader knows every layer"
    later = graph(
        {
            "1": whole["1"],
            "3": seen,
            "4": node("CounterpointLoadImageTokens", image_tokens="mine.safetensors"),
            **painting(["4", 0]),
        }
    )
    assert all(torch.equal(later.value("4").tensors[k], t) for k, t in made.tensors.items())
    assert (prompt_of(later)[0] - states).abs().max() <= 1e-5 * states.abs().max()
    assert torch.allclose(later.value("p")["samples"], run.value("p")["samples"], rtol=1e-3, atol=1e-3)
    other = graph({**whole, "o": node("CounterpointPocketPictures", count=1, style="comic", seed=9)})
    assert not torch.equal(other.value("p")["samples"], run.value("p")["samples"])


def test_pocket_learns_tokens_alone(graph):
    whole = training({}, size=128, steps=2, rank=0, preview_every=0, empty=0.0)
    whole |= {"1": node("CounterpointLoadPocketModels"), **painting(["4", 0])}
    whole["4"]["inputs"]["clip_vision"] = whole["e"]["inputs"]["clip_vision"] = ["1", 3]
    del whole["3"]
    run = graph(whole)
    assert "plain on Pocket, 2 steps" in run.value(
        "4", 2
    ) and "null was not learned: no picture was left out" in run.value("4", 2)
    assert run.value("a", 2) == {} and not run.value("l").patches and run.value("p")["samples"].isfinite().all()


def test_stopped_and_run_again_it_goes_on_to_the_same_end(graph, every_step, vision):
    seen, unlooked = vision(), {"mirror": True, "preview_every": 0, "steps": 12}
    whole = graph(training(seen, run="whole", mirror=True, steps=12)).value("4")
    first = graph(training(seen, run="cut", **unlooked), check=False,
                  on_event=at_step(2, comfy.model_management.interrupt_current_processing))  # fmt: skip
    assert "4" not in first.outputs
    again = graph(training(seen, run="cut", **unlooked))
    assert 3 <= steps(again)[0] <= 12, "and looking at it changed nothing"
    both = [{**made.tensors, **made.lora} for made in (whole, again.value("4"))]
    assert all(torch.equal(both[0][k], both[1][k]) for k in both[0])
    done = graph(training(seen, run="whole", mirror=True, steps=12))
    assert done.value("4", 2).endswith("taken from disk.") and done.value("4").tensors["null"].equal(both[0]["null"])
    snapshot = {"1": node("CounterpointLoadImageTokens", image_tokens="run: whole/snapshots/step-000012.safetensors")}
    last = graph({**snapshot, "2": node("PreviewAny", source=["1", 0])}).value("1")
    assert all(torch.equal(last.tensors[k], both[0][k]) for k in last.tensors) and last.lora.keys() == whole.lora.keys()
    lean = graph(training(seen, run="lean", memory="lean", **unlooked)).value("4")
    away = (lean.tensors["proj.weight"] - both[0]["proj.weight"]).abs().mean()
    assert away < 5e-4, "checkpointed it is the same, where a step moves each number by 1e-2"


# In a prompt


def test_strength_nothing_changes_nothing(graph, vision, file):
    file()
    run = graph(loaded(vision(), strength=0.0, negative=["t", 0]))
    ((text, facts),) = run.value("t")
    for slot in (0, 1):
        states, kept = prompt_of(run, slot=slot)
        assert states.equal(text) and kept["pooled_output"].equal(facts["pooled_output"])
    assert run.value("a", 2) == {}


def test_text_is_turned_down_to_the_prompt_of_training(graph, vision, file):
    made = file()
    run = graph(loaded(vision(), text_weight=0.0))
    states, facts = prompt_of(run)
    assert states[:, :77].equal(made.tensors["empty.states"][None]) and facts["pooled_output"].equal(
        made.tensors["empty.pooled"][None]
    )
    assert not states[:, 77:].equal(prompt_of(run, slot=1)[0][:, 77:])


def test_areas_and_other_tokens_stay(graph, vision, file):
    """Twice in a row: the first picture's tokens stand before the second's, and turning the text down leaves them."""
    file()
    whole = loaded(vision(), positive=["r", 0])
    whole["r"] = node("ConditioningSetArea", conditioning=["t", 0], width=64, height=64, x=0, y=0, strength=0.7)
    whole["a2"] = node("CounterpointApplyImageTokens", positive=["a", 0], image_tokens=["4", 0], clip_vision_output=["e", 0],
                       text_weight=0.5, negative=["a", 1])  # fmt: skip
    whole["p"]["inputs"] |= {"positive": ["a2", 0], "negative": ["a2", 1]}
    run = graph(whole)
    once, (twice, facts) = prompt_of(run)[0], prompt_of(run, "a2")
    assert facts["area"] == (8, 8, 0, 0) and facts["strength"] == 0.7
    assert twice.shape[1] == 77 + 6 and twice[:, 77:80].equal(once[:, 77:]) and twice[:, 80:].equal(once[:, 77:])
    assert run.value("p")["samples"].isfinite().all()


def test_guidance_may_be_off_or_below_one(graph, vision, file):
    """At CFG 1 the tokens for nothing are not asked, so what is painted does not depend on them; below 1 it still is a picture."""
    file()
    whole, made = loaded(vision()), {}
    for cfg in (1.0, 0.5):
        whole["p"]["inputs"]["cfg"] = cfg
        made[cfg] = graph(whole).value("p")["samples"]
        assert made[cfg].isfinite().all()
    assert not torch.equal(made[1.0], made[0.5])
    whole["p"]["inputs"] |= {"cfg": 1.0, "negative": ["t", 0]}
    assert torch.equal(graph(whole).value("p")["samples"], made[1.0])


def test_pictures_of_a_batch_have_rows_of_their_own(graph, vision, file, given):
    """Two embeddings at once are painted as each by itself."""
    file()
    seen, pictures = vision(), torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    together = {
        **loaded(seen),
        "o": given("IMAGE", [pictures]),
        "n": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    }
    run = graph(together)
    states, latents = prompt_of(run)[0], run.value("p")["samples"]
    assert states.shape[0] == 2 and states[0, :77].equal(states[1, :77])
    for i in range(2):
        alone = graph({**loaded(seen), "o": given("IMAGE", [pictures[i : i + 1]])})
        assert torch.allclose(prompt_of(alone)[0][0], states[i], atol=1e-5)
        if i == 0:  # the second has the second picture's noise
            assert torch.allclose(alone.value("p")["samples"][0], latents[0], atol=1e-3)
    assert not torch.allclose(states[0, 77:], states[1, 77:], atol=1e-3)


# Bad input


@pytest.mark.parametrize("family", ["SD3.5", "FLUX.1"])
def test_models_that_were_not_tried_are_refused_by_name(graph, vision, family):
    names = {"SD3.5": "SD3", "FLUX.1": "Flux"}
    one_sentence(
        graph(training(vision(), family), check=False),
        f"cannot be trained for {names[family]}",
        "use SD 1.5, SD 2, SDXL",
    )


def test_models_that_do_not_belong_together(graph, vision):
    whole = {**training(vision(), "SDXL"), "7": node("SmallModelsLoadFamily", family="SD1.5")}
    whole["4"]["inputs"]["clip"] = ["7", 1]
    one_sentence(graph(whole, check=False), "MODEL and CLIP do not belong together")


def test_no_pictures(graph, vision, given):
    whole = {**training(vision()), "2": given("IMAGE", [])}
    one_sentence(graph(whole, check=False), "There are no pictures to learn from", "connect")


@pytest.mark.parametrize("config, facts, words", [
    ({"projection_dim": 20}, {}, ("(20 numbers)", "(24 numbers)", "were trained with (another)")),
    ({}, {"clip_vision": "ffff", "clip_vision_name": "CLIP vision, 224 pixels"}, ("different encoders", "(CLIP vision, 224 pixels)")),
])  # fmt: skip
def test_an_embedding_of_another_encoder(graph, vision, file, given, pack, config, facts, words):
    file(**facts)
    whole = loaded(vision(**config))
    if facts:  # Sample Prior's say where they come from; core's do not
        output = comfy.clip_vision.Output()
        output.image_embeds, output.image = torch.zeros(1, 24), "0000"
        whole["e"] = given("CLIP_VISION_OUTPUT", [output])
    one_sentence(graph(whole, check=False), *words)


def test_tokens_for_another_model(graph, vision, file):
    file("wide", width=48)
    one_sentence(
        graph(loaded(vision(), "wide.safetensors"), check=False),
        "have 48 numbers each and the conditioning has 32",
        "another kind of model",
    )


def test_an_encoder_of_patches_is_pooled_as_in_training(graph, vision):
    """SigLIP gives a vector for each patch; the mean of them is taken, there and here."""
    seen = vision(model_type="siglip_vision_model", projection_dim=32)
    whole = {
        **training(seen, rank=0, steps=2, preview_every=0),
        **painting(["4", 0]),
        "o": node("CounterpointPocketPictures", count=3, style="comic"),
    }
    run = graph(whole)
    made, embeds = run.value("4"), [e.image_embeds for (e,) in [run.outputs["e"][0][i : i + 1] for i in range(3)]]
    assert all(e.ndim == 3 for e in embeds) and made.dim == 32
    assert torch.allclose(torch.cat([e.mean(1) for e in embeds]).mean(0), made.tensors["embedding.mean"], atol=1e-5)


# Files


def test_nothing_is_overwritten(graph, folders, file):
    first, second = file("some", steps=1), file("some", steps=2)
    assert first.facts != second.facts
    load = {"4": node("CounterpointLoadImageTokens", image_tokens="some.safetensors")}

    def save(name: str, check: bool = True):
        return graph({**load, "k": node("CounterpointSaveImageTokens", image_tokens=["4", 0], name=name)}, check=check)

    assert [save("some").value("k"), save("new").value("k"), save("new").value("k")] == ["some", "new", "new"]
    file("some", steps=3)
    assert save("new").value("k") == "new-2"
    assert sorted(f.name for f in (folders / "models" / "image_tokens").iterdir()) == [
        "new-2.safetensors",
        "new.safetensors",
        "some.safetensors",
    ]
    assert load_file(folders / "models" / "image_tokens" / "new.safetensors").keys() == first.tensors.keys()
    one_sentence(save("../out", check=False), "cannot be used", "for example")


def test_a_file_of_something_else(graph, folders, file):
    file()
    save_file({"clip_l": torch.zeros(1, 4)}, folders / "models" / "image_tokens" / "word.safetensors")
    folder_paths.filename_list_cache.clear()
    bad = {
        "4": node("CounterpointLoadImageTokens", image_tokens="word.safetensors"),
        "5": node("PreviewAny", source=["4", 0]),
    }
    one_sentence(
        graph(bad, check=False), "word.safetensors holds no image tokens (proj.weight is missing)", "choose a file"
    )
