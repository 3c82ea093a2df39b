"""How much longer ComfyUI takes to start because the pack is there."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS, GOAL = 5, 0.2
START = """
import json, sys, tempfile, time
began = time.perf_counter()
from pathlib import Path
from harness.boot import boot, load_pack, prepare
prepare(Path(tempfile.mkdtemp()))
boot()
ready = time.perf_counter()
if sys.argv[1] == "with":
    load_pack()
print(json.dumps([time.perf_counter() - began, time.perf_counter() - ready]))
"""


def main(argv: list[str]) -> None:
    """A round is two fresh processes, ComfyUI's start without and with the pack; `pack` is timed inside the second."""
    rows = []
    print(f"{'round':>6}{'without':>10}{'with':>10}{'difference':>12}{'pack':>8}   seconds")
    for number in range(1, ROUNDS + 1):
        without, (total, pack) = seconds("without")[0], seconds("with")
        rows.append((without, total, total - without, pack))
        print(f"{number:>6}{without:10.2f}{total:10.2f}{total - without:12.2f}{pack:8.3f}", flush=True)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print("{:>6}{:10.2f}{:10.2f}{:12.2f}{:8.3f}".format("median", *medians))
    print(f"The pack adds {medians[-1]:.3f} s; the goal is under {GOAL} s.")


def seconds(which: str) -> list[float]:
    """[whole start, loading the pack] of one fresh process."""
    command = [sys.executable, "-c", START, which]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout.splitlines()[-1])
