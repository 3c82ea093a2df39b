"""What noise does to an image embedding, and back: one process for every schedule and every start distribution.

A level (a, s) of a schedule makes of embeddings x0 (n, d) and eps ~ N(0, I)

    z = a x0 + (1 - a) mu + s scale eps

so that the last level is N(mu, scale^2), the start distribution. With mu = 0 and scale = 1 it is ordinary diffusion; otherwise it is
ordinary diffusion of (x0 - mu) / scale (Shifted Diffusion, Zhou et al. 2023, with a^2 + s^2 = 1; flow matching, Lipman et al. 2023,
with a + s = 1).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

LEVELS = 1000
Number = float | torch.Tensor  # one for all rows, or (n, 1)


class Start(NamedTuple):
    """The Gaussian at which sampling begins, for all rows or for each; `scale` is a standard deviation per coordinate."""

    mean: torch.Tensor  # (d) or (n, d)
    scale: torch.Tensor  # (d) or (n, d)

    def repeated(self, times: int) -> Start:
        """For `times` rows of each text, side by side."""
        return Start(*(x.repeat_interleave(times, 0) if x.ndim == 2 else x for x in self))

    def to(self, *where) -> Start:
        return Start(*(x.to(*where) for x in self))


class Level(NamedTuple):
    """How much of x0 is in z, and how much noise. `slope` is d noise / d time in the schedule's own time, which is the angle
    atan(s / a) where a^2 + s^2 = 1 and s itself in flow matching; in both a slope - s d signal / d time = 1."""

    signal: Number
    noise: Number
    slope: Number


DATA = Level(1.0, 0.0, 1.0)  # behind the last level: x0 itself


@dataclass(frozen=True, eq=False)
class Schedule:
    """Levels 0 (hardly any noise) to 999 (hardly any signal)."""

    name: str
    signal: torch.Tensor  # (1000) float64, falling
    noise: torch.Tensor  # (1000) float64, rising
    slope: torch.Tensor  # (1000) float64

    def level(self, t: int) -> Level:
        return Level(self.signal[t].item(), self.noise[t].item(), self.slope[t].item())

    def rows(self, t: torch.Tensor, like: torch.Tensor) -> Level:
        """The levels t (n) of n rows, in the precision and on the device of `like`."""
        t = t.to(self.signal.device)
        return Level(*(table[t, None].to(like) for table in (self.signal, self.noise, self.slope)))


def _linear() -> torch.Tensor:
    """beta from 1e-4 to 0.02 (Ho et al. 2020)."""
    return torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64)


def _cosine() -> torch.Tensor:
    """alpha-bar = cos^2, beta at most 0.999 (Nichol and Dhariwal 2021, equation 17)."""
    time = torch.arange(LEVELS + 1, dtype=torch.float64) / LEVELS
    kept = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - kept[1:] / kept[:-1]).clamp_max(0.999)


SCHEDULES = ("linear", "cosine", "flow")


@functools.cache
def schedule(name: str) -> Schedule:
    """One of SCHEDULES. Raises ValueError for another name."""
    if name == "flow":
        tau = torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS
        return Schedule(name, 1 - tau, tau, torch.ones_like(tau))
    betas = {"linear": _linear, "cosine": _cosine}.get(name)
    if betas is None:
        raise ValueError(f'There is no schedule "{name}": it is one of {", ".join(SCHEDULES)}.')
    kept = (1 - betas()).cumprod(0)
    return Schedule(name, kept.sqrt(), (1 - kept).sqrt(), kept.sqrt())


def levels(steps: int, top: int = LEVELS - 1) -> list[int]:
    """`steps` levels from `top` downwards, evenly spaced. Level 0 is never among them: there is hardly any noise left to tell.

    Raises ValueError for fewer than one step, and for more than there are levels.
    """
    if not 1 <= steps <= top < LEVELS:
        raise ValueError(f"{steps} steps do not go from level {top} to 0: take 1 to {min(top, LEVELS - 1)}.")
    return [(2 * top * (steps - i) + steps) // (2 * steps) for i in range(steps)]


def noised(x0: torch.Tensor, eps: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
    """q(z | x0) at a level, from eps (n, d) of N(0, I)."""
    a, s, _ = level
    return a * x0 + (1 - a) * start.mean + s * start.scale * eps


def transition(here: Level, there: Level) -> tuple[Number, Number]:
    """q(z | z') = N(r z' + (1 - r) mu, b^2 scale^2) from a level `there` up to a noisier one `here`: r and b^2.

    Where a^2 + s^2 = 1 and the levels are neighbours these are sqrt(1 - beta) and beta.
    """
    r = here.signal / there.signal
    return r, here.noise**2 - (r * there.noise) ** 2


def posterior(
    z: torch.Tensor, x0: torch.Tensor, here: Level, there: Level, start: Start
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of q(z' | z, x0) at a less noisy level `there` (Ho et al. 2020, equation 7, with mu)."""
    r, variance = transition(here, there)
    of_z = r * there.noise**2 / here.noise**2
    of_x0 = there.signal - of_z * here.signal
    mean = of_x0 * x0 + of_z * z + (1 - of_x0 - of_z) * start.mean
    return mean, there.noise / here.noise * variance**0.5 * start.scale


def eps_of_x0(z: torch.Tensor, x0: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
    a, s, _ = level
    return (z - a * x0 - (1 - a) * start.mean) / (s * start.scale)


def x0_of_eps(z: torch.Tensor, eps: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
    """Not at flow's last level, where z is noise alone and says nothing of x0."""
    a, s, _ = level
    return (z - (1 - a) * start.mean - s * start.scale * eps) / a


def velocity_of_x0(z: torch.Tensor, x0: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
    """dz / d time: scale (a eps - s y0) with y0 = (x0 - mu) / scale where a^2 + s^2 = 1 ("v", Salimans and Ho 2022), and
    mu + scale eps - x0 in flow matching."""
    return (level.slope * (z - start.mean) - (x0 - start.mean)) / level.noise


def x0_of_velocity(z: torch.Tensor, velocity: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
    return start.mean + level.slope * (z - start.mean) - level.noise * velocity


def uniform(level: Level) -> Number:
    """1 for every level: our weight of the squared error of x0."""
    return 0 * level.noise + 1


def p2(level: Level) -> Number:
    """1 / (1 + SNR) (Choi et al. 2022 with k = gamma = 1, the paper's): 1 - alpha-bar where a^2 + s^2 = 1, which hardly learns
    the levels of little noise."""
    return level.noise**2 / (level.signal**2 + level.noise**2)


WEIGHTS = {"uniform": uniform, "P2": p2}


class Norm(NamedTuple):
    """Mean and standard deviation of the embeddings a prior makes, per coordinate. A network that is shown `shown` and whose
    answer is read by `x0` meets numbers of mean 0 and variance 1 at every level of every start.

    mu falls out of what is shown. So a network that is not told the text does not learn it from the start either.
    """

    mean: torch.Tensor  # (d)
    std: torch.Tensor  # (d)

    def to(self, *where) -> Norm:
        return Norm(*(x.to(*where) for x in self))

    def shown(self, z: torch.Tensor, level: Level, start: Start) -> torch.Tensor:
        a, s, _ = level
        variance = (a * self.std) ** 2 + (s * start.scale) ** 2
        return (z - a * self.mean - (1 - a) * start.mean) / variance.sqrt()

    def whitened(self, x0: torch.Tensor) -> torch.Tensor:
        """What the network should say of x0."""
        return (x0 - self.mean) / self.std

    def x0(self, said: torch.Tensor) -> torch.Tensor:
        return self.mean + self.std * said
