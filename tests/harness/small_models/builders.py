"""Small models of real structure: ComfyUI's own classes at small widths, weights drawn from a seed."""

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.supported_models_base import ClipTarget

WIDTH = 32  # of every layer: the smallest that GroupNorm's 32 groups allow

SD15_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "use_spatial_transformer": True,
    "context_dim": WIDTH,
    "use_checkpoint": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
CLIP_TEXT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * WIDTH}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": WIDTH,
    "ch_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class SmallSD15(comfy.supported_models.SD15):
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}


def draw_weights(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter a value: ComfyUI's layers leave theirs uninitialised because a checkpoint follows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim <= 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                scale = 0.08 if "embedding" in name else weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return module


def sd15_model(seed: int = 0, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of SD1.5's structure: two resolutions, attention in both."""
    config = SmallSD15(SD15_UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=mm.unet_offload_device())
    draw_weights(model.diffusion_model, seed)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = (sd15_model, (seed,))  # ComfyUI makes private copies by loading again
    return patcher


def sd15_clip(seed: int = 0, embedding_directory: str | list[str] | None = None) -> comfy.sd.CLIP:
    """A CLIP with SD1.5's tokenizer of 49408 words and a text model of two layers."""
    target = ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"clip_l_model_config": CLIP_TEXT, "dtype": torch.float32}
    clip = comfy.sd.CLIP(target, embedding_directory=embedding_directory, model_options=options)
    draw_weights(clip.cond_stage_model, seed)
    clip.tokenizer.clip_l.embedding_size = WIDTH
    return clip


def sd15_vae(seed: int = 0, channels: int = 4) -> comfy.sd.VAE:
    """A VAE of SD1.5's structure: 8 pixels to a latent, 4 channels; 16 as SD3's and FLUX.1's."""
    part = {**VAE, "z_channels": channels}
    config = {"ddconfig": part, "embed_dim": channels}
    weights = draw_weights(AutoencoderKL(ddconfig=dict(part), embed_dim=channels), seed).state_dict()
    return comfy.sd.VAE(sd=weights, config={"params": config}, dtype=torch.float32)


def flux2_vae(seed: int = 0) -> comfy.sd.VAE:
    """A VAE of FLUX.2's structure: four latents of 32 channels are one of 128, so 16 pixels to a latent."""
    part = {**VAE, "z_channels": 32, "batch_norm_latent": True}
    weights = draw_weights(AutoencoderKL(ddconfig=dict(part), embed_dim=32), seed).state_dict()
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": part, "embed_dim": 32}}, dtype=torch.float32)
    vae.downscale_ratio, vae.upscale_ratio, vae.latent_channels = (
        16,
        16,
        128,
    )  # as core sets them for a file at full width
    return vae
