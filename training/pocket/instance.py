"""Do two pictures show the same object, down to how its pattern lies? A small CNN whose vectors answer by their cosine.

Trained by supervised contrast (Khosla et al. 2020) among pictures of objects that share shape, colour and pattern, so
that only the instance (the pattern's angle, period, phase and second colour) tells them apart; view, light, place and
mostly the medium differ from picture to picture. While it learns it also reads the instance's numbers off the picture,
which says what to look for long before the contrast does. Of a sphere, a cone or a cylinder nobody can see how it is
turned, so the phase of its pattern tells nothing and some pairs have no answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .world import ATTRIBUTES, FACTORS, Scenes, sample_scenes, uniforms

INSTANCES, VIEWS = 5, 4  # of a group: objects that look alike, and pictures of each
GROUP = INSTANCES * VIEWS
WIDTH, SEEN, NUMBERS = 64, 32 * 8 * 8, 11


def sample_groups(count: int, seed: int) -> Scenes:
    """count * 20 scenes, a group after the other, in it an instance after the other.

    A group shares shape, colour and pattern (any but plain, which has no instance to see). In every second group all
    pictures share the medium too; the others mix all 72.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, *names: str) -> dict[str, torch.Tensor]:
        return {k: torch.randint(0, len(ATTRIBUTES[k]), (n,), generator=generator) for k in names}

    shared = draw(count, "shape", "colour")
    patterned = [i for i, name in enumerate(ATTRIBUTES["pattern"]) if name != "plain"]
    shared["pattern"] = torch.tensor(patterned)[torch.randint(0, len(patterned), (count,), generator=generator)]
    one, mixed = draw(count, *FACTORS), draw(count * GROUP, *FACTORS)
    alike = (torch.arange(count) % 2 == 0).repeat_interleave(GROUP)
    media = {k: torch.where(alike, one[k].repeat_interleave(GROUP), mixed[k]) for k in FACTORS}
    instance = torch.randint(0, 2**31, (count * INSTANCES,), generator=generator).repeat_interleave(VIEWS)
    groups = {k: v.repeat_interleave(GROUP) for k, v in shared.items()}
    # Not the generator's seed: columns drawn from one seed go together.
    return sample_scenes(count * GROUP, seed + 2_000_000, **groups, **media, instance=instance)


class InstanceProbe(nn.Module):
    """(B, 3, 128, 128) in 0..1 -> (B, 64) of length 1. The place of things counts, so nothing is pooled away."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        layers, before = [], 3
        for i, width in enumerate([*channels, channels[-1]]):
            size, stride = (5, 2) if i == 0 else (3, 2 if i < len(channels) else 1)
            layers += [nn.Conv2d(before, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features = nn.Sequential(*layers, nn.Conv2d(before, 32, 1), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(SEEN, WIDTH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.features(images * 2 - 1)), dim=1)

    @torch.no_grad()
    def see(self, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
        """(n, 3, 128, 128) in 0..1 -> (n, 64)."""
        return torch.cat([self(part) for part in images.split(batch)])


class Lesson(nn.Module):
    """The probe with what is trained beside it and thrown away."""

    def __init__(self, probe: InstanceProbe):
        super().__init__()
        self.probe, self.reader = probe, nn.Linear(SEEN, NUMBERS)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 128, 128) in 0..1 -> vectors (B, 64), and the instance's numbers (B, 11) as far as they can be read."""
        seen = self.probe.features(images * 2 - 1)
        return F.normalize(self.probe.head(seen), dim=1), self.reader(seen)


def numbers(instance: torch.Tensor) -> torch.Tensor:
    """(n, 11) what the painter makes of an instance: angle, period, whether the second colour is light, and as points on
    circles its four phases; all within -1..1."""
    r = uniforms(instance, 10)
    phases = 2 * math.pi * r[:, 2:6]
    return torch.cat([2 * r[:, :2] - 1, (r[:, 9:] < 0.6) * 2.0 - 1, phases.sin(), phases.cos()], 1)


def contrast(vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean over one group (20, 64) of -log softmax of each picture's likeness to the others of its own instance."""
    own = torch.arange(GROUP) // VIEWS
    same = (own[:, None] == own) & ~torch.eye(GROUP, dtype=torch.bool)
    logits = (vectors @ vectors.T * scale).masked_fill(torch.eye(GROUP, dtype=torch.bool), -torch.inf)
    return -logits.log_softmax(1)[same].mean()


def instance_loss(lesson: Lesson, images: torch.Tensor, rebuilt: torch.Tensor, scenes: Scenes, groups: int):
    """`images` and `rebuilt` (the first of them, by the VAE) are uint8, whole groups; half of the batches are rebuilt ones."""

    known = numbers(scenes.instance)

    def loss(generator: torch.Generator, done: float):
        chance = torch.rand(2, generator=generator).tolist()
        source = rebuilt if chance[0] < 0.5 else images
        chosen = torch.randint(0, len(source) // GROUP, (groups,), generator=generator)
        rows = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
        x = source[rows].float() / 255
        if chance[1] < 0.3:
            x = x + torch.randn(x.shape, generator=generator) * 0.03
        x = x.roll(torch.randint(-3, 4, (2,), generator=generator).tolist(), (2, 3))
        scale = lesson.log_scale.exp().clamp(max=100)
        vectors, read = lesson(x)
        told_apart = torch.stack([contrast(v, scale) for v in vectors.split(GROUP)]).mean()
        misread = F.mse_loss(read, known[rows])
        return told_apart + misread, {"contrast": told_apart.item(), "misread": misread.item()}

    return loss


def pairs(vectors: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """By group: cosines (30) of pictures of one instance, and (160) of pictures of two instances that look alike."""
    own = torch.arange(GROUP) // VIEWS
    upper = torch.ones(GROUP, GROUP, dtype=torch.bool).triu(1)
    same = own[:, None] == own
    for group in vectors.split(GROUP):
        cosines = group @ group.T
        yield cosines[upper & same], cosines[upper & ~same]


def threshold(vectors: torch.Tensor) -> float:
    """The cosine at which as large a share of equal pairs is missed as of different ones is taken for equal."""
    equal, different = (torch.cat(parts).sort().values for parts in zip(*pairs(vectors), strict=True))
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        missed = (equal < middle).float().mean()
        mistaken = (different >= middle).float().mean()
        low, high = (middle, high) if missed < mistaken else (low, middle)
    return (low + high) / 2


def accuracy(vectors: torch.Tensor, scenes: Scenes, limit: float) -> dict[str, float]:
    """Share of right answers, equal and different pairs counting the same: over all groups, by pattern, by shape, in one
    medium and across media. `area` is the probability that an equal pair is nearer than a different one."""
    rows: dict[str, list[tuple[float, float]]] = {}
    equal, different = [], []
    for number, (near, far) in enumerate(pairs(vectors)):
        right = (near >= limit).float().mean().item(), (far < limit).float().mean().item()
        media = "one medium" if number % 2 == 0 else "across media"
        pattern, shape = (ATTRIBUTES[k][int(getattr(scenes, k)[number * GROUP])] for k in ("pattern", "shape"))
        for name in ("all", media, pattern, shape):
            rows.setdefault(name, []).append(right)
        equal.append(near)
        different.append(far)
    equal, different = torch.cat(equal), torch.cat(different).sort().values
    below = (torch.searchsorted(different, equal) + torch.searchsorted(different, equal, right=True)) / 2
    shares = {k: torch.tensor(v).mean().item() for k, v in rows.items()}
    return {**shares, "area": (below / len(different)).mean().item()}
