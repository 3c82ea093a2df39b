"""What a trainer sees of a model. `nodes/bridge.py` makes these from ComfyUI's MODEL and CLIP."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch

Vectors = dict[str, torch.Tensor]  # by the encoder's embedding key ("clip_l", "clip_g", "t5xxl"...): (k, width)


class Conditioning(NamedTuple):
    """What a text encoder says of B captions."""

    states: torch.Tensor  # (B, tokens, width)
    pooled: torch.Tensor | None  # (B, width)

    def expand(self, rows: list[int]) -> Conditioning:
        return Conditioning(self.states[rows], None if self.pooled is None else self.pooled[rows])

    @staticmethod
    def stacked(parts: list[Conditioning]) -> Conditioning:
        """As one batch. Shorter ones are repeated whole to a common length, as core does: cross-attention sees no change."""
        longest = math.lcm(*(part.states.shape[1] for part in parts))
        states = torch.cat([part.states.repeat(1, longest // part.states.shape[1], 1) for part in parts])
        return Conditioning(states, None if parts[0].pooled is None else torch.cat([part.pooled for part in parts]))


class Denoiser(Protocol):
    """A frozen diffusion model in its own parameterisation (eps, v or flow)."""

    def sigmas(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n,) noise levels, uniform in the model's own time, stratified over the n."""

    def snr(self, sigma: torch.Tensor) -> torch.Tensor:
        """(n,) signal to noise ratio of what the model is shown at these noise levels."""

    def error(
        self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, cond: Conditioning
    ) -> torch.Tensor:
        """(B, C, H, W) prediction minus target, unreduced: weighting and masks are the trainer's."""


class TextEncoder(Protocol):
    """A frozen text encoder in which some words are vectors to be learned."""

    def encode(self, captions: list[str], vectors: list[Vectors]) -> Conditioning:
        """Captions with `{token}` where the vectors stand; caption i uses vectors[i], which may require gradients."""
