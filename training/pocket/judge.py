"""The judge: a small CNN that says what it sees in a picture, attribute by attribute. It measures; it never selects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .world import ATTRIBUTES, FACTORS, MEDIUMS, Scenes


class Judge(nn.Module):
    """(B, 3, 128, 128) in 0..1 -> logits by attribute."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        layers, before = [], 3
        for i, width in enumerate(channels):
            size = 5 if i == 0 else 3
            layers += [nn.Conv2d(before, width, size, 2, size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers += [nn.Conv2d(before, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({k: nn.Linear(2 * before, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        f = self.features(images * 2 - 1)
        f = torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)
        return {k: head(f) for k, head in self.heads.items()}

    @torch.no_grad()
    def see(self, images: torch.Tensor, batch: int = 64) -> dict[str, torch.Tensor]:
        """(n, 3, 128, 128) in 0..1 -> the most likely index of each attribute, (n,), and of the ten named mediums."""
        logits = [self(images[i : i + batch]) for i in range(0, len(images), batch)]
        whole = {k: torch.cat([part[k] for part in logits]) for k in ATTRIBUTES}
        seen = {k: v.argmax(1) for k, v in whole.items()}
        combinations = torch.tensor(list(MEDIUMS.values()))
        names = sum(whole[f].log_softmax(1)[:, combinations[:, axis]] for axis, f in enumerate(FACTORS))
        return {**seen, "medium": names.argmax(1)}


def judge_loss(judge: Judge, images: torch.Tensor, rebuilt: torch.Tensor, scenes: Scenes, batch: int):
    """`images` and `rebuilt` (by the VAE) are uint8; 40 % of the batches are rebuilt ones, some blurred, noisy or shifted."""

    def loss(generator: torch.Generator, done: float):
        chance = torch.rand(4, generator=generator).tolist()
        source = rebuilt if chance[0] < 0.4 else images
        rows = torch.randint(0, len(source), (batch,), generator=generator)
        x = source[rows].float() / 255
        if chance[1] < 0.3:
            x = x + torch.randn(x.shape, generator=generator) * 0.075 * chance[2]
        elif chance[1] < 0.5:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if chance[3] < 0.3:
            x = x.roll(torch.randint(-3, 4, (2,), generator=generator).tolist(), (2, 3))
        logits = judge(x)
        return sum(F.cross_entropy(v, getattr(scenes, k)[rows]) for k, v in logits.items()), {}

    return loss


def accuracy(judge: Judge, images: torch.Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of right answers by attribute, of all three factors together, and of named mediums among the ten."""
    seen = judge.see(images)
    right = {k: seen[k] == getattr(scenes, k) for k in ATTRIBUTES}
    out = {k: v.float().mean().item() for k, v in right.items()}
    out["all three"] = torch.stack([right[f] for f in FACTORS]).all(0).float().mean().item()
    combinations = torch.tensor(list(MEDIUMS.values()))
    is_named = (scenes.factors()[:, None] == combinations[None]).all(2)
    named = is_named.any(1)
    if named.any():
        out["medium"] = (seen["medium"] == is_named.int().argmax(1))[named].float().mean().item()
    return out
