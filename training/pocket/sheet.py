"""Contact sheets of many pictures."""

from pathlib import Path

import torch
from PIL import Image


def sheet(images: torch.Tensor, columns: int, gap: int = 2) -> Image.Image:
    """(n, 3, H, W) in 0..1 -> one picture, row by row, on white."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(3, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for k, image in enumerate(images):
        y, x = (gap + i * size for i, size in zip(divmod(k, columns), (height + gap, width + gap), strict=True))
        canvas[:, y : y + height, x : x + width] = image
    return Image.fromarray((canvas.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy())


def save_sheet(file: Path, images: torch.Tensor, columns: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, columns).save(file)
