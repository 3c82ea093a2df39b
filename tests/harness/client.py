"""What a program says to a ComfyUI server: REST by urllib, the progress of a prompt over its websocket."""

import asyncio
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from PIL import Image

PREVIEW_WITH_METADATA = 4
FEATURES = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
Listener = Callable[[str, Any], None]


class Rejected(Exception):
    """The server refused the prompt; `node_errors` says which node and why."""

    def __init__(self, answer: dict) -> None:
        self.node_errors = answer.get("node_errors") or {}
        found = [(node, at, each) for node, at in self.node_errors.items() for each in at["errors"]]
        lines = [f"{at['class_type']} {node}: {each['message']}: {each['details']}" for node, at, each in found]
        super().__init__("\n".join(lines) or str(answer.get("error", answer)))


@dataclass
class Result:
    """How one prompt went."""

    prompt_id: str
    status: str = ""  # "success", "error" or "interrupted"
    error: str = ""
    node_errors: dict[str, dict] = field(default_factory=dict)  # of outputs that were left out
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> what it shows
    events: list[tuple[str, Any]] = field(default_factory=list)
    node_seconds: dict[str, float] = field(default_factory=dict)  # only of the nodes that ran
    seconds: float = 0.0
    _running: tuple[str | None, float] = (None, 0.0)  # a node and when it began

    def node_began(self, node: str | None) -> None:
        """Note how long the node before this one took."""
        now = time.perf_counter()
        before, began = self._running
        if before is not None:
            self.node_seconds[before] = self.node_seconds.get(before, 0.0) + now - began
        self._running = (node, now)

    @property
    def pictures(self) -> list[dict]:
        """What was saved or previewed, in /view's own words: filename, subfolder, type."""
        return [picture for shown in self.outputs.values() for picture in shown.get("images", ())]


class Client:
    def __init__(self, url: str) -> None:
        self.url, self.id = url, uuid.uuid4().hex

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> Any:
        """The server's answer, also where that is an HTTP error with an explanation."""
        request = urllib.request.Request(self.url + path, json.dumps(data).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request) as answer:
                body = answer.read()
        except urllib.error.HTTPError as refusal:
            body = refusal.read()
        return json.loads(body) if body else None

    def queue(self, prompt: dict) -> dict:
        """Queue a prompt: {"prompt_id", "number", "node_errors"}, or Rejected."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.id})
        if "prompt_id" not in answer:
            raise Rejected(answer)
        return answer

    def picture(self, place: dict) -> Image.Image:
        query = urllib.parse.urlencode({key: place[key] for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}") as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")

    def run(self, prompt: dict, on_event: Listener | None = None) -> Result:
        """Queue a prompt and listen until it has ended; `on_event(name, data)` hears everything on the way."""
        return asyncio.run(self._run(prompt, on_event))

    async def _run(self, prompt: dict, on_event: Listener | None) -> Result:
        address = f"{self.url}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await socket.send_json(FEATURES)
            started, answer = time.perf_counter(), self.queue(prompt)
            result = Result(answer["prompt_id"], node_errors=answer.get("node_errors") or {})
            async for message in socket:
                name, data = read_message(message)
                result.events.append((name, data))
                if on_event is not None:
                    on_event(name, data)
                if isinstance(data, dict) and data.get("prompt_id") == result.prompt_id and follow(result, name, data):
                    break
            else:
                raise ConnectionError("The server closed the connection while the prompt ran.")
        result.seconds = time.perf_counter() - started
        result.outputs = self.get(f"/history/{result.prompt_id}")[result.prompt_id]["outputs"]
        return result


def read_message(message: aiohttp.WSMessage) -> tuple[str, Any]:
    """(name, data); a preview picture becomes ("preview", its metadata)."""
    if message.type == aiohttp.WSMsgType.TEXT:
        content = json.loads(message.data)
        return content["type"], content["data"]
    if int.from_bytes(message.data[:4], "big") == PREVIEW_WITH_METADATA:
        length = int.from_bytes(message.data[4:8], "big")
        return "preview", json.loads(message.data[8 : 8 + length])
    return "binary", len(message.data)


def follow(result: Result, name: str, data: dict) -> bool:
    """Take what an event says about the prompt into the result; True for the last event of a prompt."""
    if name == "executing":
        result.node_began(data.get("node"))
        return data.get("node") is None
    if name in ("execution_success", "execution_error", "execution_interrupted"):
        result.status = name.removeprefix("execution_")
    if name == "execution_error":
        result.error = f"{data['node_type']} {data['node_id']}: {data['exception_message'].strip()}"
    return False
