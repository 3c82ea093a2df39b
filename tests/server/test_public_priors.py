"""Graph 23 with a public branch switched on: the files that it names, small and made here, through the nodes that real ones go through."""

import json
from functools import partial
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import folder_paths
import nodes
import pytest
import torch
from comfy.supported_models_base import ClipTarget
from safetensors.torch import save_file
from test_own_checkpoint import Saved

PROCESS = {"_class_name": "UnCLIPScheduler", "clip_sample": True, "num_train_timesteps": 1000, "prediction_type": "sample",
           "variance_type": "fixed_small_log"}  # fmt: skip
SMALLER = {
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
    "CounterpointSamplePrior": {"steps": 3},
}


@torch.no_grad()
def prior_of(dim: int):
    """diffusers' module with every tensor drawn: narrow and shallow, with as many numbers in and out as the real one."""
    from diffusers import PriorTransformer

    model = PriorTransformer(embedding_dim=dim, num_attention_heads=2, attention_head_dim=64, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + ("norm" in name))
    model.clip_std.copy_(torch.rand(model.clip_std.shape, generator=generator) + 0.1)
    return model


def pipeline(folder: Path, dim: int, scheduler: str, clamp: float) -> None:
    """The folders of a prior and its scheduler, as diffusers saves them."""
    prior_of(dim).save_pretrained(folder / "prior")
    (folder / scheduler).mkdir()
    (folder / scheduler / "scheduler_config.json").write_text(json.dumps({**PROCESS, "clip_sample_range": clamp}))


def eclipse(folder: Path) -> None:
    """Weights without time, and config.json."""
    model = prior_of(1280)
    model.save_config(folder)
    state = {k: v.clone() for k, v in model.state_dict().items() if "time_embedding" not in k}
    state["positional_embedding"] = state["positional_embedding"][:, :80].clone()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def small(small_models):
    """Small models of the two families, with encoders of three layers whose texts are as wide as the prior reads them."""
    builders, families = small_models.builders, small_models.families

    class SmallUnclipL(comfy.supported_models.SD21UnclipL):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    def text(kind: str, width: int, tokenizer, network):
        wide = {
            "hidden_size": width,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "projection_dim": width,
        }
        options = {**families.CLIP_OPTIONS, f"clip_{kind}_model_config": wide}
        clip = comfy.sd.CLIP(ClipTarget(tokenizer, network), model_options=options)
        builders.draw_weights(clip.cond_stage_model, 0)
        return clip

    def sdxl() -> dict[str, tuple]:
        unet = {**families.SDXL_UNET, "context_dim": families.WIDTH + 1280, "adm_in_channels": 1280 + 6 * 256}
        clip = text("g", 1280, comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
        return {"CheckpointLoaderSimple": (families._model(families.SmallSDXL, unet, {}), clip, builders.sd15_vae())}

    def unclip() -> dict[str, tuple]:
        unet = {**families.SDXL_UNET, "context_dim": families.WIDTH, "adm_in_channels": 2 * 768}
        model, clip = families._model(SmallUnclipL, unet, {}), families.FAMILIES["SD2"].clip()
        karlos = text("l", 768, comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        return {"unCLIPCheckpointLoader": (model, clip, builders.sd15_vae(), None), "CLIPLoader": (karlos,)}

    return {"SDXL": sdxl, "SD 2.1 unCLIP-L": unclip}


@pytest.fixture
def loaded(folders, monkeypatch):
    """`loaded(models)`: a loader of core gives the models that stand under its name, once the file that it is asked for exists."""

    def loaded(models: dict[str, tuple], prompt: dict) -> None:
        for kind, outputs in models.items():
            loader = nodes.NODE_CLASS_MAPPINGS[kind]
            monkeypatch.setattr(loader, loader.FUNCTION, lambda self, outputs=outputs, **asked: outputs)
            (asked,) = (n["inputs"] for n in prompt.values() if n["class_type"] == kind)
            folder = "text_encoders" if "clip_name" in asked else "checkpoints"
            place = Path(folder_paths.get_folder_paths(folder)[0]) / next(
                v for k, v in asked.items() if k.endswith("_name")
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()

    return loaded


@pytest.mark.parametrize(
    ("group", "painter", "fetched", "title", "dim", "says"),
    [
        ("2.", "SDXL", partial(pipeline, dim=1280, scheduler="scheduler", clamp=10), "Kandinsky 2.2 or ECLIPSE", 1280, "family: Kandinsky 2.2"),
        ("2.", "SDXL", eclipse, "Kandinsky 2.2 or ECLIPSE", 1280, "family: ECLIPSE"),
        ("3.", "SD 2.1 unCLIP-L", partial(pipeline, dim=768, scheduler="prior_scheduler", clamp=5), "Karlo", 768, "family: Karlo"),
    ],
    ids=["Kandinsky 2.2", "ECLIPSE", "Karlo"],
)  # fmt: skip
def test_a_public_prior_paints(
    group, painter, fetched, title, dim, says, small, loaded, server, graph, folders, tmp_path
):
    saved = Saved("23")
    for node in saved.graph["nodes"]:
        node["mode"] = 2
    saved.switch_on(group)
    prior, embedding, sampler = (saved.titled(t) for t in (title, f"An embedding for {painter}", f"{painter} paints"))
    fetched(folders / "models" / "clip_priors" / prior["widgets_values"][0])
    prompt = saved.prompt(tmp_path, server.url)
    loaded(small[painter](), prompt)
    for node in prompt.values():
        node["inputs"] |= SMALLER.get(node["class_type"], {})
    run = graph(prompt)
    (made,), latents = run.outputs[str(embedding["id"])][0], run.value(str(sampler["id"]))["samples"]
    assert made.image_embeds.shape == (1, dim) and made.image_embeds.isfinite().all()
    assert says in run.value(str(prior["id"]), 1) and latents.isfinite().all() and latents.std() > 0
    prompt[str(embedding["id"])]["inputs"]["prompt"] = "something else"
    assert not graph(prompt).value(str(sampler["id"]))["samples"].equal(latents), "it paints from the embedding"
