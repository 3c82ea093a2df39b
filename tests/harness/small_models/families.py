"""Small models of the other families: ComfyUI's own classes at small widths, weights drawn from a seed.

Each has its family's text encoders, parameterisation and latent format; widths that ComfyUI fixes in code (the 4096 to which
SD3 pads its text, CLIP's 49408 words) stay as they are. Two are not the ones of the large models: FLUX.2 is Klein, because the
words of FLUX.2's own encoder come with its weights; and Qwen-Image reads with core's Qwen 2.5 that has no eyes, because those
are 1280 wide in code.
"""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_image
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.z_image
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.ldm.wan.vae import WanVAE
from comfy.supported_models_base import ClipTarget

from .builders import CLIP_TEXT, SD15_UNET, WIDTH, draw_weights, flux2_vae, sd15_clip, sd15_model, sd15_vae

SDXL_UNET = {**SD15_UNET, "context_dim": 2 * WIDTH, "adm_in_channels": WIDTH + 6 * 256, "num_classes": "sequential",
             "use_linear_in_transformer": True}  # fmt: skip
MMDIT = {"in_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 2, "input_size": None, "num_patches": 256, "pos_embed_max_size": 16,
         "adm_in_channels": 2 * WIDTH, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}},
         "qk_norm": "rms", "x_block_self_attn_layers": [0], "pos_embed_scaling_factor": None}  # fmt: skip
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH, "hidden_size": 64,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}  # fmt: skip
FLUX2 = {**FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 3 * WIDTH,
         "mlp_ratio": 3.0, "axes_dim": [8, 8, 8, 8], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": False,
         "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
         "ref_index_scale": 10.0}  # fmt: skip
QWEN_IMAGE = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
              "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 12, 12)}  # fmt: skip
Z_IMAGE = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": WIDTH, "n_layers": 2, "n_refiner_layers": 1,
           "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "qk_norm": True,
           "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}  # fmt: skip
T5 = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "d_kv": 16, "num_heads": 2, "num_layers": 2}
CLIP_TEXT_DEEP = {**CLIP_TEXT, "num_hidden_layers": 3}  # most families read the last layer but one
LLM = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 1, "num_key_value_heads": 1,
       "num_hidden_layers": 28}  # fmt: skip  # Klein's text is read after the 9th, 18th and 27th
CLIP_OPTIONS = {
    "dtype": torch.float32, "clip_l_model_config": CLIP_TEXT_DEEP, "clip_g_model_config": {**CLIP_TEXT_DEEP, "projection_dim": WIDTH},
    "clip_h_model_config": CLIP_TEXT_DEEP, "t5xxl_model_config": T5, "qwen25_7b_model_config": LLM, "qwen3_4b_model_config": LLM,
    "qwen25_7b_class": functools.partial(
        sd1_clip.SDClipModel, layer="last", textmodel_json_config={}, special_tokens={"pad": 151643}, layer_norm_hidden_state=False,
        model_class=comfy.text_encoders.llama.Qwen25_3B, enable_attention_masks=True, return_attention_masks=True,
    ),
}  # fmt: skip


