"""What is suspicious about a set of pictures and captions, before a training learns it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

ALIKE = 0.98  # correlation of two thumbnails above which they are near-duplicates
THUMBNAIL = 16
LOST = 0.4  # share of a picture that a square crop may lose before it is said
BORDER = 0.02  # of a side; a flat frame thicker than this is named
FLAT, STEP = 2 / 255, 24 / 255  # a border varies less than this, and what follows differs by more
MARK_SIZE, MARK_CONTRAST, MARK_SHARE = 256, 0.03, 0.9  # pixels, high-pass contrast, share of the pictures that have it
MARK_AREA = (0.0003, 0.2)  # of the picture; less is noise, more is what the pictures are about
FEWEST_FOR_MARKS = 6
LONG = 60  # words; CLIP reads 75 pieces of words, and a word is often more than one


class Finding(NamedTuple):
    """One thing to look at: what, and which pictures (from 0)."""

    what: str
    rows: list[int]
    detail: dict[int, str] = {}  # more about single pictures


def inspect(
    images: list[torch.Tensor],
    captions: list[str],
    size: int,
    style_words: list[str],
    tell: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Everything found in pictures (1, H, W, 3) in 0..1 and their captions (as many, or none), for squares of `size`;
    `tell()` between the searches."""
    searches = [
        lambda: too_small(images, size),
        lambda: cropped(images),
        lambda: near_duplicates(images),
        lambda: borders(images),
        lambda: marks(images),
    ]
    findings = []
    for search in searches:
        tell()
        findings.append(search())
    findings += caption_findings(captions, style_words) if captions else []
    return [f for f in findings if f.rows]


def too_small(images: list[torch.Tensor], size: int) -> Finding:
    short = {i: min(x.shape[1:3]) for i, x in enumerate(images)}
    detail = {i: f"enlarged {size / s:.1f} times" for i, s in short.items() if s < size}
    return Finding(f"too small for {size} pixels", list(detail), detail)


def cropped(images: list[torch.Tensor]) -> Finding:
    lost = {i: 1 - min(x.shape[1:3]) / max(x.shape[1:3]) for i, x in enumerate(images)}
    detail = {i: f"{100 * share:.0f} % is cut off" for i, share in lost.items() if share > LOST}
    return Finding("far from square", list(detail), detail)


