"""ComfyUI in the browser with the pack in it, pictures of what is sampled or trained shown on the nodes."""

import argparse
import webbrowser

from .boot import DEV, ROOT, find_comfyui
from .server import Server, is_free, make_base

PORT = 8188  # ComfyUI's own


def main(argv: list[str]) -> int:
    """All flags but the port go to ComfyUI as they are, after our own."""
    parser = argparse.ArgumentParser(prog="dev.py serve", description=__doc__, epilog="Other flags are ComfyUI's.")
    parser.add_argument("--port", type=int, help=f"{PORT}, or any free one where that is taken")
    options, flags = parser.parse_known_args(argv)
    own = ["--preview-method", "auto"]
    comfyui = find_comfyui()
    if comfyui != DEV / "ComfyUI":  # a person's own: with the models they have there
        own += ["--models-directory", str(comfyui / "models")]
    base = make_base(DEV / "base", {"counterpoint": ROOT})
    port = options.port or (PORT if is_free(PORT) else None)
    with Server(base, DEV / "log" / "serve.log", (*own, *flags), port, spare_cores=1) as server:
        print(f"{server.describe()}\nOpen {server.url}; our graphs are under Templates, Extensions. Ctrl-C ends it.")
        webbrowser.open(server.url)
        return server.process.wait()