PRECISIONS = {  # of the weights, and what they are computed in
    "fp32": (torch.float32, None), "bf16": (torch.bfloat16, torch.float32), "fp8": (torch.float8_e4m3fn, torch.float32),
    "scaled fp8": (torch.float32, None),
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
    latent: tuple[int, ...]  # shape of what its VAE makes of 64 x 64 pixels
    says: str  # what its network predicts
    vae: Callable


def _model(
    config_class, unet: dict, state: dict, seed: int = 0, disable_dynamic: bool = False, precision: str = "fp32"
):
    config = config_class(dict(unet))
    weights, cast = PRECISIONS[precision]
    config.set_inference_dtype(weights, cast)
    model = config.get_model(state, "", device=mm.unet_offload_device())
    draw_weights(model.diffusion_model, seed)
    for buffer in model.diffusion_model.buffers():
        buffer.data.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    if precision == "scaled fp8":
        model = _scaled(config_class(dict(unet)), state, model.diffusion_model)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = (functools.partial(_model, config_class, unet, state, precision=precision), (seed,))
    return patcher


def _scaled(config, state: dict, network: torch.nn.Module):
    """The model of scaled fp8: linear layers in 8 bit with a scale each, loaded as core loads such files."""
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    tensors = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            tensors[f"{name}.weight"] = (layer.weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale.detach()
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    model = config.get_model(state, "", device=mm.unet_offload_device())
    missing = model.diffusion_model.load_state_dict(tensors, strict=False).missing_keys
    assert not missing, missing
    return model


def _clip(tokenizer, network, seed: int = 0, embedding_directory=None) -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(
        ClipTarget(tokenizer, network), embedding_directory=embedding_directory, model_options=CLIP_OPTIONS
    )
    draw_weights(clip.cond_stage_model, seed)
    for part in vars(clip.tokenizer).values():
        if hasattr(part, "embedding_size"):
            part.embedding_size = WIDTH
    return clip


def qwen_image_vae(seed: int = 0) -> comfy.sd.VAE:
    """Wan 2.1's, which reads a picture as a film of one frame: 8 pixels to a latent, 16 channels."""
    sizes = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    network = WanVAE(**sizes, temperal_downsample=[False, True, True], dropout=0.0)
    return comfy.sd.VAE(sd=draw_weights(network, seed).state_dict(), dtype=torch.float32)


def _family(config_class, unet, tokenizer, network, keys, channels, says, state=None, latent=None, vae=None) -> Family:
    model = functools.partial(_model, config_class, unet, state or {})
    clip, vae = functools.partial(_clip, tokenizer, network), vae or functools.partial(sd15_vae, 0, channels)
    return Family(model, clip, keys, latent or (channels, 8, 8), says, vae)


sdxl = functools.partial(
    _family, SmallSDXL, SDXL_UNET, sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel, ("clip_l", "clip_g"), 4
)
FAMILIES = {
    "SD1.5": Family(sd15_model, sd15_clip, ("clip_l",), (4, 8, 8), "EPS", sd15_vae),
    "SD2": _family(SmallSD20, {**SD15_UNET, "use_linear_in_transformer": True}, comfy.text_encoders.sd2_clip.SD2Tokenizer,
                   comfy.text_encoders.sd2_clip.SD2ClipModel, ("clip_h",), 4, "EPS"),
    "SDXL": sdxl("EPS"),
    "SDXL, v": sdxl("V_PREDICTION", {"v_pred": torch.zeros(0)}),
    "SD3.5": _family(comfy.supported_models.SD3, MMDIT, comfy.text_encoders.sd3_clip.SD3Tokenizer,
                     comfy.text_encoders.sd3_clip.sd3_clip(t5=False), ("clip_l", "clip_g"), 16, "FLOW"),
    "FLUX.1": _family(comfy.supported_models.Flux, FLUX, comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip(),
                      ("clip_l", "t5xxl"), 16, "FLOW"),
    "FLUX.2": _family(comfy.supported_models.Flux2, FLUX2, comfy.text_encoders.flux.KleinTokenizer, comfy.text_encoders.flux.klein_te(),
                      ("qwen3_4b",), 128, "FLOW", latent=(128, 4, 4), vae=flux2_vae),
    "Qwen-Image": _family(comfy.supported_models.QwenImage, QWEN_IMAGE, comfy.text_encoders.qwen_image.QwenImageTokenizer,
                          comfy.text_encoders.qwen_image.te(), ("qwen25_7b",), 16, "FLOW", latent=(16, 1, 8, 8), vae=qwen_image_vae),
    "Z-Image": _family(comfy.supported_models.ZImage, Z_IMAGE, comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.te(),
                       ("qwen3_4b",), 16, "FLOW"),
}  # fmt: skip
