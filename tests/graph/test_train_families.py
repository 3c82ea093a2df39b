"""Train Embedding on every family, from pictures to a saved file that core's own prompt syntax finds."""

import pytest
import torch

from harness.training import node, one_sentence, prompt

NAMES = {
    "SD1.5": "SD 1.5",
    "SD2": "SD 2",
    "SDXL": "SDXL",
    "SDXL, v": "SDXL",
    "SD3.5": "SD 3",
    "FLUX.1": "FLUX.1",
    "FLUX.2": "FLUX.2",
    "Z-Image": "Z-Image",
}


def trained(family: str, **inputs) -> dict:
    return {**prompt(**inputs), "1": node("SmallModelsLoadFamily", family=family)}


@pytest.mark.parametrize("family", NAMES)
def test_a_word_is_learned_saved_and_found(graph, small_models, family):
    whole = trained(family, method="paper", steps=3, preview_every=2)
    run = graph({**whole, "6": node("CounterpointSaveEmbedding", embedding=["4", 0], name="my-word")})
    keys = small_models.families.FAMILIES[family].keys
    assert run.value("4").vectors.keys() == set(keys)
    assert all(v.shape == (2, 32) and v.isfinite().all() for v in run.value("4").vectors.values())
    assert f"paper on {NAMES[family]}, 3 steps on 3 pictures at 64" in run.value("4", 2)
    assert ("experimental" in run.value("4", 2)) == (family == "FLUX.1")
    texts = {"a": "a cat embedding:my-word", "b": "a cat", "c": "a cat embedding:never-saved"}
    said = graph({
        "1": whole["1"],
        **{k: node("CLIPTextEncode", clip=["1", 1], text=text) for k, text in texts.items()},
        **{f"{k}s": node("EmptyLatentImage", width=64, height=64, batch_size=1) for k in texts},
        **{f"{k}p": node("KSampler", model=["1", 0], positive=[k, 0], negative=["b", 0], latent_image=[f"{k}s", 0], seed=1, steps=2, cfg=3.0,
                         sampler_name="euler", scheduler="normal", denoise=1.0) for k in texts},
        **{f"{k}v": node("SaveLatent", samples=[f"{k}p", 0], filename_prefix=k) for k in texts},
    })  # fmt: skip
    pictures = {k: said.value(f"{k}p")["samples"] for k in texts}
    assert not torch.equal(pictures["a"], pictures["b"]) and not torch.equal(pictures["a"], pictures["c"])
    # Behind a word core puts blanks for line breaks, of which the template around prompts for FLUX.2 and Z-Image has some.
    assert torch.equal(pictures["b"], pictures["c"]) == ("qwen3_4b" not in keys)


def test_what_is_left_to_the_model_is_said(graph):
    """SDXL at its own size would take minutes here; the size is given, the rest is the family's."""
    run = graph(
        trained("SDXL", method="plain", negatives=None, steps=0, vectors=0, learning_rate=0.0),
        check=False,
        on_event=stop_early(),
    )
    assert run.errors == [] and "on SDXL" in run.value("4", 2) and "4 vectors" in run.value("4", 2)
    assert "for clip_l" in run.value("4", 2) and "for clip_g" in run.value("4", 2) and "of 1000" in run.value("4", 2)
    assert {v.shape for v in vectors_of(run)} == {(4, 32)}


def vectors_of(run) -> list[torch.Tensor]:
    return list(run.value("4").vectors.values())


def stop_early():
    """Finish now, at the third step."""

    def on_event(name, data):
        if name == "counterpoint.progress" and data["step"] >= 3:
            from counterpoint.nodes import progress

            progress.finish(data["prompt_id"], data["node_id"])

    return on_event


def test_the_rate_goes_with_the_size_of_an_encoders_words(bridge_of, small_models):
    """Words ten times as large get a rate ten times as large."""
    bridge, families = bridge_of, small_models.families.FAMILIES
    with torch.inference_mode():
        clip = families["SDXL"].clip()
        before = bridge.own_learning_rates(clip)
        bridge.encoder_module(clip, "clip_g").transformer.get_input_embeddings().weight.mul_(10)
    after = bridge.own_learning_rates(clip)
    assert after["clip_l"] == before["clip_l"] and after["clip_g"] == pytest.approx(10 * before["clip_g"], rel=0.01)


@pytest.fixture
def bridge_of(pack):
    return pack.nodes.bridge


def test_pockets_own_rate_is_the_measured_one(pack):
    assert pack.nodes.bridge.own_learning_rates(pack.nodes.pocket_models.load_clip()) == {"clip_l": 0.02}


def test_a_vae_of_another_family(graph):
    whole = trained("FLUX.1", method="plain", negatives=None, steps=2)
    whole["7"] = node("SmallModelsLoadSD15")
    whole["4"]["inputs"]["vae"] = ["7", 2]
    one_sentence(
        graph(whole, check=False), "MODEL and VAE do not belong together", "16 channels", "gives 4", "same checkpoint"
    )


@pytest.mark.parametrize("family, other", [("SDXL", "SD1.5"), ("SD3.5", "SDXL"), ("FLUX.1", "SDXL")])
def test_a_clip_of_another_family(graph, family, other):
    whole = trained(family, method="plain", negatives=None, steps=2)
    whole["7"] = node("SmallModelsLoadFamily", family=other)
    whole["4"]["inputs"]["clip"] = ["7", 1]
    one_sentence(graph(whole, check=False), "MODEL and CLIP do not belong together", "same checkpoint")


def test_a_word_for_qwen_image_is_refused_in_one_sentence(graph):
    """Core's tokenizer of its prompts takes no vectors."""
    whole = trained("Qwen-Image", method="plain", negatives=None, steps=2)
    one_sentence(graph(whole, check=False), "no encoder that takes learned words", "use Train Style LoRA")
