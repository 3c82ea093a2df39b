"""Guidance Curve: what a setting gives in prompt fidelity, and what it costs in distance from real pictures."""

from __future__ import annotations

import json

import comfy.model_management
import numpy
import torch
from comfy_api.latest import io, ui

from ..training import comparison, similarity
from ..training.comparison import Figure
from ..training.curve import Point, Value, curve
from ..training.distances import Overlap
from ..training.intervals import mean_interval
from .features import CATEGORY, FeaturesType
from .metrics import CONNECTED, fault_of, fingerprint_of, measure, set_inputs
from .similarity import read_captions

MOST = 12
FIDELITY = ("CLIP score", "R-precision")
DISTANCES = [name for names in comparison.METRICS for name in names]


class GuidanceCurve(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rows = io.Autogrow.TemplatePrefix(
            io.Image.Input("row", tooltip="The pictures of 1 setting, painted for the same captions: a batch or a list."),
            prefix="row",
            min=2,
            max=MOST,
        )  # fmt: skip
        return io.Schema(
            node_id="CounterpointGuidanceCurve",
            display_name="Guidance Curve",
            category=CATEGORY,
            description="Pictures of several settings, most often CFG 1, 2, 4 and 8, for the same captions: prompt fidelity against distance "
            "from real pictures, a point for each. Where fidelity no longer grows and distance does, guidance is too high.",
            search_aliases=["fid against clip", "cfg", "trade-off", "pareto", "sweep"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FeaturesType.Input("features", tooltip="1 that reads as well as sees: Pocket, or a CLIP folder in models/features."),
                io.Autogrow.Input("rows", template=rows, tooltip=f"2 to {MOST} settings; a new socket appears when one is connected."),
                io.String.Input("captions", force_input=True, tooltip="What the pictures of every row were asked for: 1 caption each, or 1 for all."),
                io.String.Input("labels", default="", multiline=True, tooltip="1 line for each row, in order: CFG 1, CFG 2."),
                *set_inputs("reference", "Real pictures of such things"),
                io.Boolean.Input("recursive", default=False, tooltip="Of a folder, also take its sub-folders, at any depth (off: 0 levels)."),
                io.Combo.Input("distance", options=DISTANCES, default="KID",
                               tooltip="What is drawn against the CLIP score; the table has all 7. KID bears 50 pictures a row, FID wants 2 for every number of a feature."),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=False, advanced=True,
                             tooltip="Draws R-precision's 99 other captions and KID's 100 subsets."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="A line for each setting, a column for each metric."),
                io.Image.Output(display_name="plot", tooltip="The curve, 560 pixels wide, with 95 % intervals."),
                io.String.Output(display_name="json", tooltip="The same figures for other programs."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, reference_folder=None, rows=None):
        return fault_of(reference_folder) or True

    @classmethod
    def fingerprint_inputs(cls, reference_folder=None, recursive=None, **_):
        return fingerprint_of(recursive, reference_folder)

    @classmethod
    def execute(
        cls, features, rows, captions, labels, reference_folder, recursive, distance, seed, reference=None
    ) -> io.NodeOutput:
        (extractor,), sets = features[:1], {name: images for name, images in rows.items() if images}
        if len(sets) < 2:
            raise ValueError("Guidance Curve compares settings: connect the pictures of 2 or more.")
        real = measure(extractor, "reference", reference, reference_folder[0], recursive[0])
        how = comparison.How(seed=seed[0], tell=comfy.model_management.throw_exception_if_processing_interrupted)
        lines, settings = dict(enumerate(labels[0].splitlines())), {}
        for name, images in sets.items():
            made = measure(extractor, name, images, CONNECTED, False)
            said, texts = read_captions(extractor, captions, len(made))
            scores = similarity.clip_scores(made.values, texts)
            figures = [
                Figure(FIDELITY[0], *mean_interval(scores)),
                *compare_captions(made.values, texts, said, seed[0]),
            ]
            label = lines.get(int(name.removeprefix("row")), "").strip() or name
            settings[f"{label} ({name})" if label in settings else label] = [
                *figures, *comparison.compare(made, real, how)
            ]  # fmt: skip
        table = comparison.table_of_sets(settings)
        points = [point(label, figures, distance[0]) for label, figures in settings.items()]
        side = "higher is better" if distance[0] in Overlap._fields else "lower is nearer"
        drawn = curve(points, "CLIP score (higher follows the prompt more)", f"{distance[0]} ({side})")
        plot = torch.from_numpy(numpy.asarray(drawn, dtype=numpy.float32) / 255)[None]
        facts = {"features": extractor.name, "reference": len(real)}
        facts["settings"] = {k: {f.metric: f._asdict() for f in figures} for k, figures in settings.items()}
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), **ui.PreviewText(table).as_dict()}
        return io.NodeOutput(table, plot, json.dumps(facts), ui=shown)


def compare_captions(pictures: torch.Tensor, texts: torch.Tensor, captions: list[str], seed: int) -> list[Figure]:
    """R-precision, without a value where there are no other captions."""
    if len(set(captions)) == 1:
        return [Figure(FIDELITY[1], note="needs 2 different captions")]
    return [Figure(FIDELITY[1], *mean_interval(similarity.found(pictures, texts, captions, seed), share=True))]


def point(label: str, figures: list[Figure], distance: str) -> Point:
    """Raises ValueError where the distance has no value."""
    by_name = {f.metric: f for f in figures}
    x, y = by_name[FIDELITY[0]], by_name[distance]
    if y.value is None:
        raise ValueError(f"{distance} cannot be drawn, because for {label!r} it {y.note}: choose another distance.")
    return Point(label, *(Value(f.value, f.low, f.high) for f in (x, y)))


NODES = [GuidanceCurve]
