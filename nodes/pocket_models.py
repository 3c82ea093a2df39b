"""Pocket as ComfyUI's own classes at small sizes: the one place that knows their constructor arguments."""

from __future__ import annotations

import copy
import functools
import json
import logging
from pathlib import Path

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import folder_paths
import torch
from comfy.clip_model import CLIPTextModel, CLIPVisionModelProjection
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer

from ..training import artefact
from ..training.pocket.instance import InstanceProbe
from ..training.pocket.judge import Judge
from ..training.pocket.world import VERSION
from .bridge import Family

log = logging.getLogger("counterpoint")
MODELS = Path(__file__).resolve().parents[1] / "models"
WIDTH = 128
VOCABULARY = 49408  # of ComfyUI's CLIP tokenizer

_VAE_PART = {
    "double_z": True, "z_channels": 4, "resolution": 128, "in_channels": 3, "out_ch": 3, "num_res_blocks": 0,
    "attn_resolutions": [], "dropout": 0.0, "resamp_with_conv": True,
}  # fmt: skip
VAE_PARAMS = {
    "embed_dim": 4,
    "ddconfig": {**_VAE_PART, "ch": 64, "ch_mult": [1, 1, 1, 1]},
    "decoder_ddconfig": {**_VAE_PART, "ch": 32, "ch_mult": [1, 1, 2, 4]},
}
VAE_NORM_GROUPS = 8  # with ComfyUI's 32, a norm of 32 channels would be instance norm, which forgets absolute colour

TEXT_CONFIG = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
VISION_CONFIG = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH,
    "hidden_act": "quick_gelu", "num_channels": 3, "patch_size": 16, "image_size": 128, "projection_dim": WIDTH,
    "model_type": "clip_vision_model",
}  # fmt: skip


def unet_config(attention: str) -> dict:
    """`small`: attention at 4x4 only, where training begins. `full`: also at 8x8 and in the last block at 16x16."""
    depth, output = {"small": ([0, 0, 1], [0, 0, 0, 0, 1, 1]), "full": ([0, 1, 1], [1, 0, 1, 1, 1, 1])}[attention]
    return {
        "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 2], "transformer_depth": depth, "transformer_depth_output": output,
        "transformer_depth_middle": 1, "num_head_channels": 32, "num_heads": -1, "use_spatial_transformer": True,
        "context_dim": WIDTH, "use_linear_in_transformer": False, "legacy": False, "conv_resample": True,
    }  # fmt: skip


class PocketLatent(comfy.latent_formats.LatentFormat):
    """4 channels of mean 0 and variance 1: the VAE whitens them."""

    scale_factor = 1.0


class Pocket(comfy.supported_models.SD15):
    """Stable Diffusion 1.5's structure at Pocket's size."""

    unet_extra_config: dict = {}
    latent_format = PocketLatent
    family = Family("Pocket", 128, 200, 1, 4.0)


# The bare networks, weights not initialised: what `dev.py pocket` trains.


def vae_module() -> torch.nn.Module:
    return _regroup(AutoencoderKL(**VAE_PARAMS))


def text_module() -> torch.nn.Module:
    return CLIPTextModel(TEXT_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init)


def vision_module() -> torch.nn.Module:
    return CLIPVisionModelProjection(VISION_CONFIG, torch.float32, "cpu", comfy.ops.disable_weight_init)


def unet_module(attention: str) -> torch.nn.Module:
    return UNetModel(**unet_config(attention), operations=comfy.ops.disable_weight_init)


def tokenizer() -> SDTokenizer:
    return SDTokenizer(embedding_size=WIDTH)


