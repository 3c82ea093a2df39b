"""How good a prior is, by figures that only mean something together.

From made (n, s, d), s embeddings made for each of n texts, and real (n, r, d), r true ones of the same texts. All but cosine and norm
are in coordinates whitened by a population of real embeddings, where no coordinate outweighs the others.

cosine           with the true embeddings. Highest for a prior that always answers with their mean, so never to be read alone
centred cosine   the same of what differs from the mean of all; a true draw has about the share of variance that the text explains
frechet          distance of the Gaussians of all made and all real, per coordinate; 0 is best. Biased upwards at small n
energy           energy distance of all made and all real (Szekely and Rizzo 2013), unbiased; about 0 is best
energy per text  the same of each text by itself, averaged; where r >= 2
diversity        variance within a text, made over true; 1 is best, 0 is one answer for each text
norm             mean length, made over real; 1 is best
rank             place of the own text among all n, by centred cosine; 1 is best, (n + 1) / 2 is chance
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..comparison import aligned
from ..distances import BLOCK, Tell, mmd2, nothing
from ..distances import frechet as frechet_of_sets
from .starts import moments

BESIDE_COSINE = (
    ("centred cosine",),
    ("frechet", "energy", "energy per text"),
    ("diversity",),
    ("norm",),
)  # one of each


def figures(made: torch.Tensor, real: torch.Tensor, population: torch.Tensor, tell: Tell = nothing) -> dict[str, float]:
    """All of the figures for made (n, s, d), s >= 2, and real (n, r, d) or (n, d). `population` (m, d) whitens; where priors are
    compared it is the same for all. `tell()` often, to stop it by an exception. Raises ValueError for shapes that do not fit."""
    real = real[:, None] if real.ndim == 2 else real
    _check(made, real, population)
    made, real = made.double(), real.to(made.device).double()
    norm = moments(population.to(made), "embeddings of the population")
    x, y = norm.whitened(made), norm.whitened(real)
    all_made, all_real = x.flatten(0, 1), y.flatten(0, 1)
    return {
        "cosine": cosine(made, real),
        "centred cosine": cosine(x, y),
        "frechet": frechet(all_made, all_real, tell),
        "energy": energy(all_made, all_real, tell),
        **({"energy per text": energy_per_text(x, y)} if y.shape[1] > 1 else {}),
        "diversity": diversity(x, y),
        "norm": (made.norm(dim=-1).mean() / real.norm(dim=-1).mean()).item(),
        "rank": rank(x, y),
    }


def _check(made: torch.Tensor, real: torch.Tensor, population: torch.Tensor) -> None:
    shapes = [tuple(x.shape) for x in (made, real, population)]
    fit = [len(shape) for shape in shapes] == [3, 3, 2] and len({shape[-1] for shape in shapes}) == 1
    if not fit or len(made) != len(real):
        raise ValueError(
            f"Made embeddings of the shape {shapes[0]}, real ones of {shapes[1]} and a population of {shapes[2]} do not fit: the first "
            "two have to be (texts, embeddings of each, width) for the same texts, the last (embeddings, width)."
        )
    if made.shape[1] < 2 or made.shape[0] * real.shape[1] < 2:
        raise ValueError(
            "Make 2 or more embeddings for each text, of 2 or more texts: diversity cannot be seen in one."
        )


def cosine(made: torch.Tensor, real: torch.Tensor) -> float:
    """Mean cosine of each made (n, s, d) with each real (n, r, d) of its own text; of whitened ones, the centred cosine."""
    made, real = (F.normalize(x, dim=-1).mean(1) for x in (made, real))
    return (made * real).sum(-1).mean().item()


def frechet(x: torch.Tensor, y: torch.Tensor, tell: Tell = nothing) -> float:
    """Of (n, d) and (m, d), per coordinate."""
    return frechet_of_sets(x, y, tell) / x.shape[1]


def energy(x: torch.Tensor, y: torch.Tensor, tell: Tell = nothing) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of (n, d) and (m, d): the squared MMD of the kernel -|x - y|."""
    return mmd2(x, y, lambda a, b: -torch.cdist(a, b), True, tell)[0]


def energy_per_text(x: torch.Tensor, y: torch.Tensor) -> float:
    """The same of (n, s, d) and (n, r, d) for each of n texts, averaged."""

    def within(z: torch.Tensor) -> torch.Tensor:
        return torch.cdist(z, z).sum((1, 2)) / (z.shape[1] * (z.shape[1] - 1))

    return (2 * torch.cdist(x, y).mean((1, 2)) - within(x) - within(y)).mean().item()


def diversity(x: torch.Tensor, y: torch.Tensor) -> float:
    """Variance within a text of x (n, s, d) over that of y (n, r, d), coordinates alike.

    One true embedding has none. Then the true variance is told by how far it lies from the mean of the s, which for true draws is
    1 + 1 / s times as much (spread and skill, Fortin et al. 2014); being wrong counts like being too sure.
    """
    if y.shape[1] > 1:
        return (x.var(1).mean() / y.var(1).mean()).item()
    missed = (y[:, 0] - x.mean(1)).square().mean() / (1 + 1 / x.shape[1])
    return (x.var(1).mean() / missed).item()


def rank(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean place of the own text for whitened x (n, s, d): how many texts have a mean of whitened y (n, r, d) at a higher cosine, from
    1; equals count half."""
    texts = F.normalize(y.mean(1), dim=1)
    own = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
    total = 0.0
    for rows, at in zip(F.normalize(x.flatten(0, 1), dim=1).split(BLOCK), own.split(BLOCK), strict=True):
        cosines = rows @ texts.T
        mine = cosines.gather(1, at[:, None])
        higher, same = (cosines > mine).sum(1), (cosines == mine).sum(1)
        total += (higher + (same + 1) / 2).sum().item()
    return total / len(own)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each prior, a column for each of its `figures`, which may come from a record.

    Raises ValueError where cosine stands without a distance, diversity and norm: a prior that collapsed wins it.
    """
    for name, row in rows.items():
        lacking = [" or ".join(names) for names in BESIDE_COSINE if not any(k in row for k in names)]
        if lacking:
            raise ValueError(
                f"The figures of {name} lack {', '.join(lacking)}: a collapsed prior wins by cosine, so it is not shown alone."
            )
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    body = [(name, *(_short(row[k]) if k in row else "" for k in columns)) for name, row in rows.items()]
    return aligned([("", *columns), *body])


def _short(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 100 else f"{x:.0f}"
