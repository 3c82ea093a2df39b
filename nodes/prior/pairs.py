"""Embed Pairs: captions and pictures, as a CLIP sees them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ...training import folder as files
from ...training.features import images_hash
from ...training.prior.pairs import SHARD, Encoders, Pair, measured
from ..dataset import roots
from ..features import of_clip_vision
from ..metrics import CONNECTED, fault_of, fingerprint_of, set_inputs
from ..progress import Reporter
from .text import identity, text_of

CATEGORY = "Counterpoint/prior"
PairsType = io.Custom("PAIRS")
log = logging.getLogger("counterpoint")
Part = tuple[str, Callable[[], Iterator[Pair]]]


class EmbedPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointEmbedPairs",
            display_name="Embed Pairs",
            category=CATEGORY,
            description="Captions and pictures as numbers, the way a CLIP sees them: what a prior learns from. They are kept, so only what is "
            "new is looked at the next time.",
            search_aliases=["clip embeddings", "cache embeddings", "text image pairs"],
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip", tooltip="Reads the captions; 1 CLIP, the one that the prior will be used with."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="Sees the pictures; the 1 whose embeddings your unCLIP, ReVision or IP-Adapter model takes: 768 numbers for ViT-L, "
                    "1024 for ViT-H, 1280 for ViT-bigG.",
                ),
                *set_inputs("images", "The pictures"),
                io.String.Input(
                    "captions",
                    force_input=True,
                    optional=True,
                    tooltip="1 caption for each connected picture. In a folder they lie beside the pictures as .txt files of the same name.",
                ),
                io.Boolean.Input(
                    "recursive", default=False, tooltip="Of a folder, also take its sub-folders, at any depth (off: 0 levels)."
                ),
            ],
            outputs=[
                PairsType.Output(display_name="pairs", tooltip="To Train Prior and Fit Start Distribution."),
                io.String.Output(display_name="report", tooltip="How many there are, and how many numbers each."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, images_folder=None):
        return fault_of(images_folder) or True

    @classmethod
    def fingerprint_inputs(cls, images_folder=None, recursive=None, **_):
        return fingerprint_of(recursive, images_folder)

    @classmethod
    def execute(cls, clip, clip_vision, images_folder, recursive, images=None, captions=None) -> io.NodeOutput:
        folder, skipped = images_folder[0], []
        if folder == CONNECTED:
            parts, count, without = of_inputs(images, captions)
        else:
            parts, count, without = of_folder(folder, recursive[0], skipped)
        if without == count:
            raise ValueError(
                f"None of the {count} pictures has a caption, and a prior learns from captions: write some as .txt files beside them, or use "
                "Caption Images."
            )
        reporter, encoders = Reporter(count), encoders_of(clip[0], clip_vision[0])

        def tell(done: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            reporter.bar.update_absolute(done)

        pairs = measured(parts, encoders, cache(), tell)
        said = f"{len(pairs)} pairs: {pairs.images.shape[1]} numbers for each picture, {pairs.pooled.shape[1]} for each caption."
        if without:
            said += f" {without} captions are empty."
        if skipped:
            said += f" {len(skipped)} skipped, {skipped[0]} for one."
        return io.NodeOutput(pairs, said, ui=ui.PreviewText(said))


def cache() -> Path:
    return Path(folder_paths.get_output_directory()) / "counterpoint" / "pairs"


def encoders_of(clip, vision) -> Encoders:
    def read(captions: list[str]):
        return text_of(clip, captions).texts

    return Encoders(identity(clip), read, of_clip_vision(vision))


def of_inputs(images: list[torch.Tensor] | None, captions: list[str] | None) -> tuple[list[Part], int, int]:
    """Parts of connected pictures and captions, how many pictures there are, and how many without a caption."""
    if not images:
        raise ValueError("There are no pictures: connect some, or choose a folder in images_folder.")
    pictures = [picture for batch in images for picture in batch.split(1)]
    captions = captions or []
    if len(captions) != len(pictures):
        raise ValueError(
            f"There are {len(captions)} captions for {len(pictures)} pictures: a prior learns which picture belongs to which caption, so give "
            "1 each, from Load Dataset or Caption Images."
        )
    parts = []
    for start in range(0, len(pictures), SHARD):
        some = list(zip(pictures[start : start + SHARD], captions[start : start + SHARD], strict=True))
        said = hashlib.sha256(json.dumps([c for _, c in some]).encode()).hexdigest()
        parts.append((images_hash(p for p, _ in some) + said, lambda some=some: iter(some)))
    return parts, len(pictures), sum(not c.strip() for c in captions)


def of_folder(folder: str, recursive: bool, skipped: list[str]) -> tuple[list[Part], int, int]:
    """The same of a folder, read when it is asked for; what cannot be read is named in `skipped`."""
    entries = files.find(folder, recursive, roots()).entries

    def read(some: list[files.Entry]) -> Iterator[Pair]:
        for entry in some:
            try:
                example = files.load(entry, files.How())
            except files.Unreadable as error:
                skipped.append(f"{entry.name}: {error}")
                log.warning("Embed Pairs skipped %s", skipped[-1])
                continue
            yield example.image, example.caption

    chunks = [entries[start : start + SHARD] for start in range(0, len(entries), SHARD)]
    parts = [(files.fingerprint(some), lambda some=some: read(some)) for some in chunks]
    return parts, len(entries), sum(entry.caption is None for entry in entries)


NODES = [EmbedPairs]
