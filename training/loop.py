"""The one training loop: it owns time (steps, checkpoints, resuming, estimates); a trainer owns the mathematics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from .run import Run


class Trainer(Protocol):
    def step(self, i: int) -> dict[str, float]:
        """Do step i (from 0) and say what happened. Raises Diverged, with nothing changed, on a loss that is not finite."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Diverged(ArithmeticError):
    """The loss is not a number; the trainer still holds its last good state."""


@dataclass
class Progress:
    step: int  # steps done
    steps: int  # in all
    scalars: dict[str, float]
    seconds: float  # since this loop began
    eta: float  # seconds to go, from the pace of this loop


def finite(scalars: dict[str, float]) -> dict[str, float]:
    """What may be sent to a browser: NaN in a message makes it drop the whole message."""
    return {k: float(v) for k, v in scalars.items() if math.isfinite(v)}


def train(
    trainer: Trainer, run: Run | None, steps: int, start: int = 0, checkpoint_every: float = 30.0
) -> Iterator[Progress]:
    """Yield after each step from where the run stands to `steps`.

    Close the iterator (or leave the loop over it, under `contextlib.closing`) at any time: the state is checkpointed
    then, as it is every `checkpoint_every` seconds and at the end, so that a cancelled, finished or killed run goes on
    from there. Without a run nothing is written and it begins at `start`.
    """
    i = _resume(trainer, run) if run else start
    began, first, saved_at, saved = time.monotonic(), i, time.monotonic(), i
    try:
        while i < steps:
            scalars = trainer.step(i)
            i += 1
            seconds = time.monotonic() - began
            if run:
                run.log({"step": i, **finite(scalars)})
                if time.monotonic() - saved_at > checkpoint_every and i < steps:
                    run.save_checkpoint(i, trainer.state_dict())
                    saved_at, saved = time.monotonic(), i
            yield Progress(i, steps, scalars, seconds, seconds / (i - first) * (steps - i))
    finally:
        if run and saved != i:
            run.save_checkpoint(i, trainer.state_dict())


def _resume(trainer: Trainer, run: Run) -> int:
    stored = run.load_checkpoint()
    if stored is None:
        return 0
    step, state = stored
    trainer.load_state_dict(state)
    return step
