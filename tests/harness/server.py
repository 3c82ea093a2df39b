"""A real ComfyUI server as a child process, in a base directory of its own."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from .boot import NO_COMFYUI, find_comfyui, sees_gpu, thread_settings

START_SECONDS = 300  # a first start on a slow disk compiles every module


def make_base(base: Path, packs: dict[str, Path]) -> Path:
    """A base directory (ComfyUI's --base-directory) in which the packs lie as links under the given names."""
    for folder in ("custom_nodes", "input", "output", "models", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for name, target in packs.items():
        link(base / "custom_nodes" / name, target)
    return base


def link(place: Path, target: Path) -> None:
    """A symbolic link to a folder; on Windows a directory junction, which needs no special rights."""
    if place.exists() and place.resolve() == target.resolve():
        return
    if os.name == "nt":
        if os.path.lexists(place):
            place.rmdir()  # removes the junction, not what it points to
        subprocess.run(["cmd", "/c", "mklink", "/J", str(place), str(target)], check=True, stdout=subprocess.DEVNULL)
    else:
        place.unlink(missing_ok=True)
        place.symlink_to(target, target_is_directory=True)


def server_flags() -> list[str]:
    """What every server of ours is started with; --cpu only where torch sees nothing better."""
    quiet = ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    return quiet + ["--use-pytorch-cross-attention"] + ([] if sees_gpu() else ["--cpu"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Server:
    """`with Server(base, log) as server: ...`; what it prints goes to the log file."""

    def __init__(self, base: Path, log: Path, extra_flags: tuple[str, ...] = (), port: int | None = None,
                 spare_cores: int = 0) -> None:  # fmt: skip
        self.base, self.log, self.port = base, log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {name: os.environ.get(name, value) for name, value in thread_settings(spare_cores).items()}
        self.flags = [*server_flags(), *extra_flags]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        comfyui = find_comfyui()
        if comfyui is None:
            raise FileNotFoundError(NO_COMFYUI)
        place = ["--base-directory", str(self.base), "--port", str(self.port)]
        command = [sys.executable, str(comfyui / "main.py"), *place, *self.flags]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            environment = {**os.environ, **self.settings}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while it started; its log is {self.log}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer for {START_SECONDS} s; its log is {self.log}:\n{self.log_tail()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def describe(self) -> str:
        """What it was started with, for a person to read."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"ComfyUI {' '.join(self.flags)}\n    {settings}\n    base directory {self.base}\n    log {self.log}"

    def log_tail(self, lines: int = 25) -> str:
        text = re.sub(r"\x1b\[\d*m|\r[^\n]*", "", self.log.read_text(encoding="utf-8", errors="replace"))
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
