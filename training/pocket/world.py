"""The little world: what a scene is made of, and how scenes are drawn at random.

A scene is one object (shape, colour, surface pattern with an instance seed) on a background under a light, seen by a
camera, in a *medium* = stroke x paper x line. Everything is an index or a number, so every picture has exact labels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy
import torch

VERSION = "1"  # of world, grammar, held-out combinations and VAE encoder; artefacts of another version are refused

SIZE = 128  # pixels; the VAE makes 16 x 16 latents of it

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("sphere", "cube", "cone", "cylinder", "ring", "diamond", "star", "heart"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "pattern": ("plain", "striped", "spotted", "checkered", "blotched", "dipped"),
    "background": ("studio", "meadow", "desert", "night", "snow", "sea"),
    "stroke": ("smooth", "flat", "hatching", "dots", "wash", "pixel"),
    "paper": ("scene", "white", "cream", "dark"),
    "line": ("none", "ink", "glow"),
}
FACTORS = ("stroke", "paper", "line")


def _combination(stroke: str, paper: str, line: str) -> tuple[int, int, int]:
    return tuple(ATTRIBUTES[f].index(v) for f, v in zip(FACTORS, (stroke, paper, line), strict=True))


MEDIUMS: dict[str, tuple[int, int, int]] = {  # the ten combinations that have a name
    "photo": _combination("smooth", "scene", "none"),
    "poster": _combination("flat", "cream", "none"),
    "comic": _combination("flat", "scene", "ink"),
    "engraving": _combination("hatching", "white", "ink"),
    "newsprint": _combination("dots", "cream", "none"),
    "watercolor": _combination("wash", "white", "none"),
    "pixel art": _combination("pixel", "scene", "none"),
    "neon": _combination("smooth", "dark", "glow"),
    "chalk": _combination("hatching", "dark", "glow"),
    "pop art": _combination("dots", "white", "ink"),
}
# Never painted for training, and the grammar has no word for them: the styles that remain to be learned. Every stroke
# once, every paper and line at least once, so that no factor level is favoured.
HELD_OUT: tuple[tuple[int, int, int], ...] = (
    _combination("dots", "dark", "glow"),
    _combination("wash", "cream", "ink"),
    _combination("pixel", "white", "glow"),
    _combination("smooth", "cream", "ink"),
    _combination("flat", "dark", "none"),
    _combination("hatching", "scene", "none"),
)
NAMED_SHARE = 0.5  # of the pictures are in a named medium


def combination_weights() -> torch.Tensor:
    """(6, 4, 3) probabilities of the combinations: 0 where held out, every factor level equally likely.

    Iterative proportional fitting towards uniform marginals from a start that favours the named mediums.
    """
    sizes = [len(ATTRIBUTES[f]) for f in FACTORS]
    w = torch.full(sizes, (1 - NAMED_SHARE) / (torch.tensor(sizes).prod().item() - len(MEDIUMS)), dtype=torch.float64)
    for combination in MEDIUMS.values():
        w[combination] = NAMED_SHARE / len(MEDIUMS)
    for combination in HELD_OUT:
        w[combination] = 0
    for _ in range(200):
        for axis, size in enumerate(sizes):
            others = tuple(a for a in range(3) if a != axis)
            w = w / (w.sum(others, keepdim=True) * size)
    return w


@dataclass
class Scenes:
    """n scenes as columns: int64 attribute indices, int64 seeds, float32 geometry. Each tensor has shape (n,)."""

    shape: torch.Tensor
    colour: torch.Tensor
    pattern: torch.Tensor
    background: torch.Tensor
    stroke: torch.Tensor
    paper: torch.Tensor
    line: torch.Tensor
    instance: torch.Tensor  # seed of the surface pattern: the same object has the same instance in every picture
    setting: torch.Tensor  # seed of what surrounds it: hills, moon, waves, blotches of a wash
    yaw: torch.Tensor  # radians, of the object about the vertical
    pitch: torch.Tensor  # radians, how far the camera looks down
    scale: torch.Tensor  # of the object
    offset: torch.Tensor  # of the object to the right, in world units
    light_azimuth: torch.Tensor  # radians, negative from the left
    light_elevation: torch.Tensor  # radians above the ground

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def combination(self, i: int) -> tuple[int, int, int]:
        """Stroke, paper and line of scene i."""
        return int(self.stroke[i]), int(self.paper[i]), int(self.line[i])

    def factors(self) -> torch.Tensor:
        """(n, 3) stroke, paper, line."""
        return torch.stack([self.stroke, self.paper, self.line], 1)


GEOMETRY = {  # ranges of the numbers, uniform
    "yaw": (-0.6, 0.6),
    "pitch": (0.12, 0.5),
    "scale": (0.9, 1.08),
    "offset": (-0.22, 0.22),
    "light_azimuth": (-1.1, 1.1),
    "light_elevation": (0.5, 1.0),
}


def sample_scenes(n: int, seed: int, **fixed: int | float | torch.Tensor) -> Scenes:
    """n random scenes; `fixed` sets whole columns (`shape=3`, `stroke=tensor`). The same seed gives the same scenes."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, torch.Tensor] = {
        name: torch.randint(0, len(ATTRIBUTES[name]), (n,), generator=generator)
        for name in ("shape", "colour", "pattern", "background")
    }
    weights = combination_weights()
    flat = torch.multinomial(weights.flatten(), n, replacement=True, generator=generator)
    for axis, name in enumerate(FACTORS):
        columns[name] = torch.stack(torch.unravel_index(flat, weights.shape))[axis]
    for name in ("instance", "setting"):
        columns[name] = torch.randint(0, 2**31, (n,), generator=generator)
    for name, (low, high) in GEOMETRY.items():
        columns[name] = low + (high - low) * torch.rand(n, generator=generator)
    for name, value in fixed.items():
        if name not in columns:
            raise ValueError(f"A scene has no {name!r}; it has {', '.join(columns)}.")
        columns[name] = torch.as_tensor(value, dtype=columns[name].dtype).expand(n).clone()
    return Scenes(**columns)


def uniforms(seed: torch.Tensor, k: int, salt: int = 0) -> torch.Tensor:
    """(n, k) numbers in [0, 1) that depend on nothing but each seed, `salt` and the column: splitmix64, vectorised."""
    with numpy.errstate(over="ignore"):
        z = seed.numpy().astype(numpy.uint64)[:, None] * numpy.uint64(0x9E3779B97F4A7C15)
        z = z + numpy.arange(1, k + 1, dtype=numpy.uint64) * numpy.uint64(0xD1B54A32D192ED03)
        z = z + numpy.uint64(salt) * numpy.uint64(0x8CB92BA72F3D8DD7)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = z ^ (z >> numpy.uint64(31))
    return torch.from_numpy((z >> numpy.uint64(40)).astype(numpy.float32) / numpy.float32(2**24))
