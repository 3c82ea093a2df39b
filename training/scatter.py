"""Two sets of pictures as points: the view that shows most of how the reference varies."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, DOT = 512, 32, 3
MOST = 2000  # points of each set; more only blacken the paper
PAPER, INK = (255, 255, 255), (32, 32, 32)
COLOURS = ((90, 90, 90), (220, 80, 30))  # reference, made


def plane(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d) and the two directions (d, 2) along which a set varies most."""
    mean = real.double().mean(0)
    _, _, directions = torch.linalg.svd(real[:MOST].double() - mean, full_matrices=False)
    return mean, directions[:2].T


def scatter(real: torch.Tensor, made: torch.Tensor, labels: tuple[str, str]) -> Image.Image:
    """(n, d) and (m, d) features -> a square picture; the reference gives the plane, both are seen in it."""
    mean, directions = plane(real)
    points = [(x[:MOST].double() - mean) @ directions for x in (real, made)]
    reach = torch.cat(points).abs().amax().clamp_min(1e-9)
    canvas = Image.new("RGB", (SIZE, SIZE + 2 * MARGIN), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for cloud, colour, label, y in zip(points, COLOURS, labels, (8, 32), strict=True):
        pen.ellipse((MARGIN - 14, y + 4, MARGIN - 6, y + 12), fill=colour)
        pen.text((MARGIN, y), label, INK, font)
        for u, v in (cloud / reach).tolist():
            centre = SIZE / 2 + u * (SIZE / 2 - MARGIN), 2 * MARGIN + SIZE / 2 - v * (SIZE / 2 - MARGIN)
            pen.ellipse([c + d for d in (-DOT, DOT) for c in centre], fill=colour)
    return canvas
