"""Train Style LoRA in whole prompts, with core's own nodes to use and to keep what it makes."""

import pytest
import torch
from safetensors.torch import load_file

from harness.training import at_step, node, one_sentence, steps

NAMES = ("SD1.5", "SDXL", "SD3.5", "FLUX.1", "FLUX.2", "Qwen-Image", "Z-Image")


def prompt(family: str = "SD1.5", **inputs) -> dict[str, dict]:
    """1 models, 2 three pictures, 3 three negatives, 4 training, 5 painting with the LoRA, 6 and without it."""
    given = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "captions": ["2", 1], "negatives": ["3", 0],
        "method": "reference point", "size": 64, "steps": 4, "batch": 2, "preview_every": 2, "rank": 2, "learning_rate": 0.01, **inputs,
    }  # fmt: skip
    pictures = {"count": 3, "captions": "content"}
    return {
        "1": node("SmallModelsLoadFamily", family=family),
        "2": node("CounterpointPocketPictures", **pictures, style="comic"),
        "3": node("CounterpointPocketPictures", **pictures, style="photo", seed=2),
        "4": node("CounterpointTrainStyleLora", **{k: v for k, v in given.items() if v is not None}),
        "5": node("LossGraphNode", loss=["4", 1]),
    }


def painting(lora: list | None) -> dict[str, dict]:
    """Core's nodes; `p` is what they paint."""
    paint = node("KSampler", model=["l", 0] if lora else ["1", 0], positive=["t", 0], negative=["t", 0], latent_image=["e", 0], seed=1,
                 steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)  # fmt: skip
    load = {"l": node("LoraModelLoader", model=["1", 0], lora=lora, strength_model=1.0, bypass=False)} if lora else {}
    return {
        **load,
        "t": node("CLIPTextEncode", clip=["1", 1], text="a picture"),
        "e": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "p": paint,
        "s": node("SaveLatent", samples=["p", 0], filename_prefix="x"),
    }


@pytest.mark.parametrize("family", NAMES)
def test_a_style_is_learned_used_and_kept(graph, folders, family):
    whole = prompt(family)
    run = graph({**whole, **painting(["4", 0]), "k": node("SaveLoRA", lora=["4", 0], prefix="loras/mine")})
    assert "reference point on" in run.value("4", 2) and "4 steps on 3 pictures at 64" in run.value("4", 2)
    assert "layers of rank 2, learning rate 0.01, trigger 'picture'" in run.value("4", 2)
    plain = graph({"1": whole["1"], **painting(None)})
    with_lora, without = (r.value("p")["samples"] for r in (run, plain))
    assert with_lora.isfinite().all() and not torch.equal(with_lora, without)
    (file,) = (folders / "output" / "loras").glob("mine*.safetensors")
    assert load_file(file).keys() == run.value("4").keys()
    assert all(key.startswith("diffusion_model.") for key in run.value("4"))


def test_masks_cover_latents_of_films_too(graph, given):
    """Qwen-Image's have a dimension more. White is no mask at all, and half of it is another training."""
    learned = {}
    for name, white in (("none", None), ("whole", 64), ("left", 32)):
        masks = torch.zeros(1, 64, 64)
        masks[:, :, : white or 0] = 1
        whole = prompt("Qwen-Image", steps=3, preview_every=0, captions=None, masks=["6", 0] if white else None)
        pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(3))
        whole |= {"2": given("IMAGE", [pictures]), **({"6": given("MASK", [masks])} if white else {})}
        learned[name] = graph(whole).value("4")
    assert all(torch.equal(learned["none"][k], learned["whole"][k]) for k in learned["none"])
    assert not all(torch.equal(learned["none"][k], learned["left"][k]) for k in learned["none"])


def test_pocket_can_be_taught(graph):
    whole = {**prompt(size=128, steps=3), "1": node("CounterpointLoadPocketModels")}
    run = graph({**whole, **painting(["4", 0])})
    assert "on Pocket" in run.value("4", 2)


def test_stopped_and_run_again_it_goes_on_to_the_same_end(graph, folders):
    import comfy.model_management

    whole = graph(prompt(run="whole", steps=6, snapshot_every=3))
    first = graph(prompt(run="cut", steps=6, snapshot_every=3), check=False,
                  on_event=at_step(3, comfy.model_management.interrupt_current_processing))  # fmt: skip
    assert "4" not in first.outputs
    again = graph(prompt(run="cut", steps=6, snapshot_every=3))
    assert steps(again)[0] == 4 or steps(again)[0] == 5
    assert all(torch.equal(whole.value("4")[k], again.value("4")[k]) for k in whole.value("4"))
    snapshot = load_file(folders / "output" / "counterpoint" / "whole" / "snapshots" / "step-000003.safetensors")
    assert snapshot.keys() == whole.value("4").keys()
    assert graph(prompt(run="whole", steps=6, snapshot_every=3)).value("4", 2).endswith("taken from disk.")


def test_strength_nothing_is_plain_bit_for_bit(graph):
    plain = graph(prompt(method="plain", caption_use="template", negatives=None)).value("4")
    nothing = graph(prompt(method="paper", strength=0.0, caption_use="template")).value("4")
    contrast = graph(prompt(method="paper", caption_use="template")).value("4")
    assert all(torch.equal(plain[k], nothing[k]) for k in plain)
    assert not all(torch.equal(plain[k], contrast[k]) for k in plain)


@pytest.mark.parametrize("changed, words", [
    ({"negatives": None}, ("needs 1 negative for each picture", "choose 'plain'")),
    ({"captions": None, "caption_use": "caption"}, ("0 captions for 3 pictures", "give 1 each")),
    ({"run": "../out"}, ("would leave ComfyUI's output folder",)),
])  # fmt: skip
def test_bad_input_is_one_clear_sentence(graph, changed, words):
    one_sentence(graph(prompt(**changed), check=False), *words)


@pytest.mark.parametrize(
    "family, other", [("SDXL", "SD1.5"), ("FLUX.2", "Z-Image"), ("Qwen-Image", "SDXL"), ("Z-Image", "SDXL")]
)
def test_a_clip_of_another_family(graph, family, other):
    whole = {**prompt(family), "7": node("SmallModelsLoadFamily", family=other)}
    whole["4"]["inputs"]["clip"] = ["7", 1]
    one_sentence(graph(whole, check=False), "MODEL and CLIP do not belong together", "same checkpoint")


def test_looking_at_it_changes_nothing(graph):
    seen, unseen = (graph(prompt(preview_every=every, steps=5, run=f"every-{every}")).value("4") for every in (1, 0))
    assert all(torch.equal(seen[k], unseen[k]) for k in seen)
