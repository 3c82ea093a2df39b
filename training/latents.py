"""Encoded pictures that are kept, and batches of pairs that share everything but the picture."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """One batch: which pictures, and the noise and noise level that a picture shares with its negative."""

    rows: list[int]
    noise: torch.Tensor  # (B, C, H, W)
    sigma: torch.Tensor  # (B,)


def draw(latents: torch.Tensor, denoiser, batch: int, generator: torch.Generator) -> Draw:
    """Rows without repetition where the set is large enough; noise and sigma from the same CPU generator."""
    n = len(latents)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-batch // n))])[:batch]
    noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
    return Draw(order.tolist(), noise.to(latents), denoiser.sigmas(batch, generator).to(latents.device))
