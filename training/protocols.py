"""What a trainer sees of a model. `nodes/bridge.py` makes these from ComfyUI's MODEL and CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

Vectors = dict[str, torch.Tensor]  # by the encoder's embedding key ("clip_l", "clip_g", "t5xxl"...): (k, width)


class Conditioning(NamedTuple):
    """What a text encoder says of B captions."""

    states: torch.Tensor  # (B, tokens, width), zeros behind a row's own
    pooled: torch.Tensor | None  # (B, width)
    tokens: tuple[int, ...] = ()  # (B) how many are a row's own; nothing where all are

    def expand(self, rows: list[int]) -> Conditioning:
        """These rows, as long as the longest of them."""
        tokens = tuple(self.tokens[r] for r in rows) if self.tokens else ()
        states, pooled = self.states[rows], None if self.pooled is None else self.pooled[rows]
        if len(set(tokens)) == 1:
            return Conditioning(states[:, : tokens[0]], pooled)
        return Conditioning(states, pooled, tokens)

    @staticmethod
    def stacked(parts: list[Conditioning]) -> Conditioning:
        """As one batch of rows that may differ in length."""
        lengths = tuple(n for part in parts for n in part.tokens or [part.states.shape[1]] * len(part.states))
        longest, same = max(lengths), len(set(lengths)) == 1
        states = torch.cat([F.pad(part.states, (0, 0, 0, longest - part.states.shape[1])) for part in parts])
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return Conditioning(states, pooled, () if same else lengths)

    def by_length(self, error: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """`error(rows)` of the rows of each length by themselves, put together in order. A model in which text and picture attend
        to each other sees every token, so text that is filled up to a common length would be another text."""
        rows_of: dict[int, list[int]] = {}
        for row, length in enumerate(self.tokens or [0] * len(self.states)):
            rows_of.setdefault(length, []).append(row)
        order = [row for rows in rows_of.values() for row in rows]
        errors = [error(rows) for rows in rows_of.values()]
        return errors[0] if len(errors) == 1 else torch.cat(errors)[torch.tensor(order).argsort().to(errors[0].device)]


class Denoiser(Protocol):
    """A frozen diffusion model in its own parameterisation (eps, v or flow)."""

    def sigmas(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n,) noise levels, uniform in the model's own time, stratified over the n."""

    def snr(self, sigma: torch.Tensor) -> torch.Tensor:
        """(n,) signal to noise ratio of what the model is shown at these noise levels."""

    def error(
        self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, cond: Conditioning
    ) -> torch.Tensor:
        """(B, C, H, W) prediction minus target, unreduced: weighting and masks are the trainer's. Latents are what the model takes:
        (B, C, H, W), or (B, C, 1, H, W) where a picture is a film of one frame."""


class TextEncoder(Protocol):
    """A frozen text encoder in which some words are vectors to be learned."""

    def encode(self, captions: list[str], vectors: list[Vectors]) -> Conditioning:
        """Captions with `{token}` where the vectors stand; caption i uses vectors[i], which may require gradients."""
