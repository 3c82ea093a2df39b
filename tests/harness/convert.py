"""Saved graphs to prompts: by comfy-cli, the converter that ComfyUI's own people keep, never by code of ours."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from .boot import DEV


def comfy_cli() -> Path:
    """comfy-cli's program, in an environment of its own because it pins other versions than ComfyUI."""
    program = DEV / "cli" / ("Scripts/comfy.exe" if os.name == "nt" else "bin/comfy")
    if not program.is_file():
        raise FileNotFoundError("comfy-cli is missing: run `python dev.py test` once.")
    return program


def to_prompt(workflow: Path, url: str) -> dict:
    """The prompt (API format) of a saved graph, as the server at `url` with its nodes understands it."""
    with tempfile.TemporaryDirectory() as home:  # comfy-cli keeps settings there, and asks questions where it has none
        environment = {**os.environ, "HOME": home, "USERPROFILE": home, "XDG_CONFIG_HOME": home, "NO_COLOR": "1"}

        def comfy(*words: str) -> subprocess.CompletedProcess:
            command = [str(comfy_cli()), "--skip-prompt", *words]
            return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")

        comfy("tracking", "disable")
        host, port = url.removeprefix("http://").split(":")
        done = comfy("run", "--workflow", str(workflow), "--host", host, "--port", port, "--print-prompt")
    if done.returncode:
        raise RuntimeError(f"comfy-cli could not convert {workflow.name}: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout)["data"]["prompt"]
