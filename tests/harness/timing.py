"""Ways of doing the same work, measured against each other: time in turns within one run, so that a slow minute slows
them all; memory in a fresh process for each, so that none finds what another left."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Way = Callable[[], object]
MEMORY_OF = "--memory-of"


class Peak(NamedTuple):
    """Bytes on top of what lay in memory when everything was loaded; `cuda` is None where there is no such device."""

    main: int
    cuda: int | None


class Timing(NamedTuple):
    """Seconds of every round of one way, and its peak where that was measured."""

    name: str
    seconds: list[float]
    peak: Peak | None = None

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


def command(name: str, argv: list[str], load: Callable[[], dict[str, Way]], work: str, rounds: int = 5) -> None:
    """`dev.py bench <name>`: `load()` gives the ways, the one to compare with first; prints the table."""
    os.environ["TQDM_DISABLE"] = "1"  # core's KSampler draws a bar for every picture
    if argv[:1] == [MEMORY_OF]:
        print(json.dumps(peak(load()[argv[1]])))
        return
    timings = interleaved(load(), rounds)
    print(table([t._replace(peak=peak_elsewhere(name, t.name)) for t in timings], work))


def peak_elsewhere(name: str, way: str) -> Peak:
    """`peak` of one way of a bench, in a fresh process."""
    harness = Path(__file__).resolve().parent
    words = [sys.executable, str(harness), "bench", name, MEMORY_OF, way]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def peak(work: Way) -> Peak:
    """The largest resident memory that this process ever had once `work` is done, less what it has before."""
    import psutil
    import torch

    before, on_device = psutil.Process().memory_info().rss, torch.cuda.is_available()
    if on_device:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    work()
    return Peak(max(0, largest() - before), torch.cuda.max_memory_allocated() - held if on_device else None)


def largest() -> int:
    """Bytes of the largest resident set of this process so far. On Linux `getrusage` would begin with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return said if sys.platform == "darwin" else 1024 * said


def table(timings: list[Timing], work: str) -> str:
    """Medians with their spread, how many times as fast as the first way each is (paired round by round), and peaks."""
    first, *_ = timings
    heading = f"{'':36}{'median':>9}{'fastest':>9}{'slowest':>9}{'times as fast':>22}"
    lines = [f"{work}, {len(first.seconds)} rounds", heading + ("  peak MB" if first.peak else "")]
    for timing in timings:
        ratios = sorted(a / b for a, b in zip(first.seconds, timing.seconds, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        numbers = "".join(f"{s:9.3f}" for s in (timing.median, min(timing.seconds), max(timing.seconds)))
        peaks = "" if timing.peak is None else "".join(f"{b / 1e6:9.0f}" for b in timing.peak if b is not None)
        lines.append(f"{timing.name:36}{numbers}{ratio:>22}{peaks}")
    return "\n".join(lines)
