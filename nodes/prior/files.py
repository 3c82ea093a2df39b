"""Save Prior, Load Prior."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ...training import artefact
from ...training.embedding import check_name
from ...training.prior.prior import Prior, is_ours, load, to_bytes
from ...training.prior.public import load_public, weights_file
from ...training.prior.starts import NORM, StartDistribution
from ..embedding import name_fault
from .pairs import CATEGORY
from .train import PriorType

FOLDER = "clip_priors"  # of ComfyUI's models folder
SUFFIXES = {".safetensors", ".ckpt", ".bin", ".pth", ".th"}  # .pth and .th to be refused by name
EMPTY = "there is none: put one into models/clip_priors"


def folders() -> list[Path]:
    return [Path(f) for f in folder_paths.get_folder_paths(FOLDER)]


def choices() -> list[str]:
    """Files, and folders as diffusers saves them."""
    found = [
        item.name
        for folder in folders()
        if folder.is_dir()
        for item in folder.iterdir()
        if item.suffix in SUFFIXES or item.is_dir()
    ]
    return sorted(set(found)) or [EMPTY]


def find(name: str) -> Path:
    """Names with a path are never looked up."""
    if name == EMPTY:
        raise ValueError(f"There is no prior yet: train one, or put one into models/{FOLDER} and press R.")
    place = next((f / name for f in folders() if (f / name).exists()), None) if Path(name).name == name else None
    if place is None:
        raise ValueError(f"There is no prior {name!r} in models/{FOLDER}: put it there and press R, or choose another.")
    return place


class SavePrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSavePrior",
            display_name="Save Prior",
            category=CATEGORY,
            description="Writes a prior into models/clip_priors, whole, with the CLIP it belongs to. Nothing is overwritten: another prior under "
            "a name that is taken gets a number.",
            is_output_node=True,
            inputs=[
                PriorType.Input("prior", tooltip="From Train Prior; 1 prior."),
                io.String.Input("name", default="my-prior", tooltip="File name without ending. 1 word of letters, digits, - _ ."),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="The name it was saved under.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name):
        return name_fault(name) or True

    @classmethod
    def execute(cls, prior, name) -> io.NodeOutput:
        file = artefact.write_new(folders()[0] / f"{check_name(name)}{artefact.SUFFIX}", to_bytes(prior))
        return io.NodeOutput(file.stem, ui=ui.PreviewText(f"Saved as {file.name} in models/{FOLDER}."))


class LoadPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadPrior",
            display_name="Load Prior",
            category=CATEGORY,
            description="A prior from models/clip_priors: one of Train Prior, or a public one (Kandinsky 2.1 and 2.2, Karlo, ECLIPSE) as a folder "
            "in diffusers' layout. Nothing is downloaded.",
            search_aliases=["kandinsky prior", "karlo", "eclipse", "unclip prior"],
            inputs=[
                io.Combo.Input(
                    "prior", options=choices(), tooltip="1 file or folder in models/clip_priors. Press R to see one you have just put there."
                )
            ],
            outputs=[
                PriorType.Output(display_name="prior", tooltip="To Sample Prior."),
                io.String.Output(display_name="report", tooltip="What it is, and how its authors sample with it."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, prior):
        if prior in (None, EMPTY):  # a wire, or nothing to choose
            return float("nan")
        stat = weights_file(find(prior)).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, prior) -> io.NodeOutput:
        loaded = read(find(prior))
        said = "; ".join(f"{k}: {v}" for k, v in facts(loaded).items())
        return io.NodeOutput(loaded, said, ui=ui.PreviewText(said.replace("; ", "\n")))


def read(place: Path) -> Prior:
    """One of ours, or a public one: what they call their statistics is the whitened start distribution."""
    if is_ours(place):
        return load(place)
    found = load_public(place)
    start = StartDistribution("whitened", dict(zip(NORM, (found.mean, found.std), strict=True)))
    return Prior(
        found.network, start, found.schedule, found.clamp, found.one_shot, space=found.space, facts=dict(found.facts)
    )


def facts(prior: Prior) -> dict[str, object]:
    figures = prior.facts.get("figures") or {}
    own = {k: v for k, v in prior.facts.items() if k != "figures"}
    said = {"CLIP": prior.space} if prior.space else {}
    return {**said, "embedding": f"{prior.dim} numbers", **own, **{k: f"{v:.2f}" for k, v in figures.items()}}


NODES = [SavePrior, LoadPrior]
