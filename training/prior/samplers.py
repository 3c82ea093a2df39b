"""From noise to an image embedding: the samplers of `process`, for every schedule and every start distribution.

The scale of the start falls out of the deterministic samplers: only the first draw and fresh noise know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .process import DATA, Level, Schedule, Start, posterior

Predict = Callable[[torch.Tensor, int], torch.Tensor]  # z (n, d) and its level 0..999 -> x0 (n, d)


class Moment(NamedTuple):
    """What a sampler knows when it goes from one level to the next."""

    z: torch.Tensor  # (n, d)
    x0: torch.Tensor  # (n, d), what the network says of z
    here: Level
    there: Level  # never the data itself: the last step lands on x0 and asks no sampler
    before: tuple[Level, torch.Tensor] | None  # the level before this one, and what was said of x0 there
    start: Start
    noise: Iterator[torch.Tensor]


Sampler = Callable[[Moment], torch.Tensor]


def half_log_snr(level: Level) -> float:
    """ln(a / s); minus infinity at flow's last level."""
    return math.log(level.signal / level.noise) if level.signal else -math.inf


def moved(z: torch.Tensor, x0: torch.Tensor, here: Level, there: Level, mean: torch.Tensor) -> torch.Tensor:
    """z at another level if x0 is what it comes from: the same noise, less of it."""
    kept = there.noise / here.noise
    return mean + kept * (z - mean) + (there.signal - kept * here.signal) * (x0 - mean)


def ddim(now: Moment) -> torch.Tensor:
    """Song et al. 2021, equation 12 without fresh noise. On the flow schedule it is Euler's step along the velocity."""
    return moved(now.z, now.x0, now.here, now.there, now.start.mean)


def multistep(now: Moment) -> torch.Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2): DDIM's step with x0 carried on along its last change.

    After flow's last level, which is infinitely far away in log-SNR, there is nothing to carry on.
    """
    x0 = now.x0
    if now.before is not None:
        last, here, there = (half_log_snr(level) for level in (now.before[0], now.here, now.there))
        x0 = x0 + (there - here) / (2 * (here - last)) * (x0 - now.before[1])
    return moved(now.z, x0, now.here, now.there, now.start.mean)


def ancestral(now: Moment) -> torch.Tensor:
    """A draw from the true posterior (Ho et al. 2020, algorithm 2, with the smaller variance)."""
    mean, std = posterior(now.z, now.x0, now.here, now.there, now.start)
    return mean + std * next(now.noise).to(mean)


SAMPLERS: dict[str, Sampler] = {"dpm++ 2m": multistep, "ddim": ddim, "ancestral": ancestral}


def sample(
    predict: Predict,
    start: Start,
    schedule: Schedule,
    levels: Sequence[int],
    noise: Iterator[torch.Tensor],
    sampler: str | Sampler = "dpm++ 2m",
    z: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yields z (n, d) after each of the falling `levels` (of `process.levels`); the last is the embedding, the network's x0 itself.

    One call of `predict` for each level. `start` is chosen once, by the text, and serves every step. `noise` gives draws (n, d) of
    N(0, I): the first makes the start, mu + scale eps, and `ancestral` takes one more for each step but the last. With `z`, a noised
    embedding of level levels[0], it begins there: a variation of a picture.
    The state is float32, or float64 where `start` is. Raises ValueError for an unknown sampler.
    """
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(f'There is no sampler "{sampler}": it is one of {", ".join(SAMPLERS)}.')
    update = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    start = start.to(start.mean.device, torch.promote_types(start.mean.dtype, torch.float32))
    z = start.mean + start.scale * next(noise).to(start.mean) if z is None else z.to(start.mean)
    before = None
    for t, following in zip(levels, [*levels[1:], None], strict=True):
        here, there = schedule.level(t), DATA if following is None else schedule.level(following)
        x0 = predict(z, t).to(z)
        z = x0 if there is DATA else update(Moment(z, x0, here, there, before, start, noise))
        before = here, x0
        yield z


def guided(cond: torch.Tensor, uncond: torch.Tensor, strength: float) -> torch.Tensor:
    """Classifier-free guidance of x0 (Ho and Salimans 2022), all coordinates alike. At 1 it is `cond` itself, and `uncond` need not
    be computed."""
    return cond if strength == 1 else uncond + strength * (cond - uncond)
