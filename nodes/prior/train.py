"""Fit Start Distribution, Train Prior."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict
from typing import NamedTuple

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ...training.learning_curves import PRIOR, learning_curves, logged, trailing_mean
from ...training.loop import Diverged, train
from ...training.prior.network import Shape, drawn
from ...training.prior.pairs import Pairs
from ...training.prior.prior import Prior
from ...training.prior.starts import KINDS, StartDistribution, fit, unexplained
from ...training.prior.trainer import PriorTrainer, Settings, apart
from ...training.run import Run
from ..progress import Reporter
from ..training_job import plottable, run_folder, thinned
from .pairs import CATEGORY, PairsType

PriorType, StartType = io.Custom("PRIOR"), io.Custom("START_DISTRIBUTION")


class Preset(NamedTuple):
    """What decides quality most, under one name."""

    start: str
    scale: float
    schedule: str
    weight: str


PRESETS = {
    "recommended": Preset("whitened", 1.0, "cosine", "uniform"),
    "paper": Preset("clusters as published", 5.0, "linear", "P2"),
}
SIZES = {"auto": None, "small": (128, 4, 4), "medium": (256, 6, 4), "large": (512, 12, 8)}


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
        rows, held = apart(len(pairs), 0)
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


class TrainPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointTrainPrior",
            display_name="Train Prior",
            category=CATEGORY,
            description="Teaches a small diffusion model how the picture of a caption looks to a CLIP. Sample Prior then makes image embeddings "
            "from text, for unCLIP, ReVision, IP-Adapters and Image Tokens.",
            search_aliases=["unclip prior", "dalle 2 prior", "shifted diffusion", "text to image embedding"],
            not_idempotent=True,
            inputs=[
                PairsType.Input("pairs", tooltip="From Embed Pairs: hundreds at the least, better 10 000 and more."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="recommended",
                    tooltip="recommended: start at the spread of the pictures, cosine schedule, all noise levels alike. paper: Shifted Diffusion as "
                    "published: clusters at 5 times their spread, linear schedule, weight 1 - alpha-bar.",
                ),
                io.Int.Input("steps", default=2000, min=1, max=1_000_000, tooltip="2000 for Pocket (2 minutes on two cores), 20 000 and more for a large CLIP."),
                io.Int.Input("batch", default=64, min=1, max=4096, tooltip="Captions per step, 64; each with 4 noises."),
                io.Float.Input(
                    "learning_rate", default=0.001, min=0.0, max=0.1, step=0.0001, round=0.00001,
                    tooltip="0.001 for small and medium, 0.0003 for large.",
                ),
                io.Combo.Input(
                    "network", options=list(SIZES), default="auto",
                    tooltip="How large it is: small 0.9, medium 5, large 39 million numbers. auto: small for Pocket, large for CLIPs of 512 numbers and more.",
                ),
                io.Float.Input("empty", default=0.1, min=0.0, max=0.9, step=0.05, tooltip="Share of captions left empty, 0.1, so that guidance has something to compare with."),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=False, tooltip="Another seed, another run: 0 and up."),
                io.Int.Input("look_every", default=200, min=0, max=100_000, advanced=True, tooltip="Steps between looks at 64 captions that were held out; 0 for none."),
                io.String.Input("run", default="", advanced=True, tooltip="Folder under output/counterpoint for checkpoints and the log; empty makes one from the settings (8 characters of their hash)."),
                StartType.Input("start", optional=True, tooltip="From Fit Start Distribution, 1, in the place of the preset's own."),
            ],
            outputs=[
                PriorType.Output(display_name="prior", tooltip="To Sample Prior or Save Prior."),
                io.LossMap.Output(display_name="loss_map", tooltip="For core's Plot Loss Graph; a mean over the last 20 steps at each point."),
                io.String.Output(display_name="report", tooltip="What was done, and all figures of the last look."),
                io.String.Output(display_name="run", tooltip="Name of the run's folder: to Training Curves."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, pairs, preset, run, look_every, network, start=None, **values) -> io.NodeOutput:
        job = PriorJob(pairs, PRESETS[preset], network, start, values)
        prior, records, report, name = job.run(run, look_every)
        curve = trailing_mean([r["loss"] for r in records if "loss" in r], 20)
        steps = records[-1]["step"] if records else 0
        shown = {"text": [report], "counterpoint_loss": thinned(curve), "counterpoint_steps": [steps]}
        return io.NodeOutput(prior, {"loss": plottable(curve)}, report, name, ui=shown)


class PriorJob:
    """One press of Run."""

    def __init__(self, pairs: Pairs, preset: Preset, network: str, start: StartDistribution | None, values: dict):
        rows, _ = apart(len(pairs), values["seed"])
        self.pairs = pairs
        self.start = start or fit(preset.start, pairs.pooled[rows], pairs.images[rows], scale=preset.scale)
        self.settings = Settings(schedule=preset.schedule, weight=preset.weight, **values)
        self.shape = shape_of(pairs, network)

    def run(self, name: str, look_every: int) -> tuple[Prior, list[dict], str, str]:
        settings = self.settings
        config = {k: v for k, v in asdict(settings).items() if k != "steps"} | {
            "pairs": len(self.pairs), "text": self.pairs.text, "image": self.pairs.image, "shape": asdict(self.shape),
            "contents": digest(self.pairs.images, self.pairs.pooled), "start": digest(*self.start.tensors.values()),
            **self.start.metadata(),
        }  # fmt: skip
        with Run(run_folder(name, "train-prior", config), config, {"steps": settings.steps}) as run:
            device, reporter = comfy.model_management.get_torch_device(), Reporter(settings.steps)
            with torch.inference_mode(False), torch.enable_grad():
                network = drawn(self.shape, torch.Generator().manual_seed(settings.seed))
                trainer = PriorTrainer(self.pairs, network, self.start, settings, device, look_every)
                done, problem = self._follow(trainer, run, reporter)
                figures, prior = trainer.look(), trainer.finished()
            prior.facts |= {"steps": done, "pairs": len(self.pairs), "figures": figures}
            records, report = run.history(done), self._report(prior, problem)
            reporter.say(report)
            return prior, records, report, run.folder.name

    def _follow(self, trainer: PriorTrainer, run: Run, reporter: Reporter) -> tuple[int, str]:
        done = (run.load_checkpoint() or (0,))[0]
        with contextlib.closing(train(trainer, run, self.settings.steps)) as steps:
            try:
                for progress in steps:
                    done = progress.step
                    looked = "frechet" in progress.scalars
                    reporter.update(progress, learning_curves(logged(run.history()), 20, PRIOR) if looked else None)
                    if reporter.finishing():
                        return done, f"Finished early, at step {done} of {progress.steps}, because you asked."
            except Diverged as error:
                return done, f"{error}: training stopped at step {done}. Try a smaller learning rate."
        return done, ""

    def _report(self, prior: Prior, problem: str) -> str:
        size, figures = sum(p.numel() for p in prior.network.parameters()) / 1e6, prior.facts["figures"]
        said = f"{prior.facts['steps']} steps on {len(self.pairs)} pairs, {size:.1f} million numbers, start {self.start.kind}. "
        if figures:
            said += "Captions it has not seen: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()) + ". "
        return said + problem


def shape_of(pairs: Pairs, network: str) -> Shape:
    length, width = pairs.words
    dim, text_dim = pairs.images.shape[1], pairs.pooled.shape[1]
    own = SIZES[network] or SIZES["small" if max(dim, width) <= 256 else "large"]
    return Shape(dim, text_dim, width, *own, length)


def digest(*tensors: torch.Tensor) -> str:
    """16 hex digits of their contents."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


NODES = [FitStartDistribution, TrainPrior]
