"""Where one set of numbers is best parted in two."""

from __future__ import annotations

import torch


def otsu(values: torch.Tensor) -> tuple[float, float]:
    """The threshold between two classes of the values (n,) that parts them best (Otsu 1979), exactly, over all thresholds there are;
    and the contrast of the two, (b - a) / (b + a) of their means, 0 where there is but one."""
    ordered = values.double().sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64, device=values.device)
    sums = ordered.cumsum(0)
    low, high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (high - low) ** 2
    if len(ordered) < 2 or not between.max() > 0:
        return float(ordered[0]), 0.0
    at = int(between.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2), float((high[at] - low[at]) / (high[at] + low[at]))