def thumbnails(images: list[torch.Tensor]) -> torch.Tensor:
    """(n, 3 * 16 * 16) of mean 0 in each colour, so that a common tint is no likeness, and length 1; 0 for a picture of
    one colour."""
    x = torch.cat([F.interpolate(x.movedim(-1, 1), (THUMBNAIL, THUMBNAIL), mode="area") for x in images])
    return F.normalize((x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def near_duplicates(images: list[torch.Tensor]) -> Finding:
    """Later pictures that look like an earlier one, or like its mirror image; sizes may differ."""
    x, mirrored = thumbnails(images), thumbnails([i.flip(2) for i in images])
    plain = {i: tuple(x[0, 0, 0].tolist()) for i, x in enumerate(images) if bool((x == x[:, :1, :1]).all())}
    first = {colour: i for i, colour in reversed(plain.items())}
    detail = {i: f"like picture {first[colour] + 1}" for i, colour in plain.items() if first[colour] < i}
    for i in range(1, len(images)):
        for kind, others in (("like", x), ("the mirror image of", mirrored)):
            alike = others[:i] @ x[i]
            best = int(alike.argmax())
            if i not in detail and alike[best] > ALIKE:
                detail[i] = f"{kind} picture {best + 1}"
    return Finding("near-duplicates", list(detail), detail)


def border(image: torch.Tensor) -> tuple[int, int, int, int]:
    """Pixels of flat frame at the top, bottom, left and right of (1, H, W, 3): one colour, then an abrupt change.

    A plain background is no frame: where it ends, most of the row is still plain.
    """
    x = image[0]
    sides = (x, x.flip(0), x.transpose(0, 1), x.transpose(0, 1).flip(0))
    return tuple(_flat_rows(side) for side in sides)


def _flat_rows(x: torch.Tensor) -> int:
    colour = x[0].median(0).values
    off = (x - colour).abs().amax(-1)  # (rows, columns)
    flat = off.amax(1) <= FLAT
    count = int((~flat).int().argmax()) if (~flat).any() else 0
    if count == 0 or count > len(x) // 2:
        return 0
    return count if (off[count : count + 2].amax(0) > STEP).float().mean() > 0.5 else 0


def borders(images: list[torch.Tensor]) -> Finding:
    """Frames and bars: on two opposite sides at least, for one flat side may be a floor or a sky."""
    detail = {}
    for i, image in enumerate(images):
        above, below, left, right = border(image)
        high, wide = BORDER * image.shape[1], BORDER * image.shape[2]
        said = [f"{above} pixels above, {below} pixels below"] if min(above, below) > high else []
        said += [f"{left} pixels left, {right} pixels right"] if min(left, right) > wide else []
        if said:
            detail[i] = ", ".join(said)
    return Finding("a border", list(detail), detail)


def marks(images: list[torch.Tensor]) -> Finding:
    """Sharp marks at one and the same place in nine of ten pictures: a watermark, a signature, a date."""
    if len(images) < FEWEST_FOR_MARKS:
        return Finding("", [])
    grey = torch.stack(
        [
            F.interpolate(x.mean(-1, keepdim=True).movedim(-1, 1), (MARK_SIZE, MARK_SIZE), mode="area")[0, 0]
            for x in images
        ]
    )
    sharp = grey - F.avg_pool2d(grey[:, None], 9, 1, 4, count_include_pad=False)[:, 0]
    there = torch.maximum(*((sign * sharp > MARK_CONTRAST).float().mean(0) for sign in (1, -1))) >= MARK_SHARE
    share = there.float().mean().item()
    if not MARK_AREA[0] <= share <= MARK_AREA[1]:
        return Finding("", [])
    rows, columns = there.nonzero().float().mean(0).tolist()
    vertical = ("top", "middle", "bottom")[min(2, int(3 * rows / MARK_SIZE))]
    horizontal = ("left", "centre", "right")[min(2, int(3 * columns / MARK_SIZE))]
    return Finding(
        f"the same marks at the {vertical} {horizontal} of nearly every picture: a watermark?", list(range(len(images)))
    )


def words(caption: str) -> list[str]:
    return re.findall(r"[\w'-]+", caption.lower())


def caption_findings(captions: list[str], style_words: list[str]) -> list[Finding]:
    stripped = [" ".join(words(c)) for c in captions]
    many = {c for c, n in Counter(filter(None, stripped)).items() if n > 1}
    named = {
        i: [w for w in style_words if re.search(rf"\b{re.escape(' '.join(words(w)))}\b", c)]
        for i, c in enumerate(stripped)
    }
    detail = {i: ", ".join(found) for i, found in named.items() if found}
    lengths = {i: f"{len(c.split())} words" for i, c in enumerate(stripped) if len(c.split()) > LONG}
    return [
        Finding("without a caption", [i for i, c in enumerate(stripped) if not c]),
        Finding("with the caption of another picture", [i for i, c in enumerate(stripped) if c in many]),
        Finding("with a caption that names the style", list(detail), detail),
        Finding(f"with a caption of more than {LONG} words, whose end may not be read", list(lengths), lengths),
    ]


def in_every_caption(captions: list[str]) -> list[str]:
    """Words of at least 3 letters that every caption has: what all pictures share is learned with the style unless it is said."""
    sets = [set(words(c)) for c in captions if c.strip()]
    return sorted(w for w in set.intersection(*sets) if len(w) > 2) if len(sets) > 1 else []


def table(images: list[torch.Tensor], captions: list[str], names: list[str], size: int, found: list[Finding]) -> str:
    """For people: the set in two lines, then a block for each finding."""
    sizes = sorted((min(x.shape[1:3]), x.shape[2], x.shape[1]) for x in images)
    shapes = Counter(shape(x.shape[2], x.shape[1]) for x in images)
    span = " to ".join(dict.fromkeys(f"{w} x {h}" for _, w, h in (sizes[0], sizes[-1])))
    lines = [
        f"{len(images)} pictures, {span} pixels, {', '.join(f'{n} {kind}' for kind, n in shapes.most_common())}; trained on as squares of {size}"
    ]
    if captions:
        common = in_every_caption(captions)
        count = sum(bool(c.strip()) for c in captions)
        said = f"every caption says {', '.join(repr(w) for w in common)}" if common else "no word is in every caption"
        lines.append(f"{count} captions; {said}" if count > 1 else f"{count} caption")
    for f in found:
        lines.append(f"{len(f.rows)} {f.what}:" if len(f.rows) < len(images) else f"all: {f.what}")
        if len(f.rows) < len(images) or f.detail:
            lines += [f"- {names[i]}" + (f": {f.detail[i]}" if i in f.detail else "") for i in f.rows]
    return "\n".join(lines if found else [*lines, "Nothing to look at was found."])


def shape(width: int, height: int) -> str:
    ratio = width / height
    return "square" if 0.95 < ratio < 1.05 else "wide" if ratio > 1 else "tall"
