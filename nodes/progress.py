"""What a long node tells the browser while it works, and the Finish now button it listens to."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..training.loop import Diverged, Progress, Trainer, finite, train
from ..training.memory import duration
from ..training.run import Run

try:  # absent where prompts run without a server (scripts, tests)
    from server import PromptServer
except ImportError:
    PromptServer = None

log = logging.getLogger("counterpoint")
EVENT = "counterpoint.progress"
EVERY = 0.2  # seconds between events; the browser draws at most ten times a second
COMPLETE = "This run is complete: its result was taken from disk."

_finishing: set[tuple[str, str]] = set()


def server():
    return getattr(PromptServer, "instance", None)


def finish(prompt_id: str, node_id: str) -> None:
    """Ask the node to end its training now and let the graph go on with what there is."""
    _finishing.add((prompt_id, node_id))


class Reporter:
    """Progress bar, interruption, live curve and preview of one running node."""

    def __init__(self, steps: int):
        context = get_executing_context()
        self.address = (context.prompt_id, context.node_id) if context else ("", "")
        self.bar = comfy.utils.ProgressBar(steps, node_id=self.address[1] or None)
        self.sent = 0.0
        self.told: dict[str, float] = {}  # the latest of each figure: not every step is heard of
        _finishing.discard(self.address)

    def update(self, progress: Progress, preview: Image.Image | None = None) -> None:
        """Raises ComfyUI's interruption when the user has cancelled."""
        self.told |= finite(progress.scalars)
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(progress.step, progress.steps, ("JPEG", preview, None) if preview else None)
        last = progress.step == progress.steps
        if server() and (last or time.monotonic() - self.sent > EVERY):
            self.sent = time.monotonic()
            server().send_sync(EVENT, self._message(progress), server().client_id)

    def say(self, text: str) -> None:
        """A line of text on the node and in the log."""
        log.info(text)
        if server() and self.address[1]:
            server().send_progress_text(text, self.address[1])

    def finishing(self) -> bool:
        return self.address in _finishing

    def _message(self, progress: Progress) -> dict:
        prompt_id, node_id = self.address
        return {
            "prompt_id": prompt_id, "node_id": node_id, "step": progress.step, "steps": progress.steps,
            "loss": finite(progress.scalars).get("loss"), "eta_s": round(progress.eta, 1),
            "stats": {k: v for k, v in self.told.items() if k != "loss"},
        }  # fmt: skip


def follow(
    trainer: Trainer, run: Run, steps: int, reporter: Reporter, preview: Callable[[Progress], Image.Image | None], memory: str = ""
) -> tuple[int, str]:  # fmt: skip
    """Train from where the run stands, and tell: how many steps are done, and a sentence where that is not simply all of them.

    `preview` is asked after each step; what is done about `memory` is told once, with the time that it will take.
    """
    done, announced = (run.load_checkpoint() or (0,))[0], False
    problem = COMPLETE if done >= steps else ""
    with contextlib.closing(train(trainer, run, steps)) as after_each:
        try:
            for progress in after_each:
                done = progress.step
                if not announced and progress.seconds > 1.0:
                    announced, left = True, progress.steps - done
                    reporter.say(
                        f"Training {run.folder.name}: about {duration(progress.eta)} for {left} more steps{memory}."
                    )
                reporter.update(progress, preview(progress))
                if reporter.finishing():
                    return done, f"Finished early, at step {done} of {steps}, because you asked."
        except Diverged as error:
            stopped = f"{error}: training stopped at step {done} and kept the last good state."
            return done, f"{stopped} Try a smaller learning rate."
    return done, problem


def register_routes() -> None:
    """POST /counterpoint/finish {prompt_id, node_id}: what the Finish now button calls."""
    if server() is None:
        return
    from aiohttp import web

    @server().routes.post("/counterpoint/finish")
    async def _finish(request):
        said = await request.json()
        if not isinstance(said, dict) or not {"prompt_id", "node_id"} <= said.keys():
            return web.json_response({"error": "Finish now needs a prompt_id and a node_id."}, status=400)
        address = str(said["prompt_id"]), str(said["node_id"])
        if address != (
            getattr(server(), "last_prompt_id", None),
            server().last_node_id,
        ):  # not set before the first prompt
            return web.json_response({"error": "This node is not training now."}, status=409)
        finish(*address)
        return web.json_response({"finishing": True})
