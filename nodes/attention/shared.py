"""Masked shared attention (SynCD, Kumari et al., ICCV 2025, arXiv 2502.01720): every picture of a set sees itself whole, and of the
others only the subject.

What may not be seen is left out before attention instead of being masked in it, so the result is that of the dense mask, at the
cost of the keys that count, and every attention kernel will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]  # of q, k, v and a mask
Place = Callable[[torch.Tensor, int], torch.Tensor]
MORE = 8  # channels that carry a weight: every kernel takes heads that are wider by eight


def subject_tokens(masks: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    """For each mask (n, H, W) the numbers of the tokens, on a grid of height x width, that the subject touches anywhere."""
    touched = F.adaptive_max_pool2d((masks > 0.5).float()[:, None], (height, width)).flatten(1)
    return [row.nonzero().flatten() for row in touched]


def neighbours(count: int, anchors: int = 0) -> list[list[int]]:
    """For each of `count` pictures those it sees, nearest first: n-1, n-2, ... around the set, as the reference arranges them. With
    anchors, 1 and up, only the first so many pictures are seen."""
    around = [[(n - slot) % count for slot in range(1, count)] for n in range(count)]
    return [[m for m in others if not anchors or m < anchors] for others in around]


def shared(attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subjects: list[torch.Tensor], text: int = 0,
           axis: int = 1, place: Place = lambda keys, slot: keys, mask: torch.Tensor | None = None,
           seen_by: list[list[int]] | None = None, weight: float = 1.0, heads: int = 1) -> torch.Tensor:  # fmt: skip
    """Attention of a set of N pictures, whose tokens lie along `axis`; gives (N, tokens, width), as `attention` does.

    `subjects[n]` are the image tokens of picture n that the others see. Picture n sees its own keys, then the subjects of those in
    `seen_by[n]` (all `neighbours` by default); `place(keys, slot)` moves those of the slot-th, 1 and up, to where they shall seem to
    lie. The first `text` tokens are words: they see their own picture, and only it sees them. `mask` (N, ..., tokens) is added to the
    logits of a picture's own keys, words that fill up a caption for one. What the subjects of others weigh before the softmax is made
    to sum to one is multiplied by `weight`, above 0; `heads` is asked for where they lie inside the width (`axis` 1).
    """
    count, images = len(q), q.shape[axis] - text

    def subject(x: torch.Tensor, m: int) -> torch.Tensor:
        return x[m : m + 1].narrow(axis, text, images).index_select(axis, subjects[m])

    def look(n: int, others: list[int]) -> torch.Tensor:
        keys = torch.cat([k[n : n + 1], *(place(subject(k, m), slot) for slot, m in enumerate(others, 1))], dim=axis)
        values = torch.cat([v[n : n + 1], *(subject(v, m) for m in others)], dim=axis)
        foreign = keys.shape[axis] - k.shape[axis]
        own = None if mask is None else F.pad(mask[n : n + 1], (0, foreign))
        queries = q[n : n + 1].narrow(axis, text, images)
        if weight == 1.0 or not foreign:
            return attention(queries, keys, values, own)
        return _weighted(attention, queries, keys, values, own, foreign, weight, axis, heads)

    painted = None  # written picture by picture: what one of them gathers is gone before the next begins
    for n, others in enumerate(seen_by or neighbours(count)):
        seen = look(n, others)
        painted = seen.new_empty(count, text + images, seen.shape[-1]) if painted is None else painted
        painted[n, text:] = seen[0]
        del seen
    if text:
        painted[:, :text] = attention(q.narrow(axis, 0, text), k, v, mask)
    return painted


def _weighted(attention: Attention, q, k, v, mask, foreign: int, weight: float, axis: int, heads: int) -> torch.Tensor:
    """Attention whose last `foreign` keys weigh `weight` times as much: log(weight) is added to their logits by channels of their
    own, not by a mask, which the fastest kernels do not take."""
    inside = axis == 1  # heads lie inside the width
    q, k, v = (x.unflatten(-1, (heads, -1)) if inside else x for x in (q, k, v))
    width = q.shape[-1]
    grown = math.sqrt((width + MORE) / width)  # kernels divide by the square root of the width
    more = k.new_zeros(*k.shape[:-1], MORE)
    more.narrow(axis, k.shape[axis] - foreign, foreign).fill_(math.log(weight) * math.sqrt(width + MORE) / MORE)
    wider = torch.cat([q * grown, q.new_ones(*q.shape[:-1], MORE)], -1), torch.cat([k, more], -1), F.pad(v, (0, MORE))
    answer = attention(*(x.flatten(-2) if inside else x for x in wider), mask)
    count = q.shape[-2] if inside else q.shape[1]
    return answer.unflatten(-1, (count, -1))[..., :width].flatten(-2)


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
