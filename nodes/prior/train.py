"""Train Prior."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import comfy.model_management
import torch
from comfy_api.latest import io
from PIL import Image

from ...training.learning_curves import PRIOR, learning_curves, logged
from ...training.loop import Progress
from ...training.prior.network import RATE, SIZES, drawn, shape_of
from ...training.prior.pairs import Pairs
from ...training.prior.prior import Prior
from ...training.prior.starts import StartDistribution, fit
from ...training.prior.trainer import PriorTrainer, Settings, apart
from ...training.run import Run
from ..features import managed
from ..progress import Reporter, follow
from ..training_job import Done, run_folder, told
from .pairs import CATEGORY, PairsType
from .start import StartType

PriorType = io.Custom("PRIOR")


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
FEW = 500  # pairs
CLUSTERS, EACH = 1024, 8  # of the preset that has any: as many as in the paper, of so many pairs at the least


@contextlib.contextmanager
def on_device(network: torch.nn.Module) -> Iterator[torch.device]:
    """While it lasts, a network lies where ComfyUI computes, under its memory management; afterwards nothing of it is left there."""
    patcher = managed(network)
    try:
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        yield patcher.load_device
    finally:
        patcher.detach()


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
                io.Int.Input("steps", default=2000, min=1, max=1_000_000, tooltip="2000 for Pocket; 20 000 and more for a large CLIP."),
                io.Int.Input("batch", default=64, min=1, max=4096, tooltip="Captions per step, 64; each with 4 noises."),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=0.1, step=0.0001, round=0.00001,
                    tooltip="0 takes 0.004 for small, 0.002 for medium, 0.001 for large; only that for small was measured.",
                ),
                io.Combo.Input(
                    "network", options=["auto", *SIZES], default="auto",
                    tooltip="How large it is: small 0.9, medium 5, large 39 million numbers. auto: small for Pocket, large for CLIPs of 512 numbers and more.",
                ),
                io.Float.Input("empty", default=0.1, min=0.0, max=0.9, step=0.05, tooltip="Share of captions left empty, 0.1, so that guidance has something to compare with."),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=False, tooltip="Another seed, another run: 0 and up."),
                io.Int.Input("look_every", default=200, min=0, max=100_000, advanced=True, tooltip="Steps between looks at the captions that were held out, a tenth and at most 256; 0 for none."),
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
        return told(PriorJob(pairs, PRESETS[preset], network, start, values).run(run, look_every))


class PriorJob:
    """One press of Run."""

    def __init__(self, pairs: Pairs, preset: Preset, network: str, start: StartDistribution | None, values: dict):
        rows, _ = apart(len(pairs))
        self.pairs = pairs
        self.start = start or fit(
            preset.start, pairs.pooled[rows], pairs.images[rows], min(CLUSTERS, max(1, len(rows) // EACH)), scale=preset.scale,
            tell=comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        length, width = pairs.words
        self.shape = shape_of(pairs.images.shape[1], pairs.pooled.shape[1], width, length, network)
        values["learning_rate"] = values["learning_rate"] or RATE / self.shape.width
        self.settings = Settings(schedule=preset.schedule, weight=preset.weight, **values)

    def run(self, name: str, look_every: int) -> Done:
        settings = self.settings
        config = {k: v for k, v in asdict(settings).items() if k != "steps"} | {
            "pairs": len(self.pairs), "text": self.pairs.text, "image": self.pairs.image, "shape": asdict(self.shape),
            "contents": digest(self.pairs.images, self.pairs.pooled), "start": digest(*self.start.tensors.values()),
            **self.start.metadata(),
        }  # fmt: skip
        with Run(run_folder(name, "train-prior", config), config, {"steps": settings.steps}) as run:
            reporter = Reporter(settings.steps)
            try:
                prior, problem = self._train(run, reporter, look_every)
            except comfy.model_management.OOM_EXCEPTION as error:
                raise ValueError(
                    f"A step of {settings.batch} captions, each with {settings.draws} noises, does not fit into memory: choose a batch of "
                    f"{max(1, settings.batch // 2)}, or a smaller network."
                ) from error
            records, report = run.history(prior.facts["steps"]), self._report(prior, problem)
            reporter.say(report)
            return Done(prior, records, report, run.folder.name)

    def _train(self, run: Run, reporter: Reporter, look_every: int) -> tuple[Prior, str]:
        settings = self.settings
        comfy.model_management.unload_all_models()  # the pairs are measured, and training wants the memory
        with torch.inference_mode(False), torch.enable_grad():
            network = drawn(self.shape, torch.Generator().manual_seed(settings.seed))
            with on_device(network) as device:
                trainer = PriorTrainer(self.pairs, network, self.start, settings, device, look_every)
                done, problem = follow(trainer, run, settings.steps, reporter, lambda progress: plot(progress, run))
                figures, prior = trainer.look(), trainer.finished()
        prior.facts |= {"steps": done, "pairs": len(self.pairs), "figures": figures}
        return prior, problem

    def _report(self, prior: Prior, problem: str) -> str:
        size, figures = sum(p.numel() for p in prior.network.parameters()) / 1e6, prior.facts["figures"]
        said = f"{prior.facts['steps']} steps on {len(self.pairs)} pairs, {size:.1f} million numbers, start {self.start.kind}. "
        if figures:
            said += "On captions it has not seen: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()) + ". "
        if len(self.pairs) < FEW:
            said += f"Fewer than {FEW} pairs are soon known by heart: watch frechet, or give more. "
        return said + problem


def plot(progress: Progress, run: Run) -> Image.Image | None:
    """The curves of all figures, after a step that looked."""
    return learning_curves(logged(run.history()), 20, PRIOR) if "frechet" in progress.scalars else None


def digest(*tensors: torch.Tensor) -> str:
    """16 hex digits of their contents."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


NODES = [TrainPrior]
