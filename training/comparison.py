"""Two sets of pictures, measured every way at once, with what the figures can bear."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .distances import Overlap, Tell, cmmd, cubic, draw_subsets, frechet, kid, mmd2, nothing, overlap
from .features import Features, check_comparable
from .intervals import wilson

NEIGHBOURS = 5
SUBSETS, SUBSET = 100, 1000  # KID's own
JACKKNIFE, JACKKNIFE_WIDTH = 10, 512  # groups; beyond so many numbers it takes minutes
PAIRS = 10**8  # pictures times pictures up to which KID's interval is computed
BALLS = 10**7  # and up to which balls are counted ten times more for their interval


class Figure(NamedTuple):
    """One metric. `low` and `high` are its 95 % interval where there is one; `floor` is what the reference gets against
    itself; `note` is a warning, `about` how it was measured."""

    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    note: str = ""
    about: str = ""


class How(NamedTuple):
    """`neighbours` of the balls, `seed` of all that is drawn, `tell()` often (50 000 pictures take minutes), and whether
    intervals are wanted: they cost more than the values."""

    neighbours: int = NEIGHBOURS
    seed: int = 0
    tell: Tell = nothing
    intervals: bool = True


def compare(made: Features, real: Features, how: How = How()) -> list[Figure]:  # noqa: B008 - immutable
    """Every metric of `made` against the reference `real`.

    The floor compares a part of the reference as large as `made` with the rest of it (`floor_sizes`): a set as good as the
    reference itself would get about that. A metric that the sets are too small for has no value and says so. Raises ValueError for features of two extractors.
    """
    check_comparable(made, real)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(how.seed))
    sizes = floor_sizes(len(made), len(real))
    parts = [real.values[rows] for rows in order.split(sizes)]
    figures = []
    for names, measure in METRICS.items():
        needs = how.neighbours + 1 if measure is _overlap else 4
        fewest = min(len(made), len(real))
        if fewest < needs:
            note = f"needs {needs} pictures on each side, and there are {fewest}"
            figures += [Figure(name, note=note) for name in names]
            continue
        found = measure(made.values, real.values, how)
        if min(sizes) >= needs:
            floors = measure(*parts, how._replace(intervals=False))
            found = [f._replace(floor=floor.value) for f, floor in zip(found, floors, strict=True)]
        figures += found
    return figures


def floor_sizes(made: int, real: int) -> tuple[int, int]:
    """How many pictures of the reference stand for `made` in the floor, and how many remain as the reference; every
    metric depends on such numbers. At most one half, so that the remainder is a reference still."""
    own = min(made, real // 2)
    return own, real - own


def _fid(x: torch.Tensor, y: torch.Tensor, how: How) -> list[Figure]:
    value, width = frechet(x, y, how.tell), x.shape[1]
    low = high = None
    if how.intervals and width <= JACKKNIFE_WIDTH and min(len(x), len(y)) >= 2 * JACKKNIFE:
        error = jackknife(lambda a, b: frechet(a, b, how.tell), x, y, how.seed).item()
        low, high = max(0.0, value - 1.96 * error), value + 1.96 * error
    few = min(len(x), len(y)) <= 2 * width
    note = f"mostly noise below {2 * width + 1} pictures on each side: trust KID or CMMD instead" if few else ""
    return [Figure("FID", value, low, high, note=note)]


def _kid(x: torch.Tensor, y: torch.Tensor, how: How) -> list[Figure]:
    fewest = min(len(x), len(y))
    size = min(SUBSET, fewest // 2)
    values = kid(x, y, draw_subsets(len(x), len(y), size, SUBSETS, how.seed), how.tell)
    value, low, high = values.mean().item(), None, None
    if how.intervals and len(x) * len(y) <= PAIRS:
        error = mmd2(x.double(), y.double(), cubic, True, how.tell)[1]
        low, high = value - 1.96 * error, value + 1.96 * error
    about = f"{SUBSETS} subsets of {size}, standard deviation {values.std():.3g}"
    about += "" if low is not None else "; no interval beyond 100 million pairs"
    return [Figure("KID", value, low, high, about=about)]


def _cmmd(x: torch.Tensor, y: torch.Tensor, how: How) -> list[Figure]:
    value, error = cmmd(x, y, how.tell)
    return [Figure("CMMD", value, max(0.0, value - 1.96 * error), value + 1.96 * error)]


def _overlap(x: torch.Tensor, y: torch.Tensor, how: How) -> list[Figure]:
    few = (
        f"shaky below {10 * how.neighbours} pictures on each side" if min(len(x), len(y)) < 10 * how.neighbours else ""
    )
    fixed = "" if len(x) * len(y) <= BALLS else "the interval is for these very reference pictures"
    found = overlap(x, y, how.neighbours, how.tell)
    values = torch.stack([rows.mean() for rows in found])
    errors = torch.stack([rows.std() / len(rows) ** 0.5 for rows in found])
    if how.intervals and not fixed and min(len(x), len(y)) >= 2 * JACKKNIFE:
        errors = errors.maximum(jackknife(lambda a, b: _means(a, b, how), x, y, how.seed))
    figures = []
    for name, rows, value, error in zip(found._fields, found, values.tolist(), errors.tolist(), strict=True):
        low, high = max(0.0, value - 1.96 * error), value + 1.96 * error
        if name != "density":  # a share: never without an interval, and within 0..1
            sure = wilson(int(rows.sum()), len(rows))
            low, high = min(low, sure[0]), min(1.0, max(high, sure[1]))
        figures.append(Figure(name, value, low, high, note=few, about=fixed))
    return figures


def _means(x: torch.Tensor, y: torch.Tensor, how: How) -> torch.Tensor:
    return torch.stack([rows.mean() for rows in overlap(x, y, how.neighbours, how.tell)])


METRICS = {("FID",): _fid, ("KID",): _kid, ("CMMD",): _cmmd, Overlap._fields: _overlap}


def jackknife(measure: Callable, x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Standard error of measure(x, y) by leaving out a tenth of each set at a time (Efron and Tibshirani 1993, 11.5).

    The tenths are drawn: of pictures in turn by prompt or sorted by class, every tenth would be of one kind.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randperm(len(z), generator=generator) % JACKKNIFE for z in (x, y)]
    values = [measure(x[parts[0] != g], y[parts[1] != g]) for g in range(JACKKNIFE)]
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    return ((JACKKNIFE - 1) * values.var(0, unbiased=False)).sqrt()


def rows(figures: list[Figure]) -> list[tuple[str, ...]]:
    """Metric, value, interval and floor as words, with a heading."""
    body = [
        (f.metric, _short(f.value), "" if f.low is None else f"{_short(f.low)} to {_short(f.high)}", _short(f.floor))
        for f in figures
    ]
    return [("", "value", "95 %", "floor"), *body]


def notes(figures: list[Figure]) -> list[str]:
    """What to beware of, and how it was measured; metrics of which the same is said share a line."""
    found: dict[str, list[str]] = {}
    for f in figures:
        for text in filter(None, (f.note, f.about)):
            found.setdefault(text, []).append(f.metric)
    return [f"{', '.join(dict.fromkeys(metrics))}: {text}" for text, metrics in found.items()]


def remarks(figures: list[Figure], made: int, real: int) -> list[str]:
    """The notes, and what the floor stands on."""
    own, rest = floor_sizes(made, real)
    floor = f"floor: {own} pictures of the reference against its other {rest}"
    fewer = "; fewer than there are to judge, so it lies too high" if own < made else ""
    return [*notes(figures), *([floor + fewer] if any(f.floor is not None for f in figures) else [])]


def heading(made: int, real: int, extractor: str) -> str:
    return f"{made} pictures against {real}, as {extractor} sees them"


def table(figures: list[Figure], made: int, real: int, extractor: str) -> str:
    """A table for people, in columns of text."""
    return "\n".join([heading(made, real, extractor), aligned(rows(figures)), *remarks(figures, made, real)])


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}" if abs(x) >= 1e-4 else f"{x:.1e}" if x else "0"


def class_table(classes: dict[str, list[Figure]]) -> str:
    """A line for each class and one for their mean, a column for each metric."""
    columns = zip(*([f.value for f in row] for row in classes.values()), strict=True)
    known = [[v for v in column if v is not None] for column in columns]
    mean = [Figure("", sum(column) / len(column) if column else None) for column in known]
    return table_of_sets({**classes, "mean of classes": mean})


def table_of_sets(sets: dict[str, list[Figure]]) -> str:
    """A line for each set, a column for each metric, and what to beware of."""
    body = [(name, *(_short(f.value) for f in row)) for name, row in sets.items()]
    warned = [f._replace(about="") for row in sets.values() for f in row]
    metrics = [f.metric for f in next(iter(sets.values()))]
    return "\n".join([aligned([("", *metrics), *body]), *notes(warned)])


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
