"""Shared attention as a patch of ComfyUI's models."""

from __future__ import annotations

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .shared import shared, subject_tokens


def with_shared_attention(model, masks: torch.Tensor | None, start: float, end: float):
    """A clone of a MODEL whose pictures of one batch see each other's subjects between two shares of the sampling, 0..1.

    `masks` (1 or n, H, W) show the subjects; None shares whole pictures. Raises ValueError for a model that cannot do it.
    """
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"Shared Attention does not know {type(network).__name__}: use a model of the SD 1.5, SD 2 or SDXL kind, or Pocket."
        )
    if masks is not None and not masks.any():
        raise ValueError(
            "The masks are black, so no picture would see anything of the others: paint the subject white."
        )
    sampling = model.get_model_object("model_sampling")
    patch = SharedAttention(masks, sampling.percent_to_sigma(start), sampling.percent_to_sigma(end))
    clone = model.clone()
    for name, blocks in (
        ("input", network.input_blocks),
        ("middle", [network.middle_block]),
        ("output", network.output_blocks),
    ):
        for number, block in enumerate(blocks):
            if any(isinstance(part, BasicTransformerBlock) for part in block.modules()):
                clone.set_model_attn1_replace(patch, name, number)
    return clone


class SharedAttention:
    """In the place of a block's self-attention. Nothing is kept between calls but where the subjects lie."""

    def __init__(self, masks: torch.Tensor | None, most: float, least: float):
        """Acts from noise level `most` down to `least`, which is left out."""
        self.masks, self.most, self.least = masks, most, least
        self._found: dict[tuple, list[torch.Tensor]] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            precision = options["attn_precision"]
            return optimized_attention(
                q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options
            )

        prompts = len(
            options["cond_or_uncond"]
        )  # each set of the batch has a prompt of its own: with and without guidance
        pictures, odd = divmod(len(q), prompts)
        if odd:
            raise ValueError(
                f"Shared Attention got {len(q)} rows for {prompts} prompts: something cuts the batch into pieces."
            )
        if pictures == 1 or not self.least < float(options["sigmas"][0]) <= self.most:
            return attention(q, k, v)
        subjects = self._subjects(pictures, *options["activations_shape"][-2:], q.device)
        sets = zip(q.chunk(prompts), k.chunk(prompts), v.chunk(prompts), strict=True)
        return torch.cat([shared(attention, *each, subjects) for each in sets])

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