class PocketTokenizer(SDTokenizer):
    """ComfyUI's, which knows 49 408 pieces of words. Pocket has read a few hundred; others are named in the log, once."""

    def __init__(self, *, known_ids: frozenset[int], **options):
        super().__init__(embedding_size=WIDTH, **options)
        self.known_ids, self.told = known_ids, set()

    def tokenize_with_weights(self, text: str, *args, **options):
        batches = super().tokenize_with_weights(text, *args, **options)
        unknown = {t for batch in batches for t, *_ in batch if isinstance(t, int)} - self.known_ids - self.told
        if unknown:
            words = ", ".join(sorted(repr(self.inv_vocab[t].removesuffix("</w>")) for t in unknown))
            log.warning("Pocket never read %s (in %r): it means nothing to it.", words, text)
            self.told |= unknown
        return batches


def _regroup(vae: torch.nn.Module) -> torch.nn.Module:
    for m in vae.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.num_groups = VAE_NORM_GROUPS
    return vae


# The shipped weights in ComfyUI's own wrappers: what the canvas gets.


def read_part(part: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights (float32) and metadata of models/pocket-<part>.safetensors, of this version of the world only."""
    file = MODELS / f"pocket-{part}.safetensors"
    if not file.exists():
        raise FileNotFoundError(
            f"{file.name} is missing from the pack's models folder: install the pack again, or run `python dev.py pocket`."
        )
    tensors, metadata = artefact.read(file)
    if metadata.get("pocket_version") != VERSION:
        raise ValueError(
            f"{file.name} belongs to world {metadata.get('pocket_version')!r} of Pocket and this pack has world {VERSION!r}: install the pack again."
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, metadata


def load_model(disable_dynamic: bool = False):
    """Pocket's UNet as a MODEL."""
    weights, metadata = read_part("unet")
    config = Pocket(unet_config("full"))
    config.set_inference_dtype(torch.float32, None)
    factors = json.loads(read_part("vae")[1]["preview_factors"])
    config.latent_format.latent_rgb_factors, config.latent_format.latent_rgb_factors_bias = factors[:-1], factors[-1]
    model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
    model.load_model_weights(weights, "")
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (load_model, ())
    return patcher


def load_clip():
    """Pocket's text tower as a CLIP. Words outside the grammar get the mean of the words inside."""
    weights, _ = read_part("text")
    rows, ids = weights.pop("token_rows"), weights.pop("token_ids").long()
    table = rows.mean(0).expand(VOCABULARY, -1).clone()
    table[ids] = rows
    weights["text_model.embeddings.token_embedding.weight"] = table
    target = comfy.supported_models_base.ClipTarget(
        functools.partial(
            SD1Tokenizer, tokenizer=functools.partial(PocketTokenizer, known_ids=frozenset(ids.tolist()))
        ),
        functools.partial(
            SD1ClipModel, clip_model=SDClipModel
        ),  # its pooled output is projected, as the vision tower's
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"clip_l_model_config": dict(TEXT_CONFIG), "dtype": torch.float32},
        state_dict={f"clip_l.transformer.{k}": v for k, v in weights.items()},
    )


def load_vae():
    """Pocket's autoencoder as a VAE."""
    weights, _ = read_part("vae")
    vae = comfy.sd.VAE(sd=weights, config={"params": copy.deepcopy(VAE_PARAMS)}, dtype=torch.float32)
    _regroup(vae.first_stage_model)
    return vae


def load_vision():
    """Pocket's vision tower as a CLIP_VISION."""
    weights, _ = read_part("vision")
    vision = comfy.clip_vision.ClipVisionModel(dict(VISION_CONFIG))
    missing, unexpected = vision.load_sd(weights)
    if missing or unexpected:
        raise ValueError(
            f"pocket-vision.safetensors does not fit this ComfyUI's CLIP vision model (missing {missing}, unexpected {unexpected})."
        )
    return vision


def load_judge() -> Judge:
    weights, _ = read_part("judge")
    judge = Judge()
    judge.load_state_dict(weights)
    return judge.eval().requires_grad_(False)


def load_instance_probe() -> tuple[InstanceProbe, float]:
    """The probe, and the cosine from which on two pictures show the same instance."""
    weights, metadata = read_part("instance")
    probe = InstanceProbe()
    probe.load_state_dict(weights)
    return probe.eval().requires_grad_(False), float(metadata["threshold"])
