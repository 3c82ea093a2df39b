"""The painted training set on disk: shards of 1000 pictures; scenes and captions are made again from their seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from .. import artefact
from .grammar import captions
from .instance import GROUP, sample_groups
from .painter import paint
from .world import ATTRIBUTES, FACTORS, VERSION, Scenes, sample_scenes

SHARD = 1000
SPLITS = {
    "train": 20,
    "held out": 1,
    "judge": 8,
    "judge held out": 1,
    "instances": 36,
    "instances held out": 2,
}  # shards
_SEED = {
    "train": 10_000, "held out": 20_000, "judge": 30_000, "judge held out": 40_000,
    "instances": 50_000, "instances held out": 60_000,
}  # fmt: skip


def scenes_of(split: str, shard: int) -> Scenes:
    """The judge must know all 72 combinations, held-out ones included, each equally often; instances come in groups that
    look alike; the others follow the world."""
    seed = _SEED[split] + shard
    if split.startswith("instances"):
        return sample_groups(SHARD // GROUP, seed)
    if not split.startswith("judge"):
        return sample_scenes(SHARD, seed)
    generator = torch.Generator().manual_seed(
        seed + 1_000_000
    )  # not the seed of shape and colour: they would go together
    factors = {f: torch.randint(0, len(ATTRIBUTES[f]), (SHARD,), generator=generator) for f in FACTORS}
    return sample_scenes(SHARD, seed, **factors)


def shard_file(folder: Path, split: str, shard: int) -> Path:
    return folder / f"world-{VERSION}" / f"{split.replace(' ', '-')}-{shard:02d}.safetensors"


def paint_all(folder: Path, rank: int, processes: int) -> Iterator[str]:
    """Paint what is missing, every `processes`-th shard; yields the name of each one painted (about 20 s a shard)."""
    todo = [(split, k) for split, n in SPLITS.items() for k in range(n)]
    for split, k in todo[rank::processes]:
        if not shard_file(folder, split, k).exists():
            paint_shard(folder, split, k)
            yield f"{split} {k}"


def paint_shard(folder: Path, split: str, shard: int) -> None:
    scenes = scenes_of(split, shard)
    parts = [paint(scenes[i : i + 50]).image for i in range(0, SHARD, 50)]
    artefact.write(shard_file(folder, split, shard), {"image": (torch.cat(parts) * 255 + 0.5).to(torch.uint8)})


def load(folder: Path, split: str, shards: int | None = None) -> tuple[torch.Tensor, Scenes]:
    """(n, 3, 128, 128) uint8 pictures and their scenes; paints what is missing."""
    count = shards or SPLITS[split]
    for k in range(count):
        if not shard_file(folder, split, k).exists():
            paint_shard(folder, split, k)
    images = torch.cat([artefact.read(shard_file(folder, split, k))[0]["image"] for k in range(count)])
    parts = [scenes_of(split, k) for k in range(count)]
    return images, Scenes(
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in Scenes.__dataclass_fields__}
    )


def caption_variants(scenes: Scenes, variants: int) -> list[list[str]]:
    return [captions(scenes, seed=100 + v) for v in range(variants)]
