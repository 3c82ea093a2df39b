"""How far apart sets of pictures are: Compare Sets."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy
import torch
from comfy_api.latest import io, ui

from ..training import comparison
from ..training import folder as files
from ..training.features import Extractor, Features, extract, images_hash, kept
from ..training.scatter import scatter, stacked, written
from .dataset import choices, roots
from .features import CATEGORY, FeaturesType
from .progress import Reporter

CONNECTED = "the pictures that are connected"
log = logging.getLogger("counterpoint")


def set_inputs(name: str, what: str) -> list:
    """Pictures from a socket, or from a folder instead."""
    return [
        io.Image.Input(name, optional=True, tooltip=f"{what}: 1 or more pictures, a batch or a list."),
        io.Combo.Input(
            f"{name}_folder",
            options=[CONNECTED, *choices()],
            default=CONNECTED,
            tooltip=f"{what} from a folder instead, read one picture at a time, so 50 000 fit into memory; so many take minutes.",
        ),
    ]


def labels_input(name: str) -> io.String.Input:
    return io.String.Input(
        f"{name}_labels",
        force_input=True,
        optional=True,
        tooltip="1 class name for each picture; with labels on both sides every class is measured by itself, too.",
    )


def fault_of(*folders: list[str] | None) -> str:
    """What is wrong with folders chosen on a node that takes lists; None is one that another node will give."""
    for given in folders:
        try:
            if given and given[0] not in (None, CONNECTED):
                files.check(given[0], roots())
        except files.FolderError as error:
            return str(error)
    return ""


def fingerprint_of(recursive: list[bool] | None, *folders: list[str] | None) -> list | float:
    """Changes with what lies in the folders; always, where another node gives the name of one."""
    if any(f and f[0] is None for f in folders):
        return float("nan")
    chosen = [f[0] for f in folders if f and f[0] not in (None, CONNECTED)]
    deep = not recursive or recursive[0] is not False
    return [files.fingerprint(files.find(folder, deep, roots()).entries) for folder in chosen]


class CompareSets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointCompareSets",
            display_name="Compare Sets",
            category=CATEGORY,
            description="How far a set of pictures is from a reference set: FID, KID, CMMD, precision and recall, density and coverage, "
            "with intervals, with what the reference gets against itself, and a warning where the sets are too small.",
            search_aliases=["fid", "kid", "cmmd", "precision recall", "density coverage", "evaluate", "metrics"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FeaturesType.Input("features", tooltip="From Load Features: what the pictures are seen with; 1 for both sets."),
                *set_inputs("made", "The pictures to judge"),
                labels_input("made"),
                *set_inputs("reference", "The pictures to compare with"),
                labels_input("reference"),
                io.Boolean.Input("recursive", default=False, tooltip="Of a folder, also take its sub-folders, at any depth (off: 0 levels)."),
                io.Int.Input(
                    "neighbours",
                    default=comparison.NEIGHBOURS,
                    min=1,
                    max=50,
                    advanced=True,
                    tooltip="How many neighbours make a ball in precision, recall, density and coverage; 5 is usual, 3 for precision and recall alone.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31, control_after_generate=False, advanced=True,
                    tooltip="Draws KID's 100 subsets, and the part of the reference that makes the floor.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="Every metric with its interval, to read."),
                io.Image.Output(display_name="plot", tooltip="The table, and both sets as points in the plane of 2 directions in which they vary most."),
                io.String.Output(display_name="json", tooltip="The same figures for other programs."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, made_folder=None, reference_folder=None):
        return fault_of(made_folder, reference_folder) or True

    @classmethod
    def fingerprint_inputs(cls, made_folder=None, reference_folder=None, recursive=None, **_):
        return fingerprint_of(recursive, made_folder, reference_folder)

    @classmethod
    def execute(
        cls, features, made_folder, reference_folder, recursive, neighbours, seed,
        made=None, reference=None, made_labels=None, reference_labels=None,
    ) -> io.NodeOutput:  # fmt: skip
        made_set = measure(features[0], "made", made, made_folder[0], recursive[0])
        real_set = measure(features[0], "reference", reference, reference_folder[0], recursive[0])
        how = comparison.How(neighbours[0], seed[0], comfy.model_management.throw_exception_if_processing_interrupted)
        figures = comparison.compare(made_set, real_set, how)
        table = comparison.table(figures, len(made_set), len(real_set), features[0].name)
        facts = {"features": features[0].name, "made": len(made_set), "reference": len(real_set)}
        facts["figures"] = {f.metric: f._asdict() for f in figures}
        if made_labels and reference_labels:
            classes = by_class(made_set, real_set, made_labels, reference_labels, how)
            table += "\n\n" + comparison.class_table(classes)
            facts["classes"] = {name: {f.metric: f._asdict() for f in row} for name, row in classes.items()}
        heading = comparison.heading(len(made_set), len(real_set), features[0].name)
        picture = stacked(
            written(heading, comparison.rows(figures), comparison.remarks(figures, len(made_set), len(real_set))),
            scatter(real_set.values, made_set.values, (f"reference, {len(real_set)}", f"made, {len(made_set)}")),
        )
        plot = torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)[None]
        shown = ui.PreviewImage(plot, cls=cls).as_dict()
        return io.NodeOutput(table, plot, json.dumps(facts), ui={**shown, **ui.PreviewText(table).as_dict()})


def cache() -> Path:
    return Path(folder_paths.get_output_directory()) / "counterpoint" / "features"


def measure(features: Extractor, name: str, images: list | None, folder: str, recursive: bool) -> Features:
    """A set as the extractor sees it, from the socket or a folder; from the cache where it was measured before."""
    if folder == CONNECTED:
        if not images:
            raise ValueError(f"There are no pictures for {name!r}: connect some, or choose a folder in {name}_folder.")
        singles = [picture for batch in images for picture in batch.split(1)]
        return kept(cache(), features, images_hash(singles), lambda: _extract(features, singles, len(singles)))
    entries = files.find(folder, recursive, roots()).entries
    before = files.fingerprint(entries)
    key = hashlib.sha256(f"{folder}|{recursive}|{before}".encode()).hexdigest()[:16]

    def compute() -> Features:
        made = _extract(features, _read(entries), len(entries))
        if files.fingerprint(files.find(folder, recursive, roots()).entries) != before:
            raise ValueError(
                f"The folder {folder!r} changed while it was read: wait until nothing writes to it, and run again."
            )
        return made

    return kept(cache(), features, key, compute)


def _extract(features: Extractor, pictures, count: int) -> Features:
    reporter = Reporter(count)

    def tell(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        reporter.bar.update_absolute(done)

    return extract(features, pictures, tell)


def _read(entries: list[files.Entry]) -> Iterator[torch.Tensor]:
    """Pictures one by one; one that cannot be read is skipped and named in the log."""
    for entry in entries:
        try:
            yield files.load(entry, files.How()).image
        except files.Unreadable as error:
            log.warning("Compare Sets skipped %s: %s", entry.name, error)


def by_class(
    made: Features, real: Features, made_labels: list[str], real_labels: list[str], how: comparison.How
) -> dict[str, list[comparison.Figure]]:
    """{class: figures} for the classes of both sets. Raises ValueError where labels and pictures differ in number."""
    for name, labels, measured in (("made", made_labels, made), ("reference", real_labels, real)):
        if len(labels) != len(measured):
            raise ValueError(
                f"There are {len(labels)} labels for the {len(measured)} pictures of {name!r}: give 1 each."
            )
    common = sorted(set(made_labels) & set(real_labels))
    if not common:
        raise ValueError(
            f"The two sets have no class in common: {made_labels[0]!r} and {real_labels[0]!r}, for example."
        )

    def of(features: Features, labels: list[str], name: str) -> Features:
        rows = [i for i, label in enumerate(labels) if label == name]
        return Features(features.values[rows], features.extractor, features.identity)

    return {name: comparison.compare(of(made, made_labels, name), of(real, real_labels, name), how) for name in common}


NODES = [CompareSets]
