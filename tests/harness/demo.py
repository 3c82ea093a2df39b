"""The main graph from its beginning to its pictures, without a browser."""

import argparse
import time
from pathlib import Path
from typing import Any

from .boot import DEV, ROOT
from .client import Client, Rejected, Result
from .convert import to_prompt
from .server import Server, make_base

HONESTLY = """
These were your pictures on Pocket, a toy of 128 pixels that has only ever seen one painted object at a time. What its new
word can take from them: palette, paper, kind of line, how coarse the texture is. What it cannot: faces, things, anything
that needs more pixels. For a real result open the same graph in your ComfyUI with your own checkpoint in it."""
WORKFLOW = ROOT / "workflows" / "01 learn a style.json"
EVERY_SECONDS = 10


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="learn from these pictures instead of painted ones"
    )
    images = parser.parse_args(argv).images
    if images and not images.is_dir():
        parser.error(f"{images} is not a folder")
    base = make_base(DEV / "base", {"counterpoint": ROOT})
    started = time.perf_counter()
    try:
        own = ("--input-directory", str(images.resolve())) if images else ()  # read where it lies, not copied or linked
        with Server(base, DEV / "log" / "demo_server.log", own) as server:
            print(f"{server.describe()}\nComfyUI is up after {time.perf_counter() - started:.0f} s.", flush=True)
            prompt = to_prompt(WORKFLOW, server.url)
            if images:
                use_folder(prompt, images.resolve().name)
            result = Client(server.url).run(prompt, Narrator(prompt))
    except (Rejected, RuntimeError) as failure:
        print(f"dev.py demo: {failure}")
        return 1
    tell(result, prompt, base)
    if images:
        print(HONESTLY)
    return 0 if result.status == "success" else 1


def use_folder(prompt: dict[str, dict], name: str) -> None:
    """Let the graph learn from ComfyUI's input directory where it learned from painted pictures; the two
    nodes have images, captions and masks in the same places. What it says of cubes and their style is taken out."""
    inputs = {
        "folder": "input",
        "recursive": True,
        "size": 128,  # Pocket's own
        "limit": 24,
        "caption_when_missing": "a picture",
        "background": "#ffffff",
        "alpha_as_mask": False,
    }
    for node in prompt.values():
        if node["class_type"] == "CounterpointPocketPictures":
            node.update(class_type="CounterpointLoadDataset", inputs=inputs, _meta={"title": f"Pictures of {name}"})
        elif node["class_type"] == "CounterpointPocketJudge":
            node["inputs"] |= {"style": "any", "object": "any"}
        elif node["class_type"] == "CounterpointCompareGrid":
            node["inputs"]["title"] = f"A style learned from {name}"


class Narrator:
    """Hears the events of a prompt and prints a line when a node begins and every ten seconds while it works."""

    def __init__(self, prompt: dict[str, dict]) -> None:
        self.titles = {node: title(prompt, node) for node in prompt}
        self.begun = self.spoken = time.perf_counter()

    def __call__(self, name: str, data: Any) -> None:
        if name == "executing" and data.get("node"):
            self.say(self.titles.get(data["node"], data["node"]))
        elif name == "counterpoint.progress" and self.is_time():
            left = f", {data['eta_s']:.0f} s left" if data.get("eta_s") is not None else ""
            loss = f", loss {data['loss']:.4f}" if data.get("loss") is not None else ""
            self.say(f"    step {data['step']} of {data['steps']}{loss}{left}")
        elif name == "progress" and self.is_time():
            self.say(f"    {data['value']} of {data['max']}")

    def is_time(self) -> bool:
        return time.perf_counter() - self.spoken > EVERY_SECONDS

    def say(self, words: str) -> None:
        self.spoken = time.perf_counter()
        print(f"{self.spoken - self.begun:6.0f} s  {words}", flush=True)


def tell(result: Result, prompt: dict[str, dict], base: Path) -> None:
    """Where the pictures are, and where the time went."""
    if result.status != "success":
        print(f"It ended with: {result.status} {result.error}")
    print(f"\nSeconds, of {result.seconds:.0f} in all:")
    for node, seconds in sorted(result.node_seconds.items(), key=lambda pair: -pair[1]):
        if seconds >= 0.5:
            print(f"{seconds:8.1f}  {title(prompt, node)}")
    judged = [node for node in prompt if prompt[node]["class_type"] == "CounterpointPocketJudge"]
    print(
        "\nWhat the judge saw:",
        *(" ".join(result.outputs.get(node, {}).get("text", ())) for node in judged),
        sep="\n    ",
    )
    sheets = [node for node in prompt if prompt[node]["class_type"] == "SaveImage"]
    saved = [picture for node in sheets for picture in result.outputs.get(node, {}).get("images", ())]
    kept = [str(base / each["type"] / each["subfolder"] / each["filename"]) for each in saved]
    print("\nPictures:", *(kept or ["none was saved"]), sep="\n    ")


def title(prompt: dict[str, dict], node: str) -> str:
    about = prompt.get(node, {})
    return about.get("_meta", {}).get("title") or about.get("class_type", node)
