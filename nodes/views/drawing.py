"""Correspondences for the eye: lines between views that lie side by side."""

from __future__ import annotations

import colorsys

import numpy
import torch
from PIL import Image, ImageDraw

from ...training.sheet import to_image
from .correspondences import Correspondences

GAP, PAPER = 8, (255, 255, 255)


def lines(pictures: list[torch.Tensor], matches: Correspondences, most: int) -> Image.Image:
    """Pictures (H, W, 3) in a row, and between each and the next at most `most` lines, taken evenly from above to below. What lies low
    in the first has another colour than what lies high."""
    canvas, left = _row(pictures)
    pen, dot = ImageDraw.Draw(canvas), max(1, pictures[0].shape[1] // 128)
    for view in range(matches.views - 1):
        here, there = _between(matches, view)
        here, there = (points[evenly(len(points), most)].tolist() for points in (here, there))
        for a, b in zip(here, there, strict=True):
            ends = [_place(view + k, point, pictures, left) for k, point in enumerate((a, b))]
            colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(0.85 * a[1], 0.9, 0.95))
            pen.line(ends, colour, width=dot)
            for x, y in ends:
                pen.ellipse((x - 2 * dot, y - 2 * dot, x + 2 * dot, y + 2 * dot), colour)
    return canvas


def evenly(count: int, most: int) -> torch.Tensor:
    """At most `most` of the numbers below `count`, as far apart as can be."""
    if count <= most:
        return torch.arange(count)
    return ((torch.arange(most) + 0.5) * count / most).long()


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3) in 0..1."""
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]


def _row(pictures: list[torch.Tensor]) -> tuple[Image.Image, list[int]]:
    left = [sum(p.shape[1] + GAP for p in pictures[:n]) for n in range(len(pictures) + 1)]
    canvas = Image.new("RGB", (left[-1] - GAP, max(p.shape[0] for p in pictures)), PAPER)
    for picture, x in zip(pictures, left, strict=False):
        canvas.paste(to_image(picture[..., :3].movedim(-1, 0)), (x, 0))
    return canvas, left


def _between(matches: Correspondences, view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a view and the next, known from either side."""
    nothing = (torch.empty(0, 2),) * 2
    here, there = matches.points.get((view, view + 1), nothing)
    if not len(here):
        there, here = matches.points.get((view + 1, view), nothing)
    order = here[:, 1].argsort(stable=True)
    return here[order], there[order]


def _place(view: int, point: list[float], pictures: list[torch.Tensor], left: list[int]) -> tuple[float, float]:
    height, width = pictures[view].shape[:2]
    return left[view] + point[0] * width - 0.5, point[1] * height - 0.5
