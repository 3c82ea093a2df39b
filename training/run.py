"""A run is a folder that can be resumed: config.json, log.jsonl, checkpoint.safetensors, snapshots/, previews/, lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

import filelock

from . import artefact


class RunError(ValueError):
    """A run that cannot be opened; the message is one sentence for the user."""


def config_hash(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


class Run:
    """Opened with `with`: takes the lock, checks that the folder belongs to this config, gives it back at the end.

    `config` decides what the result will be; `free` holds the settings that may differ on resuming (number of steps,
    preview and snapshot settings).
    """

    def __init__(self, folder: Path, config: dict, free: dict | None = None):
        self.folder = Path(folder)
        self.config = config
        self.free = free or {}
        self.log_file = self.folder / "log.jsonl"
        self.checkpoint_file = self.folder / "checkpoint.safetensors"
        self._held = filelock.FileLock(self.folder / "lock")  # given back by the system when the process dies

    def __enter__(self) -> Run:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._match_config()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_):
        self._unlock()

    def _match_config(self) -> None:
        file = self.folder / "config.json"
        if file.exists():
            before = json.loads(file.read_text())["config"]
            if config_hash(before) != config_hash(self.config):
                changed = sorted(k for k in before.keys() | self.config.keys() if before.get(k) != self.config.get(k))
                said = ", ".join(f"{k} was {before.get(k)!r} and is now {self.config.get(k)!r}" for k in changed[:3])
                raise RunError(
                    f"A run named {self.folder.name!r} exists with other settings ({said}): "
                    f"choose another name, for example {free_name(self.folder).name!r}."
                )
        facts = {"config": self.config, "hash": config_hash(self.config), "free": self.free}
        artefact.write_whole(file, json.dumps(facts, indent=1, sort_keys=True).encode())

    def _lock(self) -> None:
        try:
            self._held.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(
                f"The run {self.folder.name!r} is being trained right now: wait for it to end, or choose another name, "
                f"for example {free_name(self.folder).name!r}."
            ) from None

    def _unlock(self) -> None:
        self._held.release()

    def save_checkpoint(self, step: int, state: dict) -> None:
        try:
            artefact.write_tree(self.checkpoint_file, {"step": step, "state": state})
        except OSError as error:
            raise self._unwritable(f"The checkpoint of step {step}", error) from error

    def _unwritable(self, what: str, error: OSError) -> RunError:
        return RunError(
            f"{what} could not be written to {self.folder} ({error.strerror or error}): "
            f"free some disk space and queue again; the last checkpoint is whole."
        )

    def load_checkpoint(self) -> tuple[int, dict] | None:
        if not self.checkpoint_file.exists():
            return None
        tree = artefact.read_tree(self.checkpoint_file)
        return tree["step"], tree["state"]

    def log(self, record: dict) -> None:
        try:
            with open(self.log_file, "a") as f:
                f.write(json.dumps({"time": round(time.time(), 1), **record}) + "\n")
        except OSError as error:
            raise self._unwritable(f"The log of step {record['step']}", error) from error

    def history(self, upto: int | None = None) -> list[dict]:
        """Logged records, one per step, in order; what an interrupted run logged beyond its checkpoint is left out."""
        if not self.log_file.exists():
            return []
        records = {}
        for line in self.log_file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # half a line, where the disk was full or the power failed
                record = json.loads(line[line.rindex('{"time"') :])
                records[record["step"]] = record
        return [records[s] for s in sorted(records) if upto is None or s <= upto]


def free_name(folder: Path) -> Path:
    """`folder` with the first number that makes it a name nobody has taken."""
    n = 2
    while (candidate := folder.with_name(f"{folder.name}-{n}")).exists():
        n += 1
    return candidate
