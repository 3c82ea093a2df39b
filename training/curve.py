"""One figure against another, a point for each setting, in order: where more of the one costs the other."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 560, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 40, 40, 60  # margins
DOT, TICKS = 4, 4
PAPER, INK, PALE, LINE = (255, 255, 255), (32, 32, 32), (214, 214, 214), (220, 80, 30)


class Value(NamedTuple):
    """A figure with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> list[float]:
        return [x for x in self if x is not None]


class Point(NamedTuple):
    label: str
    x: Value
    y: Value


def curve(points: list[Point], x_name: str, y_name: str) -> Image.Image:
    """Points joined in the given order, with crosses for their intervals."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(16), ImageFont.load_default(13)
    across = Scale([e for p in points for e in p.x.ends], LEFT, WIDTH - RIGHT)
    upward = Scale([e for p in points for e in p.y.ends], HEIGHT - BOTTOM, TOP)
    for value, at in across.ticks():
        pen.line((at, TOP, at, HEIGHT - BOTTOM), PALE)
        pen.text((at, HEIGHT - BOTTOM + 6), f"{value:.3g}", INK, small, anchor="ma")
    for value, at in upward.ticks():
        pen.line((LEFT, at, WIDTH - RIGHT, at), PALE)
        pen.text((LEFT - 8, at), f"{value:.3g}", INK, small, anchor="rm")
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), x_name, INK, font, anchor="ms")
    pen.text((8, 10), y_name, INK, font)
    places = [(across.at(p.x.value), upward.at(p.y.value)) for p in points]
    pen.line(places, LINE, 2)
    for point, (x, y) in zip(points, places, strict=True):
        if point.x.low is not None:
            pen.line((across.at(point.x.low), y, across.at(point.x.high), y), LINE)
        if point.y.low is not None:
            pen.line((x, upward.at(point.y.low), x, upward.at(point.y.high)), LINE)
        pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=INK)
        pen.text((x + 7, y - 18), point.label, INK, font)
    return canvas


class Scale:
    """Values to pixels, from `start` to `end`, with a little room at both ends."""

    def __init__(self, values: list[float], start: float, end: float):
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or abs(high) * 0.06 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, float]]:
        values = [self.low + (self.high - self.low) * (i + 0.5) / TICKS for i in range(TICKS)]
        return [(v, self.at(v)) for v in values]
