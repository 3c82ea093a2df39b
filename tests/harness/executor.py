"""Whole prompts through ComfyUI's real PromptExecutor in this process: validation, cache, interruption and all."""

import asyncio
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import execution
import nodes
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from protocol import BinaryEventTypes
from server import PromptServer

CLIENT = "in-process"
BINARY_NAMES = {
    BinaryEventTypes.PREVIEW_IMAGE: "preview",
    BinaryEventTypes.UNENCODED_PREVIEW_IMAGE: "preview",
    BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA: "preview",
    BinaryEventTypes.TEXT: "text",
}


@dataclass
class Run:
    """What came of one prompt."""

    outputs: dict[str, list] = field(default_factory=dict)  # node id -> for each output slot the list of its values
    ui: dict[str, dict] = field(default_factory=dict)  # node id -> what the node shows
    node_errors: dict[str, dict] = field(default_factory=dict)  # as /prompt answers when validation fails
    errors: list[str] = field(default_factory=list)  # one sentence for everything that went wrong
    events: list[tuple[str, Any]] = field(default_factory=list)  # what the browser would have been sent
    seconds: float = 0.0

    def value(self, node: str, slot: int = 0) -> Any:
        """The one value of an output that is not a list."""
        (only,) = self.outputs[node][slot]
        return only

    def sent(self, name: str) -> list[Any]:
        """The data of every event of this name, in order."""
        return [data for event, data in self.events if event == name]

    @property
    def executed(self) -> list[str]:
        """The nodes that really ran, in order: neither cached nor skipped."""
        return [data["node"] for data in self.sent("executing")]

    @property
    def interrupted(self) -> bool:
        return bool(self.sent("execution_interrupted"))


class Graph:
    """One executor with its cache: call it with prompts (API format), again and again."""

    def __init__(self) -> None:
        self.server = PromptServer.instance
        self.server.sockets_metadata[CLIENT] = {"feature_flags": {"supports_preview_metadata": True}}
        comfy.utils.set_progress_bar_global_hook(self._progress)
        cache = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, cache)

    def validate(self, prompt: dict) -> tuple[bool, dict | None, list[str], dict]:
        """What the server decides before it queues: (valid, error, outputs to execute, node errors)."""
        return asyncio.run(execution.validate_prompt("in-process", prompt, None))

    def __call__(self, prompt: dict, check: bool = True, on_event: Callable[[str, Any], None] | None = None) -> Run:
        """Run a prompt; with `check`, anything wrong with it is an AssertionError. `on_event` may interrupt."""
        prompt, run, started = copy.deepcopy(prompt), Run(), time.perf_counter()
        valid, error, targets, run.node_errors = self.validate(prompt)
        run.errors += validation_sentences(error, run.node_errors)
        if valid:
            self.server.send_sync = lambda event, data, sid=None: record(run, on_event, event, data)
            self.executor.execute(prompt, "in-process", {"client_id": CLIENT, "preview_method": "auto"}, targets)
            self._collect(prompt, run)
        run.seconds = time.perf_counter() - started
        assert not (check and run.errors), "\n".join(run.errors)
        return run

    def _collect(self, prompt: dict, run: Run) -> None:
        run.ui = self.executor.history_result["outputs"]
        for node in prompt:
            entry = asyncio.run(self.executor.caches.outputs.get(node))
            if entry is not None:
                run.outputs[node] = entry.outputs
                run.errors += wrong_number_of_outputs(prompt[node]["class_type"], entry.outputs)
        for name, data in self.executor.status_messages:
            if name == "execution_error":
                run.errors.append(f"{data['node_type']} {data['node_id']}: {data['exception_message'].strip()}")

    def _progress(self, value, total, preview=None, prompt_id=None, node_id=None) -> None:
        """What ComfyUI's main.py does when a progress bar moves; it can only be had there by starting the server."""
        throw_exception_if_processing_interrupted()
        node_id = node_id or get_executing_context().node_id
        get_progress_state().update_progress(node_id, value, total, preview)
        self.server.send_sync("progress", {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id})


def record(run: Run, on_event: Callable[[str, Any], None] | None, event: str | int, data: Any) -> None:
    """Keep a message. One that is not plain finite JSON would stop the real server, so here it stops the node."""
    if isinstance(event, str):
        json.dumps(data, allow_nan=False)
    name = event if isinstance(event, str) else BINARY_NAMES.get(event, str(event))
    run.events.append((name, data))
    if on_event is not None:
        on_event(name, data)


def validation_sentences(error: dict | None, node_errors: dict) -> list[str]:
    if error and not node_errors:
        return [f"{error['message']} {error['details']}".strip()]
    found = [(node, at["class_type"], each) for node, at in node_errors.items() for each in at["errors"]]
    return [f"{kind} {node}: {each['message']}: {each['details']}" for node, kind, each in found]


def wrong_number_of_outputs(class_type: str, outputs: list) -> list[str]:
    """Too few outputs go unnoticed until the next prompt reads them from the cache, and there they hang the server."""
    declared = len(nodes.NODE_CLASS_MAPPINGS[class_type].RETURN_TYPES)
    right = len(outputs) == declared
    return [] if right else [f"{class_type} returned {len(outputs)} outputs and declares {declared}."]
