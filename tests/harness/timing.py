"""Ways of doing the same work, timed against each other in one run: interleaved, so that a slow minute slows them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

Way = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of every round of one way."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(ways: dict[str, Way], rounds: int = 5) -> list[Timing]:
    """Each way once unmeasured, then `rounds` times in turn; the order turns round every time."""
    for work in ways.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in order:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    return [Timing(name, found) for name, found in seconds.items()]


def table(timings: list[Timing], work: str) -> str:
    """Medians with their spread, and how many times as fast as the first way each is: paired round by round."""
    first, *_ = timings
    lines = [
        f"{work}, {len(first.seconds)} rounds",
        f"{'':32}{'median':>9}{'fastest':>9}{'slowest':>9}{'times as fast':>22}",
    ]
    for timing in timings:
        ratios = sorted(a / b for a, b in zip(first.seconds, timing.seconds, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        numbers = "".join(f"{s:9.3f}" for s in (timing.median, min(timing.seconds), max(timing.seconds)))
        lines.append(f"{timing.name:32}{numbers}{ratio:>22}")
    return "\n".join(lines)
