"""Captions and pictures, each as a CLIP sees them: what a prior learns from.

They are measured once and kept in shards, which are mapped into memory and not read before they are drawn, so a set may be larger
than memory; a measuring that was broken off goes on with the next shard.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import artefact
from ..features import Extractor, extract

SHARD = 512  # pairs in a file, or fewer where pictures could not be read


class Texts(NamedTuple):
    """n captions as a text encoder reads them."""

    pooled: torch.Tensor  # (n, d) what the whole caption means, in the space it shares with pictures
    states: torch.Tensor  # (n, L, w) each word in its place, after the last norm
    mask: torch.Tensor  # (n, L) bool, True up to and with the end of the text

    def rows(self, which) -> Texts:
        return Texts(self.pooled[which], self.states[which], self.mask[which])

    def to(self, device, dtype: torch.dtype = torch.float32) -> Texts:
        return Texts(self.pooled.to(device, dtype), self.states.to(device, dtype), self.mask.to(device))


@dataclass(frozen=True)
class Encoders:
    """What makes pairs: both towers of one CLIP, or of two."""

    text: str  # identity of the text encoder: hex digits that change with its weights
    read: Callable[[list[str]], Texts]
    images: Extractor


class Pairs:
    """n captions and n pictures. PAIRS on the canvas."""

    def __init__(self, shards: list[dict[str, torch.Tensor]], nothing: Texts, text: str, image: str, space: str = ""):
        """`nothing` is the empty caption; `text` and `image` are the identities of the encoders; `space` names the image encoder for
        people."""
        self.nothing, self.text, self.image, self.space = nothing, text, image, space
        self.pooled, self.images = (torch.cat([s[k] for s in shards]).float() for k in ("pooled", "image"))
        self._words = [(s["states"], s["mask"]) for s in shards]  # mapped files: what is not drawn is not read
        self._ends = list(itertools.accumulate(len(states) for states, _ in self._words))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def words(self) -> tuple[int, int]:
        """How many places a caption has, and the width of each."""
        return tuple(self._words[0][0].shape[1:])

    def texts(self, rows: list[int]) -> Texts:
        states, masks = [], []
        for row in rows:
            shard = bisect.bisect(self._ends, row)
            for into, part in zip((states, masks), self._words[shard], strict=True):
                into.append(part[row - self._ends[shard]])  # counted from its end
        return Texts(self.pooled[rows], torch.stack(states).float(), torch.stack(masks))


Pair = tuple[torch.Tensor, str]  # a picture (1, H, W, C) in 0..1 and its caption


def measured(
    parts: Iterable[tuple[str, Callable[[], Iterator[Pair]]]],
    encoders: Encoders,
    cache: Path,
    tell: Callable[[int], None] = lambda n: None,
) -> Pairs:
    """Pairs of SHARD pictures for each of `parts` (the last may have fewer): a key that changes with its contents, and what reads
    them; a part that is in `cache` is not read, and one that gives nothing is left out. `tell(n)` as they come. Raises ValueError
    where there is nothing at all, and on numbers that are not finite."""
    shards, done = [], 0
    for key, read in parts:
        name = hashlib.sha256(f"{encoders.text} {encoders.images.identity} {key}".encode()).hexdigest()[:16]
        file = cache / f"{name}{artefact.SUFFIX}"
        if not file.exists():
            made = _shard(read(), encoders, lambda n, before=done: tell(before + n))
            if not made:
                continue
            artefact.write(file, made, {"key": key})
        shards.append(artefact.read(file)[0])
        done += len(shards[-1]["image"])
        tell(done)
    if not shards:
        raise ValueError("None of the pictures could be read: look at them, or choose another folder.")
    space = f"{encoders.images.name}, {shards[0]['image'].shape[1]} numbers"
    return Pairs(shards, encoders.read([""]), encoders.text, encoders.images.identity, space)


def _shard(pairs: Iterator[Pair], encoders: Encoders, tell: Callable[[int], None]) -> dict[str, torch.Tensor]:
    """{} where there is no pair."""
    captions: list[str] = []

    def pictures() -> Iterator[torch.Tensor]:
        for picture, caption in itertools.chain(first, pairs):
            captions.append(caption)
            yield picture

    if not (first := list(itertools.islice(pairs, 1))):
        return {}

    images = extract(encoders.images, pictures(), tell).values
    pooled, states, mask = (x.cpu() for x in encoders.read(captions))
    if not (pooled.isfinite().all() and states.isfinite().all()):
        raise ValueError("The CLIP gives numbers that are not finite for a caption: look at its weights.")
    return {"image": images, "pooled": pooled.float(), "states": states.half(), "mask": mask}
