"""A made-up world of pairs that are spread as CLIP's are: captions say half of what a picture shows, and some coordinates stand out."""

import math
from typing import NamedTuple

import torch

WIDTH, TEXT, MEANING, KINDS = 64, 48, 16, 30


class World(NamedTuple):
    kinds: torch.Tensor  # (30, 16) what there is
    look: torch.Tensor  # (16, 64) how a meaning looks
    say: torch.Tensor  # (16, 48) and how it is said
    detail: torch.Tensor  # (64, 64) what no caption says
    image_mean: torch.Tensor
    text_mean: torch.Tensor


def world() -> World:
    generator = torch.Generator().manual_seed(1000)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    falling = torch.arange(1, MEANING + 1, dtype=torch.float64)[:, None] ** -0.3
    look = torch.linalg.qr(draw(WIDTH, WIDTH))[0][:MEANING] * falling
    say = torch.linalg.qr(draw(TEXT, TEXT))[0][:MEANING] * falling
    detail = torch.linalg.qr(draw(WIDTH, WIDTH))[0] * torch.arange(1, WIDTH + 1, dtype=torch.float64)[:, None] ** -0.5
    detail *= math.sqrt(1.5 * 0.8 * look.square().sum() / detail.square().sum())
    means = [draw(WIDTH), draw(TEXT)]
    for mean, at in zip(means, (7, 19), strict=True):
        mean[at] = 1.2 * mean.norm()
    return World(draw(KINDS, MEANING), look, say, detail, *(2 * mean / mean.norm() for mean in means))


def pairs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text (n, 48) of length 1 and image (n, 64) of length about 5, float32."""
    there, generator = world(), torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind = torch.randint(KINDS, (n,), generator=generator)
    meaning = there.kinds[kind] + 0.5 * draw(n, MEANING)
    image = there.image_mean + meaning @ there.look + draw(n, WIDTH) @ there.detail
    image *= 5 * (1 + 0.06 * draw(n, 1)) / image.norm(dim=1, keepdim=True)
    said = torch.rand(n, MEANING, generator=generator) > 0.3
    text = there.text_mean + (meaning * said) @ there.say + 0.05 * draw(n, TEXT)
    return (text / text.norm(dim=1, keepdim=True)).float(), image.float()
