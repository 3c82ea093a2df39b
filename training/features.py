"""Pictures as vectors, for measuring sets of them.

An extractor says what it is; features of two extractors are never compared. Pictures are streamed: a set may be larger
than memory. What has been measured once is kept on disk under a hash of the pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import artefact

BATCH = 16


@dataclass(frozen=True)
class Extractor:
    """FEATURES on the canvas."""

    name: str  # for people: "Pocket", "CLIP vision, 1024 numbers"
    identity: str  # hex digits that change with the weights and the preprocessing
    pictures: Callable[[torch.Tensor], torch.Tensor]  # (B, H, W, 3) in 0..1 -> (B, d)
    texts: Callable[[list[str]], torch.Tensor] | None = None  # n texts -> (n, d) in the same space, where there is one


@dataclass(frozen=True)
class Features:
    """A set of pictures as one extractor sees it."""

    values: torch.Tensor  # (n, d) float32
    extractor: str
    identity: str

    def __len__(self) -> int:
        return len(self.values)


def in_batches(pictures: Iterable[torch.Tensor], size: int = BATCH) -> Iterator[torch.Tensor]:
    """(1, H, W, C) each -> (at most `size`, H, W, 3): neighbours of the same size go together, the order is kept."""
    held: list[torch.Tensor] = []
    for picture in pictures:
        rgb = picture[..., :3]
        if held and (len(held) == size or held[0].shape != rgb.shape):
            yield torch.cat(held)
            held = []
        held.append(rgb)
    if held:
        yield torch.cat(held)


@torch.no_grad()
def extract(
    extractor: Extractor, pictures: Iterable[torch.Tensor], tell: Callable[[int], None] = lambda n: None
) -> Features:
    """Features of single pictures (1, H, W, C) in 0..1; `tell(n)` after each batch. Raises ValueError on NaN."""
    rows: list[torch.Tensor] = []
    for batch in in_batches(pictures):
        seen = extractor.pictures(batch).float().cpu()
        bad = (~seen.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            at = sum(map(len, rows)) + int(bad[0]) + 1
            raise ValueError(
                f"{extractor.name} gives no finite numbers for picture {at}: look at that picture, or at the model's weights."
            )
        rows.append(seen)
        tell(sum(map(len, rows)))
    if not rows:
        raise ValueError("There are no pictures to measure: connect some, or choose a folder.")
    return Features(torch.cat(rows), extractor.name, extractor.identity)


def kept(cache: Path, extractor: Extractor, key: str, compute: Callable[[], Features]) -> Features:
    """The features of the set that `key` stands for: from `cache`, or computed and written there."""
    file = cache / extractor.identity / f"{key}{artefact.SUFFIX}"
    if file.exists():
        tensors, facts = artefact.read(file)
        return Features(tensors["features"], facts["extractor"], facts["identity"])
    made = compute()
    artefact.write(file, {"features": made.values}, {"extractor": made.extractor, "identity": made.identity})
    return made


def images_hash(images: Iterable[torch.Tensor]) -> str:
    """16 hex digits of pictures (B, H, W, C) in 0..1, as they would be saved with 8 bits."""
    digest = hashlib.sha256()
    for image in images:
        eight_bits = (image.clamp(0, 1) * 255).to(torch.uint8).cpu().numpy().tobytes()
        digest.update(str(tuple(image.shape)).encode() + eight_bits)
    return digest.hexdigest()[:16]


def check_comparable(a: Features, b: Features) -> None:
    """Raises ValueError where the two were not measured by the same extractor."""
    if a.identity != b.identity or a.values.shape[1] != b.values.shape[1]:
        raise ValueError(
            f"These features cannot be compared: one set was measured by {a.extractor} ({a.values.shape[1]} numbers each), the "
            f"other by {b.extractor} ({b.values.shape[1]}). Measure both with the same Load Features."
        )
