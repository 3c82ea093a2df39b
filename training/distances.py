"""How far apart two sets of pictures are, from their features: (n, d) tensors of one extractor.

Everything is float64 and walks through large sets in blocks: 50 000 x 50 000 never lies in memory.

Frechet (FID)          Heusel et al. 2017: one Gaussian per set. Biased upwards at small n.
KID                    Binkowski et al. 2018: unbiased squared MMD, cubic kernel, mean and spread over subsets
CMMD                   Jayasumana et al. 2024: squared MMD, Gaussian kernel of width 10 on unit features, times 1000
precision, recall      Kynkaanniemi et al. 2019: share of one set inside the k-nearest-neighbour balls of the other
density, coverage      Naeem et al. 2020: the same, counted so that an outlier's large ball does no harm
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK = 2048  # rows; a block of distances takes 32 MB
Tell = Callable[[], None]


def nothing() -> None:
    pass


@dataclass
class Moments:
    """Mean (d) and covariance (d, d; divided by n - 1) of a set, in float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def moments(x: torch.Tensor, tell: Tell = nothing) -> Moments:
    mean = x.mean(0, dtype=torch.float64)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for block in x.split(BLOCK):
        tell()
        centred = block.double() - mean
        total += centred.T @ centred
    return Moments(mean, total / (len(x) - 1))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), the last from the symmetric A^(1/2) B A^(1/2)."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean - b.mean).square().sum()
    return (gap + a.covariance.trace() + b.covariance.trace() - 2 * both).item()


def frechet(x: torch.Tensor, y: torch.Tensor, tell: Tell = nothing) -> float:
    """Frechet distance of the Gaussians of two sets.

    Where there are fewer rows than numbers in a row it goes through the small n x m matrix X Y^T of the centred sets:
    the eigenvalues of A B are the squares of its singular values, over (n - 1)(m - 1).
    """
    if len(x) + len(y) > x.shape[1]:
        return frechet_of_moments(moments(x, tell), moments(y, tell))
    x, y = x.double(), y.double()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    return (gap + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()).item()


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x . y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor, width: float = 10.0) -> torch.Tensor:
    """exp(-|x - y|^2 / (2 width^2))."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return (squared / (-2 * width**2)).exp()


def tiles(n: int, m: int, tell: Tell) -> Iterator[tuple[slice, slice]]:
    """Blocks of an n x m table, row by row; `tell()` before each, to say that it goes on or to stop it by an exception."""
    for i in range(0, n, BLOCK):
        for j in range(0, m, BLOCK):
            tell()
            yield slice(i, i + BLOCK), slice(j, j + BLOCK)


def sums(x: torch.Tensor, y: torch.Tensor, kernel: Callable, tell: Tell) -> tuple[torch.Tensor, torch.Tensor]:
    """(n) kernel(x_i, y_j) summed over j, and (m) the same summed over i."""
    rows, columns = torch.zeros(len(x), dtype=x.dtype), torch.zeros(len(y), dtype=x.dtype)
    for here, there in tiles(len(x), len(y), tell):
        tile = kernel(x[here], y[there])
        rows[here] += tile.sum(1)
        columns[there] += tile.sum(0)
    return rows, columns


def own_sums(x: torch.Tensor, kernel: Callable, diagonal: bool, tell: Tell) -> torch.Tensor:
    """(n) kernel(x_i, x_j) summed over j, of which there is only half a table; with or without j = i."""
    rows = torch.zeros(len(x), dtype=x.dtype)
    for here, there in tiles(len(x), len(x), tell):
        if there.start < here.start:
            continue
        tile = kernel(x[here], x[there])
        if here == there and not diagonal:
            tile.fill_diagonal_(0)
        rows[here] += tile.sum(1)
        if here != there:
            rows[there] += tile.sum(0)
    return rows


def mmd2(
    x: torch.Tensor, y: torch.Tensor, kernel: Callable, unbiased: bool, tell: Tell = nothing
) -> tuple[float, float]:
    """Squared maximum mean discrepancy (Gretton et al. 2012) and its standard error.

    Biased: equation 5. Unbiased: equation 3, without the diagonal; may be below 0. The error is that of the leading
    term of a U-statistic, 4 var(h) / n on each side; it vanishes where the two sets are alike and says nothing there.
    """
    n, m = len(x), len(y)
    means = [own_sums(z, kernel, not unbiased, tell) / (len(z) - unbiased) for z in (x, y)]
    across = sums(x, y, kernel, tell)
    value = means[0].mean() + means[1].mean() - 2 * across[0].sum() / (n * m)
    pull = [means[0] - across[0] / m, means[1] - across[1] / n]
    error = (4 * sum(p.var() / len(p) for p in pull)).sqrt()
    return value.item(), error.item()


def kid(
    x: torch.Tensor, y: torch.Tensor, subsets: list[tuple[torch.Tensor, torch.Tensor]], tell: Tell = nothing
) -> torch.Tensor:
    """(len(subsets)) values of the unbiased squared MMD with the cubic kernel, each on rows of x and rows of y."""
    x, y = x.double(), y.double()
    return torch.tensor([mmd2(x[i], y[j], cubic, True, tell)[0] for i, j in subsets], dtype=torch.float64)


def draw_subsets(n: int, m: int, size: int, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` pairs of `size` rows without repetition."""
    generator = torch.Generator().manual_seed(seed)

    def rows(total: int) -> torch.Tensor:
        return torch.randperm(total, generator=generator)[:size]

    return [(rows(n), rows(m)) for _ in range(count)]


