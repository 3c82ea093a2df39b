"""A learned word on the canvas: use it, save it, load it."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..training import artefact
from ..training import embedding as files
from ..training.sheet import to_image
from .bridge import check_embedding_fits, what_does_not_meet, with_embeddings
from .train_embedding import CATEGORY, EmbeddingType

SUFFIX = artefact.SUFFIX
NONE = "none"


class UseEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointUseEmbedding",
            display_name="Use Embedding",
            category=CATEGORY,
            description="Gives the CLIP a learned word without saving it: write embedding:NAME in any prompt behind this node, as you would "
            "for a saved one.",
            search_aliases=["textual inversion", "apply embedding"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="From the checkpoint the word was learned on, or a close relative of it; 1 CLIP."
                ),
                EmbeddingType.Input("embedding", tooltip="From Train Embedding or Load Embedding."),
                io.String.Input(
                    "name",
                    default="my-style",
                    tooltip="What the word is called in prompts: embedding:my-style. 1 word of letters, digits, - _ .",
                ),
            ],
            outputs=[
                io.Clip.Output(
                    display_name="CLIP", tooltip="Knows embedding:NAME; the CLIP that came in does not change."
                ),
                io.String.Output(display_name="word", tooltip="embedding:NAME, to be put into prompts by other nodes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name):
        return name_fault(name) or True

    @classmethod
    def execute(cls, clip, embedding, name) -> io.NodeOutput:
        files.check_name(name)
        check_embedding_fits(clip, embedding)
        if warning := what_does_not_meet(clip, embedding):
            logging.warning(warning)
        shown = {"text": [warning]} if warning else None
        return io.NodeOutput(with_embeddings(clip, embedding.words(name)), f"embedding:{name}", ui=shown)


class SaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSaveEmbedding",
            display_name="Save Embedding",
            category=CATEGORY,
            description="Writes the word into models/embeddings, where ComfyUI, A1111 and diffusers find it, with what is known about it in "
            "the file's header. Nothing is overwritten: another word under a name that is taken gets a number.",
            is_output_node=True,
            inputs=[
                EmbeddingType.Input("embedding", tooltip="From Train Embedding."),
                io.String.Input(
                    "name",
                    default="my-style",
                    tooltip="File name without ending; prompts then say embedding:my-style. 1 word of letters, digits, - _ .",
                ),
                io.Image.Input(
                    "preview",
                    optional=True,
                    tooltip="A picture to lie beside the file; the first (1) of a batch is taken.",
                ),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="The name it was saved under.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        return name_fault(name, saved=True) or True

    @classmethod
    def execute(cls, embedding, name, preview=None) -> io.NodeOutput:
        first, *more = [
            save(files.Embedding(vectors, word, embedding.facts), word, preview)
            for word, vectors in embedding.words(name).items()
        ]
        said = " and ".join(f"embedding:{file.stem}" for file in (first, *more))
        return io.NodeOutput(first.stem, ui=ui.PreviewText(f"Saved. In prompts: {said}"))


def name_fault(name: str | None, saved: bool = False) -> str | None:
    """What is wrong with the name of a word, before a training of an hour comes to it; None is a wire."""
    try:
        if name is not None:
            files.check_name(name)
            if saved:
                _refuse_elsewhere(name, Path(folder_paths.get_folder_paths("embeddings")[0]))
    except ValueError as error:
        return str(error)
    return None


def save(embedding: files.Embedding, name: str, preview: torch.Tensor | None = None) -> Path:
    """Write to the first embeddings folder. The same bytes under the same name are left as they are."""
    root = Path(folder_paths.get_folder_paths("embeddings")[0])
    _refuse_elsewhere(files.check_name(name), root)
    file, n = root / f"{name}{SUFFIX}", 1
    while True:
        data = files.to_bytes(files.Embedding(embedding.vectors, file.name.removesuffix(SUFFIX), embedding.facts))
        if not _taken(file, data):
            break
        n += 1
        file = root / f"{name}-{n}{SUFFIX}"
        _refuse_elsewhere(f"{name}-{n}", root)
    if not file.exists():
        artefact.write_whole(file, data)
    if preview is not None:
        to_image(preview[0].movedim(-1, 0)).save(file.with_suffix(".png"))
    return file


def _taken(file: Path, data: bytes) -> bool:
    """By another word, in any of the formats that ComfyUI reads."""
    others = any(file.with_name(file.name.removesuffix(SUFFIX) + ending).exists() for ending in (".pt", ".bin"))
    return file.read_bytes() != data if file.exists() else others


def _refuse_elsewhere(name: str, root: Path) -> None:
    """ComfyUI searches every embeddings folder and its sub-folders by stem, and takes whichever it meets first."""
    for file in folder_paths.get_filename_list("embeddings"):
        full = Path(folder_paths.get_full_path("embeddings", file))
        if full.stem == name and full.parent.resolve() != root.resolve():
            raise ValueError(
                f"An embedding named {name!r} exists in {full.parent}, and ComfyUI would pick one of the two: choose another name."
            )


class LoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadEmbedding",
            display_name="Load Embedding",
            category=CATEGORY,
            description="A saved word, from models/embeddings, or a snapshot of a training run.",
            search_aliases=["textual inversion", "snapshot", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "embedding",
                    options=sources(),
                    tooltip="A file in models/embeddings (.safetensors, or the older .pt and .bin), or run: a step of a run; 1 of them.",
                ),
                io.Combo.Input(
                    "second",
                    options=[NONE, *sources()],
                    default=NONE,
                    optional=True,
                    tooltip="Where one word lies in 2 files, as diffusers leaves them for SDXL: the other file. Both become one word for clip_l "
                    "(768 numbers) and clip_g (1280).",
                ),
            ],
            outputs=[
                EmbeddingType.Output(
                    display_name="embedding",
                    tooltip="To Use Embedding; files in models/embeddings also work by name alone.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, embedding, second=NONE):
        stats = [source_file(choice).stat() for choice in (embedding, second) if choice != NONE]
        return " ".join(f"{s.st_mtime_ns}-{s.st_size}" for s in stats)

    @classmethod
    def execute(cls, embedding, second=NONE) -> io.NodeOutput:
        loaded = load(embedding)
        return io.NodeOutput(loaded if second == NONE else files.joined(loaded, load(second)))


def load(choice: str) -> files.Embedding:
    file = source_file(choice)
    if file.name == "checkpoint.safetensors":
        tree = artefact.read_tree(file)
        return files.Embedding.of(tree["state"]["learned"], file.parent.name, {"step": tree["step"]})
    return files.load(file)


RUN = "run: "


def _runs() -> Path:
    return Path(folder_paths.get_output_directory()) / "counterpoint"


def sources() -> list[str]:
    """Embedding files, then what training runs have left."""
    saved = [f for f in folder_paths.get_filename_list("embeddings") if f.endswith((SUFFIX, ".pt", ".bin"))]
    left = sorted(_runs().glob("*/checkpoint.safetensors")) + sorted(_runs().glob("*/snapshots/*.safetensors"))
    return saved + [RUN + f.relative_to(_runs()).as_posix() for f in left]


def source_file(choice: str) -> Path:
    if not choice.startswith(RUN):
        return Path(folder_paths.get_full_path_or_raise("embeddings", choice))
    file = (_runs() / choice.removeprefix(RUN)).resolve()
    if _runs().resolve() not in file.parents or not file.exists():
        raise FileNotFoundError(
            f"There is no {choice!r} in output/counterpoint: press R to refresh the list and choose again."
        )
    return file


NODES = [UseEmbedding, SaveEmbedding, LoadEmbedding]
