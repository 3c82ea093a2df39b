"""Small models of the other families: ComfyUI's own classes at small widths, weights drawn from a seed.

Each has its family's text encoders, parameterisation and latent format; widths that ComfyUI fixes in code (the 4096 to which
SD3 pads its text, CLIP's 49408 words) stay as they are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import torch
from comfy import sdxl_clip
from comfy.supported_models_base import ClipTarget

from .builders import CLIP_TEXT, SD15_UNET, WIDTH, draw_weights, sd15_clip, sd15_model

SDXL_UNET = {**SD15_UNET, "context_dim": 2 * WIDTH, "adm_in_channels": WIDTH + 6 * 256, "num_classes": "sequential",
             "use_linear_in_transformer": True}  # fmt: skip
MMDIT = {"in_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 2, "input_size": None, "num_patches": 256, "pos_embed_max_size": 16,
         "adm_in_channels": 2 * WIDTH, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
         "qk_norm": "rms", "x_block_self_attn_layers": [0], "pos_embed_scaling_factor": None}  # fmt: skip
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH, "hidden_size": 64,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}  # fmt: skip
T5 = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 16, "num_heads": 2, "num_layers": 2}
CLIP_TEXT_DEEP = {**CLIP_TEXT, "num_hidden_layers": 3}  # most families read the last layer but one
CLIP_OPTIONS = {
    "dtype": torch.float32, "clip_l_model_config": CLIP_TEXT_DEEP, "clip_g_model_config": {**CLIP_TEXT_DEEP, "projection_dim": WIDTH},
    "clip_h_model_config": CLIP_TEXT_DEEP, "t5xxl_model_config": T5,
}  # fmt: skip


class SmallSD20(comfy.supported_models.SD20):
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}


class SmallSDXL(comfy.supported_models.SDXL):
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}


class Family(NamedTuple):
    """How a family's small MODEL and CLIP are built, and what is to be known of them."""

    model: Callable
    clip: Callable
    keys: tuple[str, ...]  # of the text encoders, as embedding files name them
    channels: int  # of its latents
    says: str  # what its network predicts


def _model(config_class, unet: dict, state: dict, seed: int = 0, disable_dynamic: bool = False):
    config = config_class(dict(unet))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, "", device=mm.unet_offload_device())
    draw_weights(model.diffusion_model, seed)
    for buffer in model.diffusion_model.buffers():
        buffer.data.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = (functools.partial(_model, config_class, unet, state), (seed,))
    return patcher


def _clip(tokenizer, network, seed: int = 0, embedding_directory=None) -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(
        ClipTarget(tokenizer, network), embedding_directory=embedding_directory, model_options=CLIP_OPTIONS
    )
    draw_weights(clip.cond_stage_model, seed)
    for part in vars(clip.tokenizer).values():
        if hasattr(part, "embedding_size"):
            part.embedding_size = WIDTH
    return clip


def _family(config_class, unet, tokenizer, network, keys, channels, says, state=None) -> Family:
    model = functools.partial(_model, config_class, unet, state or {})
    return Family(model, functools.partial(_clip, tokenizer, network), keys, channels, says)


sdxl = functools.partial(
    _family, SmallSDXL, SDXL_UNET, sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel, ("clip_l", "clip_g"), 4
)
FAMILIES = {
    "SD1.5": Family(sd15_model, sd15_clip, ("clip_l",), 4, "EPS"),
    "SD2": _family(SmallSD20, {**SD15_UNET, "use_linear_in_transformer": True}, comfy.text_encoders.sd2_clip.SD2Tokenizer,
                   comfy.text_encoders.sd2_clip.SD2ClipModel, ("clip_h",), 4, "EPS"),
    "SDXL": sdxl("EPS"),
    "SDXL, v": sdxl("V_PREDICTION", {"v_pred": torch.zeros(0)}),
    "SD3.5": _family(comfy.supported_models.SD3, MMDIT, comfy.text_encoders.sd3_clip.SD3Tokenizer,
                     comfy.text_encoders.sd3_clip.sd3_clip(t5=False), ("clip_l", "clip_g"), 16, "FLOW"),
    "FLUX.1": _family(comfy.supported_models.Flux, FLUX, comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip(),
                      ("clip_l", "t5xxl"), 16, "FLOW"),
}  # fmt: skip
