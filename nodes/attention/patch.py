"""Shared attention as a patch of ComfyUI's models."""

from __future__ import annotations

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import BasicTransformerBlock, optimized_attention
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP

from .shared import moved, shared, subject_tokens

KEY = "counterpoint.shared_attention"
OVERRIDE = "optimized_attention_override"


def with_shared_attention(model, masks: torch.Tensor | None, start: float, end: float):
    """A clone of a MODEL whose pictures of one batch see each other's subjects between two shares of the sampling, 0..1.

    `masks` (1 or n, H, W) show the subjects; None shares whole pictures. Raises ValueError for a model that cannot do it.
    """
    network = model.model.diffusion_model
    kind = next((kind for known, kind in KINDS.items() if isinstance(network, known)), None)
    if kind is None:
        raise ValueError(
            f"Shared Attention does not know {type(network).__name__}: use SD 1.5, SD 2, SDXL, SD 3, FLUX, Qwen-Image, Z-Image, or Pocket."
        )
    if masks is not None and not masks.any():
        raise ValueError(
            "The masks are black, so no picture would see anything of the others: paint the subject white."
        )
    sampling, clone = model.get_model_object("model_sampling"), model.clone()
    kind(masks, sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)).install(clone, network)
    return clone


class Sharing:
    """In the place of a model's self-attention. Nothing is kept between calls but where the subjects lie."""

    def __init__(self, masks: torch.Tensor | None, most: float, least: float):
        """Acts from noise level `most` down to `least`, which is left out."""
        self.masks, self.most, self.least = masks, most, least
        self._found: dict[tuple, list[torch.Tensor]] = {}

    def install(self, clone, network) -> None:
        raise NotImplementedError

    def pictures(self, rows: int, options: dict) -> int:
        """In a set; 1 where there is nothing to share. Each prompt of a batch, with and without guidance, has the whole set."""
        count, odd = divmod(rows, len(options["cond_or_uncond"]))
        if odd:
            prompts = len(options["cond_or_uncond"])
            raise ValueError(
                f"Shared Attention got {rows} rows for {prompts} prompts: something cuts the batch into pieces."
            )
        return count if self.least < float(options["sigmas"][0]) <= self.most else 1

    def of_sets(self, attention, q, k, v, pictures: int, grid: tuple[int, int], mask=None, **how) -> torch.Tensor:
        """Attention of a batch of several sets, each by itself."""
        subjects = self._subjects(pictures, *grid, q.device)
        masks = [None] * (len(q) // pictures) if mask is None else mask.split(pictures)
        sets = zip(q.split(pictures), k.split(pictures), v.split(pictures), masks, strict=True)
        return torch.cat([shared(attention, *each, subjects, mask=own, **how) for *each, own in sets])

    def _subjects(self, pictures: int, height: int, width: int, device: torch.device) -> list[torch.Tensor]:
        key = pictures, height, width, device
        if key not in self._found:
            masks = torch.ones(1, 1, 1) if self.masks is None else self.masks
            if len(masks) not in (1, pictures):
                raise ValueError(
                    f"Shared Attention has {len(masks)} masks, and {pictures} pictures are painted together: give it 1 for each, or 1 for "
                    "all."
                )
            rows = [each.to(device) for each in subject_tokens(masks, height, width)]
            self._found[key] = rows * (pictures // len(rows))
        return self._found[key]


class UNetSharing(Sharing):
    """Its self-attention has image tokens alone, without positions."""

    def install(self, clone, network) -> None:
        parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
        for name, blocks in parts.items():
            for number, block in enumerate(blocks):
                if any(isinstance(part, BasicTransformerBlock) for part in block.modules()):
                    clone.set_model_attn1_replace(self, name, number)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        def attention(q, k, v, _=None) -> torch.Tensor:
            precision = options["attn_precision"]
            return optimized_attention(
                q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options
            )

        pictures = self.pictures(len(q), options)
        if pictures == 1:
            return attention(q, k, v)
        return self.of_sets(attention, q, k, v, pictures, options["activations_shape"][-2:])


class JointSharing(Sharing):
    """Words and image tokens in one sequence. Where these have rotary positions, the subjects of the others seem to lie below the
    picture, one picture's height for each, as in SynCD."""

    def install(self, clone, network) -> None:
        positions = getattr(network, "pe_embedder", None) or getattr(network, "rope_embedder", None)
        self.patch, self.multiple = network.patch_size, getattr(network, "pad_tokens_multiple", None) or 1
        self.refines = hasattr(network, "noise_refiner")  # words and picture by themselves, in blocks of no type
        self.widths, self.theta = (list(positions.axes_dim), positions.theta) if positions else ([], 0)
        options = clone.model_options["transformer_options"]
        self.before, options[OVERRIDE] = options.get(OVERRIDE), self
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.tell_size)

    def tell_size(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        """Attention itself is told how many tokens there are, not how they lie."""
        grid = tuple(-(-side // self.patch) for side in x.shape[-2:])
        return executor(x, t, c_concat, c_crossattn, control, {**(transformer_options or {}), KEY: grid}, **conds)

    def __call__(
        self, function, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask=None, **more
    ) -> torch.Tensor:
        def attention(q, k, v, mask=mask) -> torch.Tensor:
            if self.before is not None:
                return self.before(function, q, k, v, heads, mask=mask, **more)
            return function(q, k, v, heads, mask=mask, **more)

        options = more["transformer_options"]
        pictures = self.pictures(len(q), options)
        if pictures == 1 or (self.refines and not options.get("block_type")):
            return attention(q, k, v)
        if options.get("reference_image_num_tokens") or (mask is not None and mask.shape[-2] != 1):
            raise ValueError(
                "Shared Attention cannot be combined with reference pictures or Redux: take one or the other."
            )
        (height, width), axis = options[KEY], 2 if more.get("skip_reshape") else 1

        def below(keys: torch.Tensor, slot: int) -> torch.Tensor:
            by = [float(slot * height) * (number == 1) for number in range(len(self.widths))]
            return moved(keys, by, self.widths, self.theta) if by else keys

        words = q.shape[axis] + -(height * width) // self.multiple * self.multiple  # images may be filled up
        return self.of_sets(attention, q, k, v, pictures, (height, width), mask, text=words, axis=axis, place=below)


KINDS = {UNetModel: UNetSharing, **dict.fromkeys((MMDiT, Flux, QwenImageTransformer2DModel, NextDiT), JointSharing)}
