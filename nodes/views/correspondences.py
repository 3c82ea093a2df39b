"""Which point of one view of an object is which of another: CORRESPONDENCES on the canvas.

From depth and cameras, from surface coordinates, or from features. All views have one size; a point is (x, y), 0..1 of the picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...training.otsu import otsu
from .geometry import Camera, centres, pixels, project, unproject

BLOCK = 1024  # rows of a table of distances; with 16 384 columns it takes 64 MB
Pair = tuple[int, int]
Far = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows (n, d) and (m, d) -> (n, m)
Tell = Callable[[], None]


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Correspondences:
    """For views (a, b) the points of a that b sees too (m, 2), and where they are in b (m, 2); float32."""

    views: int
    size: tuple[int, int]  # height and width at which they were looked for: a point stands for one pixel of that
    points: dict[Pair, tuple[torch.Tensor, torch.Tensor]]

    def __len__(self) -> int:
        return sum(len(here) for here, _ in self.points.values())


def found(matches: Correspondences, remedy: str) -> Correspondences:
    """Raises ValueError where there are none."""
    if not len(matches):
        raise ValueError(f"No point of one view was found in another: {remedy}.")
    return matches


def sampled(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(n, H, W, ...) -> (n, height, width, ...), what is at the centre of each new pixel: depth and coordinates cannot be mixed."""
    rows, columns = (
        ((torch.arange(n) + 0.5) * of / n).long() for n, of in zip((height, width), maps.shape[1:3], strict=True)
    )
    return maps[:, rows][:, :, columns]  # fmt: skip


def at_most(height: int, width: int, side: int) -> tuple[int, int]:
    """The same shape with no side longer than `side`."""
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def checked_masks(masks: torch.Tensor | None, views: int, height: int, width: int) -> torch.Tensor:
    """(views, height, width) bool, all true without masks. Raises ValueError for another number, and for an empty one."""
    if masks is None:
        return torch.ones(views, height, width, dtype=torch.bool)
    if len(masks) != views:
        raise ValueError(f"There are {len(masks)} masks for {views} views: give 1 mask for each, or none.")
    inside = sampled(masks, height, width) > 0.5
    empty = (~inside.flatten(1).any(1)).nonzero().flatten()
    if len(empty):
        raise ValueError(f"Mask {int(empty[0]) + 1} is empty: white is where the object is.")
    return inside


def extent(points: list[torch.Tensor]) -> float:
    """Longest side of the box around points (m, 3): what tolerances are in relation to."""
    every = torch.cat(points)
    return float((every.amax(0) - every.amin(0)).max())


def from_depth(depth: torch.Tensor, cameras: list[Camera], masks: torch.Tensor, tolerance: float) -> Correspondences:
    """Of maps of depth (n, H, W) along the axis, and masks (n, H, W) bool.

    Each pixel of a is put into the scene and seen by b: it is the same point if the depth there agrees within `tolerance` of the
    object's size, and if, in turn, a sees what b has there at a's own depth.
    """
    views, height, width = depth.shape
    aspect, middle = width / height, centres(height, width).flatten(0, 1)
    depth, inside = depth.double().flatten(1), (masks & (depth > 0) & depth.isfinite()).flatten(1)
    scene = [unproject(camera, middle, d, aspect) for camera, d in zip(cameras, depth, strict=True)]
    slack = tolerance * extent([p[m] for p, m in zip(scene, inside, strict=True)]) if inside.any() else 0.0

    def seen(view: int, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, z = project(cameras[view], points, aspect)
        pixel, within = pixels(at, height, width)
        return at, pixel, within & (z > 0) & inside[view][pixel] & ((depth[view][pixel] - z).abs() <= slack)

    matches = {}
    for a, b in itertools.permutations(range(views), 2):
        here = inside[a].nonzero().flatten()
        at, pixel, there = seen(b, scene[a][here])
        there &= seen(a, scene[b][pixel])[2]
        matches[a, b] = middle[here[there]].float(), at[there].float()
    return Correspondences(views, (height, width), matches)


def from_coordinates(
    coordinates: torch.Tensor, masks: torch.Tensor, tolerance: float, tell: Tell = nothing
) -> Correspondences:
    """Of maps that say for each pixel which point of the object it shows (n, H, W, 3), and masks (n, H, W) bool: pixels that are each
    other's nearest, and no farther than `tolerance` of the object's size. `tell()` now and then, to stop it by an exception."""
    views, height, width = masks.shape
    shown = [c[m].double() for c, m in zip(coordinates, masks, strict=True)]
    slack = tolerance * extent(shown)

    def distances(here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        return torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")

    matches = {}
    for a, b, i, j in _mutual(shown, distances, tell):
        near = (shown[a][i] - shown[b][j]).norm(dim=1) <= slack
        matches[a, b] = i[near], j[near]
    return _of_pixels(masks, matches)


def from_features(
    features: torch.Tensor, masks: torch.Tensor, threshold: float | None, tell: Tell = nothing
) -> Correspondences:
    """Of features (n, h, w, d), and masks (n, h, w) bool: patches that are each other's nearest by cosine, at least `threshold`; None
    finds it by Otsu's method among the cosines of all such patches."""
    unit = F.normalize(features.double(), dim=-1)
    shown = [f[m] for f, m in zip(unit, masks, strict=True)]
    pairs = list(_mutual(shown, lambda here, there: -here @ there.T, tell))
    cosines = [(shown[a][i] * shown[b][j]).sum(1) for a, b, i, j in pairs]
    least = otsu(torch.cat(cosines))[0] if threshold is None else threshold
    kept = {(a, b): (i[c >= least], j[c >= least]) for (a, b, i, j), c in zip(pairs, cosines, strict=True)}
    return _of_pixels(masks, kept)


def _mutual(shown: list[torch.Tensor], far: Far, tell: Tell) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Views a < b and the rows (m), (m) of theirs that are each other's nearest by `far`."""
    for a, b in itertools.combinations(range(len(shown)), 2):
        there, back = _nearest(shown[a], shown[b], far, tell)
        own = torch.arange(len(there))
        own = own[back[there] == own]
        yield a, b, own, there[own]


def _nearest(here: torch.Tensor, there: torch.Tensor, far: Far, tell: Tell) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest row of the other for each row of the one (n), and of the one for each of the other (m)."""
    forth, back, least = [], torch.zeros(len(there), dtype=torch.long), torch.full((len(there),), torch.inf).double()
    for start, block in zip(range(0, len(here), BLOCK), here.split(BLOCK), strict=True):
        tell()
        table = far(block, there)
        forth.append(table.argmin(1))
        nearest, row = table.min(0)
        back = torch.where(nearest < least, start + row, back)
        least = torch.minimum(least, nearest)
    return torch.cat(forth), back


def _of_pixels(masks: torch.Tensor, matches: dict[Pair, tuple[torch.Tensor, torch.Tensor]]) -> Correspondences:
    """Of numbers among the pixels inside each mask; both ways round."""
    views, height, width = masks.shape
    middle = centres(height, width).float()
    places = [middle[mask] for mask in masks]
    points = {}
    for (a, b), (i, j) in matches.items():
        points[a, b] = places[a][i], places[b][j]
        points[b, a] = places[b][j], places[a][i]
    return Correspondences(views, (height, width), points)
