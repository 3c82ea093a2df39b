"""How often each value of a score occurs, and where its bounds lie."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont

from .curve import INK, LINE, PALE, PAPER, Scale

WIDTH, HEIGHT = 560, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 40, 28  # margins
BINS = 40
INSIDE, OUTSIDE = (80, 140, 90), (205, 195, 180)  # of bars between the bounds and beyond them


def counts(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """(BINS) how many of (n) values fall into equal parts of low..high, which holds all of them."""
    at = ((values.double() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(at, minlength=BINS)


def histogram(title: str, values: torch.Tensor, least: float | None, most: float | None = None) -> Image.Image:
    """(n) finite values as bars, n > 0, pale beyond the bounds, with a line for each bound that there is."""
    bounds = [bound for bound in (least, most) if bound is not None]
    across = Scale([*values.tolist(), *bounds], LEFT, WIDTH - RIGHT)
    bars = counts(values, across.low, across.high)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(16), ImageFont.load_default(13)
    pen.text((LEFT, 8), title, INK, font)
    bottom, step = HEIGHT - BOTTOM, (WIDTH - RIGHT - LEFT) / BINS
    pen.line((LEFT, bottom, WIDTH - RIGHT, bottom), PALE)
    for k, count in enumerate(bars.tolist()):
        middle = across.low + (k + 0.5) * (across.high - across.low) / BINS
        inside = (least is None or middle >= least) and (most is None or middle <= most)
        top = bottom - count / int(bars.max()) * (bottom - TOP)
        if count:
            pen.rectangle((LEFT + k * step, top, LEFT + (k + 1) * step - 1, bottom), INSIDE if inside else OUTSIDE)
    pen.text((LEFT - 6, TOP), str(int(bars.max())), INK, small, anchor="rm")
    for value, at in across.ticks():
        pen.text((at, bottom + 6), f"{value:.3g}", INK, small, anchor="ma")
    for bound in bounds:
        pen.line((across.at(bound), TOP - 8, across.at(bound), bottom), LINE, 2)
    return canvas


def stacked(panels: list[Image.Image]) -> Image.Image:
    """One above the other."""
    canvas = Image.new("RGB", (WIDTH, sum(p.height for p in panels)), PAPER)
    y = 0
    for panel in panels:
        canvas.paste(panel, (0, y))
        y += panel.height
    return canvas
