"""Two sets of pictures as points, in the view that shows most of how they vary, under a table of figures."""

from __future__ import annotations

import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, DOT = 560, 32, 3
COLUMNS = (16, 130, 240, 450)  # where those of a table begin
MOST = 2000  # points of each set; more only blacken the paper
PAPER, INK = (255, 255, 255), (32, 32, 32)
COLOURS = ((90, 90, 90), (220, 80, 30))  # reference, made


def plane(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d) and the two directions (d, 2) along which rows vary most."""
    mean = x.double().mean(0)
    _, _, directions = torch.linalg.svd(x.double() - mean, full_matrices=False)
    return mean, directions[:2].T


def scatter(real: torch.Tensor, made: torch.Tensor, labels: tuple[str, str]) -> Image.Image:
    """(n, d) and (m, d) features -> a square picture in the plane in which both sets together vary most."""
    generator = torch.Generator().manual_seed(0)
    shown = [x[torch.randperm(len(x), generator=generator)[:MOST]].double() for x in (real, made)]
    mean, directions = plane(torch.cat(shown))
    points = [(x - mean) @ directions for x in shown]
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


def written(title: str, rows: list[tuple[str, ...]], notes: list[str]) -> Image.Image:
    """A table as a picture of the same width: a title, columns, and notes broken into lines."""
    font, small, step = ImageFont.load_default(17), ImageFont.load_default(13), 24
    lines = [line for note in notes for line in textwrap.wrap(note, 80)]
    canvas = Image.new("RGB", (SIZE, step * (len(rows) + 2) + 17 * len(lines)), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN // 2, 8), title, INK, font)
    for i, row in enumerate(rows):
        for column, cell in zip(COLUMNS, row, strict=True):
            pen.text((column, step * (i + 1) + 12), cell, INK, font)
    for i, line in enumerate(lines):
        pen.text((MARGIN // 2, step * (len(rows) + 1) + 16 + 17 * i), line, INK, small)
    return canvas


def stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (SIZE, above.height + below.height), PAPER)
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height))
    return canvas
