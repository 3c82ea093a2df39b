"""What contrast does to a gradient: remove what the negatives ask for too."""

from __future__ import annotations

import torch

TINY = 1e-12


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Inner product of two gradients, each a list of tensors (one per encoder), in float64."""
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))


def project_out(positive: list[torch.Tensor], negative: list[torch.Tensor], strength: float = 1.0, one_sided: bool = False,
                together: bool = False) -> tuple[list[torch.Tensor], dict[str, float]]:  # fmt: skip
    """g+ - strength * ((g+ . n) / (n . n)) n for each tensor by itself, or `together` over all, and what was done.

    NSYNC, section 3 (arXiv 2511.01517) with strength 1. `one_sided` leaves a gradient alone where g+ . n < 0: the
    negatives do not ask for the same thing there. Nothing is removed along an n shorter than 1e-12.
    Returns the cosine of the two gradients and the fraction of |g+| removed, both over all tensors.
    """
    whole = dot(positive, negative), dot(negative, negative)
    out = []
    for g, n in zip(positive, negative, strict=True):
        shared, size = whole if together else (dot([g], [n]), dot([n], [n]))
        skip = size <= TINY**2 or (one_sided and shared <= 0)
        out.append(g if skip else g - strength * (shared / size).to(g.dtype) * n)
    norms = dot(positive, positive).sqrt(), whole[1].sqrt()
    cosine = (whole[0] / (norms[0] * norms[1]).clamp_min(TINY**4)).item()
    removed = dot(*[[g - u for g, u in zip(positive, out, strict=True)]] * 2).sqrt() / norms[0].clamp_min(TINY)
    return out, {"cosine": cosine, "removed": removed.item()}


def signal_to_noise(rows: list[list[torch.Tensor]]) -> float:
    """|mu|^2 over E|noise|^2 of the mean of `rows`, from the gradient of each picture by itself; 0 is all noise.

    Unbiased in both: the variance of a row is taken off the squared mean (it would be > 0 for pure noise).
    """
    n = len(rows)
    mean = [sum(gs) / n for gs in zip(*rows, strict=True)]
    noise = sum(dot(d, d) for d in ([g - m for g, m in zip(row, mean, strict=True)] for row in rows)) / (n - 1) / n
    return ((dot(mean, mean) - noise).clamp_min(0) / noise.clamp_min(TINY**4)).item()
