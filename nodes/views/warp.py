"""Cross-view warping (SynCD, Kumari et al., ICCV 2025, arXiv 2502.01720): what shows one point of an object becomes alike in all views.

    f2 <- a f1(where view 1 shows the same point) + (1 - a) f2

on a grid of tokens, and only where the correspondences say that both views see the point. Views go in order, each after those before
it: the first stays as it is, and a point that several see is that of the first of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .correspondences import Correspondences

ENOUGH = (
    0.25  # of a token's pixels must be seen in the other view. Nearest neighbours that agree leave gaps between them
)


class Step(NamedTuple):
    """Tokens of one view that become those of another, which comes before it."""

    view: int
    tokens: torch.Tensor  # (m)
    source: int
    origins: torch.Tensor  # (m)


def steps(matches: Correspondences, height: int, width: int) -> list[Step]:
    """What is warped on a grid of height x width tokens, in order. Every token of a view is in one step at most."""
    plan = []
    for view in range(1, matches.views):
        free = torch.ones(height * width, dtype=torch.bool)
        for source in range(view):
            here, there = matches.points.get((view, source), (torch.empty(0, 2),) * 2)
            tokens, origins = _tokens(here.cpu(), there.cpu(), matches.size, height, width)
            new = free[tokens]
            free[tokens] = False
            if new.any():
                plan.append(Step(view, tokens[new], source, origins[new]))
    return plan


def _tokens(here: torch.Tensor, there: torch.Tensor, size: tuple[int, int], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Tokens of which enough is seen in the other view (m), and the token that shows there what is nearest to the middle of each (m)."""
    here, there, size = _refined(here, there, size, height, width)
    grid = torch.tensor([width, height], dtype=torch.float64)
    cell = _cells(here, height, width)
    middle = torch.stack([cell % width, cell // width], dim=1).add(0.5) / grid
    order = ((here - middle) * grid).square().sum(1).argsort(stable=True)
    order = order[cell[order].argsort(stable=True)]
    tokens, counts = cell[order].unique_consecutive(return_counts=True)
    first = order[counts.cumsum(0) - counts]
    origins = _cells(there[first] + middle[first] - here[first], height, width)
    enough = counts >= ENOUGH * size[0] * size[1] / (height * width)
    return tokens[enough], origins[enough]


def _refined(here, there, size, height: int, width: int):
    """Where the grid is finer than what was measured, a point stands for all of its pixel."""
    times = [-(-side // of) for side, of in zip((height, width), size, strict=True)]
    size = size[0] * times[0], size[1] * times[1]
    y, x = ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / side for n, side in zip(times, size, strict=True))
    within = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)
    return *((points.double()[:, None] + within).flatten(0, 1) for points in (here, there)), size


def _cells(at: torch.Tensor, height: int, width: int) -> torch.Tensor:
    column = (at[:, 0] * width).floor().clamp(0, width - 1)
    return ((at[:, 1] * height).floor().clamp(0, height - 1) * width + column).long()


def warped(x: torch.Tensor, plan: list[Step], strength: float, axis: int = 1, noise: bool = False) -> torch.Tensor:
    """Features of views (n, ..., tokens along `axis`, ...) -> the same, warped. What no step names is untouched, to the bit.

    `strength` is a, 0..1. `noise`: the views are independent noise, and what is mixed keeps its variance: a f1 + (1 - a) f2 is divided
    by sqrt(a^2 + (1 - a)^2).
    """
    if not plan or strength == 0:
        return x
    scale = (strength**2 + (1 - strength) ** 2) ** -0.5 if noise else 1.0
    views = list(x.unbind(0))
    for view, tokens, source, origins in plan:
        tokens, origins = tokens.to(x.device), origins.to(x.device)
        own, other = views[view].index_select(axis - 1, tokens), views[source].index_select(axis - 1, origins)
        mixed = (strength * other + (1 - strength) * own) * scale
        views[view] = views[view].index_copy(axis - 1, tokens, mixed.to(x.dtype))
    return torch.stack(views)


def warped_maps(x: torch.Tensor, plan: list[Step], strength: float, noise: bool = False) -> torch.Tensor:
    """The same for latents (n, C, ..., height, width), whose tokens are their pixels."""
    return warped(x.flatten(-2), plan, strength, x.ndim - 2, noise).view(x.shape)
