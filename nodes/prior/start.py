"""Fit Start Distribution."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ...training.prior.starts import KINDS, fit, unexplained
from ...training.prior.trainer import apart
from .pairs import CATEGORY, PairsType

StartType = io.Custom("START_DISTRIBUTION")


class FitStartDistribution(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointFitStartDistribution",
            display_name="Fit Start Distribution",
            category=CATEGORY,
            description="Where a prior begins: not at pure noise but near the embeddings that real pictures have. What counts is how wide it "
            "is; where its middle lies does nearly nothing.",
            search_aliases=["shifted diffusion", "corgi", "clusters", "whitening", "ridge"],
            inputs=[
                PairsType.Input("pairs", tooltip="From Embed Pairs; 2 at the least."),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="whitened",
                    tooltip="whitened: mean and spread of all pictures. ridge: a mean computed from the text. clusters: k-means of the captions. "
                    "clusters as published: 1024 Gaussians in the paper, chosen by cosine. none: pure noise.",
                ),
                io.Int.Input("clusters", default=64, min=1, max=4096, tooltip="How many, for the 2 kinds that have clusters."),
                io.Float.Input(
                    "scale", default=1.0, min=0.05, max=10.0, step=0.05,
                    tooltip="Times the spread of the pictures: 1 is right; the paper's 5 gives most of what is won away.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=False, advanced=True, tooltip="Draws where k-means begins, 0 and up."),
            ],
            outputs=[
                StartType.Output(display_name="start", tooltip="To Train Prior."),
                io.String.Output(display_name="report", tooltip="How much of the pictures' variance it leaves open."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, pairs, kind, clusters, scale, seed) -> io.NodeOutput:
        stop = comfy.model_management.throw_exception_if_processing_interrupted
        rows, held = apart(len(pairs))
        start = fit(
            kind, pairs.pooled[rows], pairs.images[rows], clusters, torch.Generator().manual_seed(seed), scale, stop
        )
        judged = held or rows
        left = unexplained(start, pairs.pooled[judged], pairs.images[judged])
        said = (
            f"{kind}, fitted to {len(rows)} pairs: around its middle lies {left:.2f} of the variance of {len(judged)} "
        )
        said += "pictures that it has not seen." if held else "of them."
        return io.NodeOutput(start, said, ui=ui.PreviewText(said))


NODES = [FitStartDistribution]
