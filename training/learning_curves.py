"""How a training went: a small plot for each thing that its steps logged."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .curve import INK, LINE, PALE, PAPER, Scale

WIDTH, HEIGHT = 440, 220  # of one plot
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 30  # margins
COLUMNS = 2
DOT = 1
SINGLE = (160, 160, 160)  # the colour of a step
SPARSE = 5  # steps from one value to the next; those that come more seldom are joined as they are

Titles = dict[str, tuple[str, str]]  # a heading, and what it means
TITLES: Titles = {
    "loss": ("Loss", "how far its guesses are off; lower is better"),
    "cosine": ("Cosine of the two gradients", "pictures and negatives: 1 the same way, 0 nothing shared"),
    "removed": ("Fraction removed", "of a step, because the negatives ask for it, too"),
    "signal": ("Signal to noise of the gradient", "below 1 a step is mostly chance"),
    "norm": ("Length of the word", "against its start, which is 1"),
    "usual": ("Length of the word", "against the median of the encoder's own words, 1"),
    "centred cosine": ("Centred cosine", "with the true embedding; about what the caption explains is right"),
    "frechet": ("Frechet distance", "of what is made from what is real; 0 is best"),
    "energy": ("Energy distance", "of what is made from what is real; 0 is best"),
    "diversity": ("Diversity", "within a caption, against the truth; 1 is best, 0 always says the same"),
    "rank": ("Rank of the own caption", "among those held out; 1 is best"),
    "skipped": ("Skipped steps", "so far, as their gradient was not a number"),
}
SMOOTH = ("norm", "usual", "skipped")  # by themselves: a mean would only lag behind
LORA = {"norm": ("Size of the LoRA's changes", "all layers together (Frobenius norm)")}
PRIOR = {
    "cosine": ("Cosine with the true embedding", "highest for one that always says the same: read the others"),
    "norm": ("Length of the embeddings", "against real ones, 1"),
}
IMAGE_TOKENS = {"norm": ("Length of the tokens", "against the text encoder's own words, 1")}
OWN = {
    "tokens": IMAGE_TOKENS,
    "rank": LORA,
    "pairs": PRIOR,
}  # by a setting; that of tokens before the rank of their LoRA


class Series(NamedTuple):
    """What was logged under one name, in order."""

    steps: list[int]
    values: list[float]

    @property
    def sparse(self) -> bool:
        """Logged now and then, or once."""
        return len(self.steps) < 2 or (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1) >= SPARSE


def logged(records: list[dict]) -> dict[str, Series]:
    """The series that there are, in the order of TITLES. Skipped steps are one only where a step was skipped."""
    found = {}
    for name in TITLES:
        pairs = [(r["step"], float(r[name])) for r in records if name in r]
        if pairs and (name != "skipped" or pairs[-1][1]):
            found[name] = Series(*(list(column) for column in zip(*pairs, strict=True)))
    return found


def own_titles(config: dict) -> Titles:
    """What some names mean in a training of these settings."""
    return next((titles for setting, titles in OWN.items() if setting in config), {})


def trailing_mean(values: list[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values up to it, of fewer at the beginning."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def learning_curves(series: dict[str, Series], window: int, own: Titles | None = None) -> Image.Image:
    """All plots on one sheet, two in a row; `window` is the number of steps that a line is the mean of, `own` what some names mean in
    this kind of training, beside TITLES."""
    titles = {**TITLES, **(own or {})}
    columns = min(COLUMNS, len(series))
    canvas = Image.new("RGB", (WIDTH * columns, HEIGHT * -(-len(series) // columns)), PAPER)
    ends = min(s.steps[0] for s in series.values()), max(s.steps[-1] for s in series.values())
    for i, (name, one) in enumerate(series.items()):
        as_it_is = one.sparse or name in SMOOTH
        drawn = plot(one, one.values if as_it_is else trailing_mean(one.values, window), titles[name], ends)
        canvas.paste(drawn, (i % columns * WIDTH, i // columns * HEIGHT))
    return canvas


def plot(series: Series, line: list[float], title: tuple[str, str], ends: tuple[int, int]) -> Image.Image:
    """A dot for each value and a line, from step `ends[0]` to `ends[1]`; the numbers stand at the axes' ends."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    low, high = min(series.values), max(series.values)
    across, upward = Scale([*ends], LEFT, WIDTH - RIGHT), Scale([low, high], HEIGHT - BOTTOM, TOP)
    pen.text((LEFT, 5), title[0], INK, font)
    pen.text((LEFT, 24), title[1], INK, small)
    for value in sorted({low, high}):
        pen.line((LEFT, upward.at(value), WIDTH - RIGHT, upward.at(value)), PALE)
        pen.text((LEFT - 6, upward.at(value)), f"{value:.3g}", INK, small, anchor="rm")
    for step, anchor in zip(sorted({*ends}), ("la", "ra"), strict=False):
        pen.text((LEFT if anchor == "la" else WIDTH - RIGHT, HEIGHT - BOTTOM + 6), f"step {step}", INK, small, anchor)
    dot = 2 * DOT if series.sparse else DOT
    for x, y in places(series.steps, series.values, across, upward):
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=INK if series.sparse else SINGLE)
    pen.line(places(series.steps, line, across, upward), LINE, 2)
    return canvas


def places(steps: list[int], values: list[float], across: Scale, upward: Scale) -> list[tuple[float, float]]:
    return [(across.at(step), upward.at(value)) for step, value in zip(steps, values, strict=True)]
