"""Training Curves: what the steps of a training logged, as small plots."""

from __future__ import annotations

import json

import numpy
import torch
from comfy_api.latest import io, ui

from ..training.learning_curves import learning_curves, logged, own_titles
from ..training.run import Run
from .snapshots import existing_run


class TrainingCurves(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointTrainingCurves",
            display_name="Training Curves",
            category="Counterpoint/metrics",
            description="Draws what a training logged, a small plot for each: the loss, what was shared with the negatives and removed, how "
            "much of a step is signal, and how long the word or how large the LoRA has become.",
            search_aliases=["loss curve", "loss graph", "training log", "gradient", "plot"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "run",
                    force_input=True,
                    tooltip="The output run of Train Embedding, Train Style LoRA, Train Prior or Train Image Tokens, which says where its log lies; 1 name.",
                ),
                io.Int.Input(
                    "window",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="The line is the mean of the last 20 steps; 1 joins the dots, larger is smoother.",
                ),
            ],
            outputs=[io.Image.Output(display_name="plots", tooltip="One picture with 1 to 9 plots.")],
        )

    @classmethod
    def execute(cls, run, window) -> io.NodeOutput:
        folder = existing_run(run)
        records = Run(folder, {}).history()
        series = logged(records)
        if not series:
            raise ValueError(
                f"The run {run.strip()!r} has logged no step: let its training node do at least 1, then run the graph again."
            )
        config = json.loads((folder / "config.json").read_text())["config"]
        drawn = learning_curves(series, window, own_titles(config))
        plots = torch.from_numpy(numpy.asarray(drawn, dtype=numpy.float32) / 255)[None]
        shown = ui.PreviewImage(plots, cls=cls).as_dict()
        return io.NodeOutput(plots, ui={**shown, "text": [summary(run.strip(), records, window)]})


def summary(name: str, records: list[dict], window: int) -> str:
    """How many steps, and the loss at both ends."""
    done = f"{len(records)} steps of {name}, {records[-1].get('skipped', 0):.0f} of them skipped."
    losses = [r["loss"] for r in records if "loss" in r]
    if not losses:
        return f"{done} No loss was a number."
    first, last = losses[:window], losses[-window:]
    return (
        f"{done} Loss {sum(first) / len(first):.3g} in the first {len(first)} steps, "
        f"{sum(last) / len(last):.3g} in the last {len(last)}."
    )


NODES = [TrainingCurves]
