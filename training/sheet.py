"""Contact sheets: many pictures as one, labelled."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 8, 2
INK, PAPER = (32, 32, 32), (255, 255, 255)


def to_image(picture: torch.Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> picture."""
    return Image.fromarray((picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8).movedim(0, -1).contiguous().cpu().numpy())


def framed(picture: torch.Tensor, colour: tuple[int, int, int], width: int = 6) -> torch.Tensor:
    """(3, H, W) in 0..1 with a border of `width` pixels painted over its edge."""
    out = (torch.tensor(colour, dtype=picture.dtype) / 255)[:, None, None].expand_as(picture).clone()
    inside = slice(width, -width)
    out[:, inside, inside] = picture[:, inside, inside]
    return out


def sheet(
    rows: list[torch.Tensor], labels: list[str] | None = None, columns: int = 0, title: str = "", scale: int = 1
) -> Image.Image:
    """Each row (n, 3, H, W) in 0..1 with its label above it; rows longer than `columns` (0 = never) are broken.

    The title may have several lines.
    """
    size = max(14, 10 * scale)
    font = ImageFont.load_default(size)
    line = size + MARGIN
    cell_h, cell_w = (max(r.shape[a] for r in rows) * scale + GAP for a in (-2, -1))
    per_line = min(max(len(r) for r in rows), columns or 10**6)
    texts = labels or [""] * len(rows)
    heights = [(line if text else 0) + -(-len(r) // per_line) * cell_h for r, text in zip(rows, texts, strict=True)]
    titles = title.splitlines()
    canvas = Image.new("RGB", (2 * MARGIN + per_line * cell_w, 2 * MARGIN + sum(heights) + line * len(titles)), PAPER)
    pen, y = ImageDraw.Draw(canvas), MARGIN
    for text in titles:
        pen.text((MARGIN, y), text, INK, font)
        y += line
    for row, text, height in zip(rows, texts, heights, strict=True):
        if text:
            pen.text((MARGIN, y), text, INK, font)
        top = y + (line if text else 0)
        for k, picture in enumerate(row):
            image = to_image(picture)
            image = (
                image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
                if scale > 1
                else image
            )
            canvas.paste(image, (MARGIN + k % per_line * cell_w, top + k // per_line * cell_h))
        y += height
    return canvas


def save_sheet(file: Path, images: torch.Tensor, columns: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet([images], columns=columns).save(file)
