"""Masked shared attention (SynCD, Kumari et al., ICCV 2025, arXiv 2502.01720): every picture of a set sees itself whole, and of the
others only the subject.

What may not be seen is left out before attention instead of being masked in it, so the result is that of the dense mask, at the
cost of the keys that count, and every attention kernel will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def subject_tokens(masks: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    """For each mask (n, H, W) the numbers of the tokens, on a grid of height x width, that the subject touches anywhere."""
    touched = F.adaptive_max_pool2d((masks > 0.5).float()[:, None], (height, width)).flatten(1)
    return [row.nonzero().flatten() for row in touched]


def shared(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subjects: list[torch.Tensor]
) -> torch.Tensor:
    """Attention of a set of N pictures, (N, tokens, width) each; `subjects[n]` are the tokens of picture n that the others see.

    Picture n sees its own keys, then the subjects of n-1, n-2, ... around the set, as the reference arranges them.
    """
    seen = [(k[n : n + 1, rows], v[n : n + 1, rows]) for n, rows in enumerate(subjects)]
    painted = []
    for n in range(len(q)):
        others = [seen[(n - slot) % len(q)] for slot in range(1, len(q))]
        keys = torch.cat([k[n : n + 1], *(key for key, _ in others)], dim=1)
        values = torch.cat([v[n : n + 1], *(value for _, value in others)], dim=1)
        painted.append(attention(q[n : n + 1], keys, values))
    return torch.cat(painted)
