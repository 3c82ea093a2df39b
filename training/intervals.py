"""How far a measured share or difference can be trusted."""

from __future__ import annotations

import torch


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p = hits / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def mean_interval(values: torch.Tensor, share: bool = False) -> tuple[float, float, float]:
    """Mean of n numbers and its 95 % interval: Wilson's for a share (of zeros and ones), the percentile bootstrap for up to
    200 other numbers, the normal approximation for more."""
    mean = values.double().mean().item()
    if share:
        return mean, *wilson(int(values.sum()), len(values))
    if len(values) <= 200:
        return mean, *bootstrap(values.tolist())
    half = 1.96 * values.double().std().item() / len(values) ** 0.5
    return mean, mean - half, mean + half


def bootstrap(differences: list[float], samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by the percentile bootstrap. With 3 pairs it is only a hint."""
    x = torch.tensor(differences, dtype=torch.float64)
    rows = torch.randint(0, len(x), (samples, len(x)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(x[rows].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