def cmmd(x: torch.Tensor, y: torch.Tensor, tell: Tell = nothing) -> tuple[float, float]:
    """1000 times the biased squared MMD of unit-length features, Gaussian kernel of width 10; and its standard error."""
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (x, y))
    value, error = mmd2(x, y, gaussian, False, tell)
    return 1000 * value, 1000 * error


def radii(x: torch.Tensor, k: int, tell: Tell = nothing) -> torch.Tensor:
    """(n) distance of each row to its k-th nearest other row."""
    nearest = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64)  # so far; the first is a row's own
    for here, there in tiles(len(x), len(x), tell):
        if there.start < here.start:
            continue
        distance = torch.cdist(x[here].double(), x[there].double())
        for rows, table in ((here, distance), (there, distance.T)) if here != there else ((here, distance),):
            both = torch.cat([nearest[rows], table], 1)
            nearest[rows] = both.topk(k + 1, largest=False).values
    return nearest[:, -1]


class Overlap(NamedTuple):
    """What is in what, row by row; the means are the four metrics."""

    precision: torch.Tensor  # (made) 1 where a row of `made` lies in a ball of `real`
    recall: torch.Tensor  # (real) 1 where a row of `real` lies in a ball of `made`
    density: torch.Tensor  # (made) how many balls of `real` it lies in, over k; the mean may exceed 1
    coverage: torch.Tensor  # (real) 1 where its ball has a row of `made` in it


def overlap(made: torch.Tensor, real: torch.Tensor, k: int, tell: Tell = nothing) -> Overlap:
    """A ball reaches from a row to its k-th nearest neighbour in its own set, the border included."""
    made_radius, real_radius = radii(made, k, tell), radii(real, k, tell)
    balls, covered, recalled = torch.zeros(len(made)), torch.zeros(len(real)), torch.zeros(len(real))
    for here, there in tiles(len(real), len(made), tell):
        distance = torch.cdist(real[here].double(), made[there].double())
        in_real = distance <= real_radius[here, None]
        balls[there] += in_real.sum(0)
        covered[here] += in_real.sum(1)
        recalled[here] += (distance <= made_radius[there]).sum(1)
    share = [(counts > 0).double() for counts in (balls, recalled, covered)]
    return Overlap(share[0], share[1], balls.double() / k, share[2])
