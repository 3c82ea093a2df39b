"""Trains Pocket inside ComfyUI's classes: one process where there is a GPU or one core, else two of one thread each."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

from .boot import DEV, boot, cores, load_pack, prepare, sees_gpu


def main(argv: list[str]) -> int:
    alone = sees_gpu() or cores() < 2 or {"--rank", "-h", "--help"} & set(argv)
    return train(argv) if alone else train_in_two(argv)


def train(argv: list[str]) -> int:
    prepare(DEV / "base")
    boot()
    pack = load_pack()
    importlib.import_module(f"{pack.__name__}.nodes.pocket_training").main(argv)
    return 0


def train_in_two(argv: list[str]) -> int:
    """Two small computations side by side are faster than one that shares its every operation between two cores."""
    command = [sys.executable, str(Path(__file__).parent), "pocket", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen([*command, "--rank", rank], env=environment) for rank in "01"]
    try:
        while all(process.poll() is None for process in pair):
            time.sleep(0.5)
        if any(process.returncode for process in pair):
            print(
                "dev.py pocket: one of the two processes ended, so the other, which would wait for it, is stopped too."
            )
            stop(pair)
        return max(abs(process.wait()) for process in pair)
    except KeyboardInterrupt:  # both have heard it too; they write their checkpoints
        for process in pair:
            process.wait()
        return 130
    finally:
        stop(pair)


def stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
