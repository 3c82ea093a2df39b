"""Masked shared attention (SynCD, Kumari et al., ICCV 2025, arXiv 2502.01720): every picture of a set sees itself whole, and of the
others only the subject.

What may not be seen is left out before attention instead of being masked in it, so the result is that of the dense mask, at the
cost of the keys that count, and every attention kernel will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]  # of q, k, v and a mask
Place = Callable[[torch.Tensor, int], torch.Tensor]


def subject_tokens(masks: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    """For each mask (n, H, W) the numbers of the tokens, on a grid of height x width, that the subject touches anywhere."""
    touched = F.adaptive_max_pool2d((masks > 0.5).float()[:, None], (height, width)).flatten(1)
    return [row.nonzero().flatten() for row in touched]


def shared(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subjects: list[torch.Tensor], text: int = 0,
           axis: int = 1, place: Place = lambda keys, slot: keys, mask: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Attention of a set of N pictures, whose tokens lie along `axis`; gives (N, tokens, width), as `attention` does.

    `subjects[n]` are the image tokens of picture n that the others see. Picture n sees its own keys, then the subjects of n-1, n-2, ...
    around the set, as the reference arranges them; `place(keys, slot)` moves those of the slot-th neighbour, 1 to N-1, to where they
    shall seem to lie. The first `text` tokens are words: they see their own picture, and only it sees them. `mask` (N, ..., tokens) is
    added to the logits of a picture's own keys, words that fill up a caption for one.
    """
    count, images = len(q), q.shape[axis] - text
    seen = [
        tuple(x[n : n + 1].narrow(axis, text, images).index_select(axis, rows) for x in (k, v))
        for n, rows in enumerate(subjects)
    ]
    painted = []
    for n in range(count):
        others = [(slot, *seen[(n - slot) % count]) for slot in range(1, count)]
        keys = torch.cat([k[n : n + 1], *(place(key, slot) for slot, key, _ in others)], dim=axis)
        values = torch.cat([v[n : n + 1], *(value for *_, value in others)], dim=axis)
        own = None if mask is None else F.pad(mask[n : n + 1], (0, keys.shape[axis] - k.shape[axis]))
        painted.append(attention(q[n : n + 1].narrow(axis, text, images), keys, values, own))
    if not text:
        return torch.cat(painted)
    return torch.cat([attention(q.narrow(axis, 0, text), k, v, mask), torch.cat(painted)], dim=1)


def moved(keys: torch.Tensor, by: list[float], widths: list[int], theta: float) -> torch.Tensor:
    """Keys (..., sum of widths) with rotary positions (Su et al. 2021), moved along each axis of the positions: rotations add up, so
    this is what they would be had they been placed there at first."""
    turns = [
        step * theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        for step, width in zip(by, widths, strict=True)
    ]
    angle = torch.cat(turns)
    cos, sin = (f(angle).float().to(keys.device) for f in (torch.cos, torch.sin))
    a, b = keys.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(keys)
