"""What dev.py starts once there is an environment: `python tests/harness demo|serve|pocket|bench|evidence words...`."""

import importlib
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # tests/, not this folder: its server.py would hide ComfyUI's


def main(command: str, *words: str) -> int | None:
    if command in ("demo", "serve", "pocket"):
        return importlib.import_module(f"harness.{command}").main(list(words))
    return importlib.import_module(f"{command}.{words[0]}").main(list(words[1:]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and helpers we started end with us
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
