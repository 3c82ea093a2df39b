"""`python dev.py pocket --stages prior tokens`: Pocket's own prior, from the captions and pictures that its towers were trained on, and
image tokens with which its UNet paints from embeddings, from the pictures alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from ..training import artefact
from ..training.image_tokens import to_bytes as to_file
from ..training.loop import train
from ..training.pocket import pictures
from ..training.prior.network import drawn, shape_of
from ..training.prior.pairs import SHARD, Pair, Pairs, measured
from ..training.prior.prior import to_bytes
from ..training.prior.starts import fit
from ..training.prior.trainer import PriorTrainer, Settings
from ..training.run import Run
from . import image_tokens, pocket_card, pocket_models, train_image_tokens, training_job
from .prior.pairs import encoders_of

PICTURES, STEPS = 12_000, 3_000
TOKEN_PICTURES, TOKEN_STEPS = 2_000, 2_500
log = logging.getLogger("counterpoint.pocket")


def train_prior(folder: Path) -> None:
    """About 15 minutes on one idle core."""
    pairs = pocket_pairs(folder)
    start = fit("whitened", pairs.pooled, pairs.images)
    settings = Settings(steps=STEPS, batch=64)
    network = drawn(shape_of(128, 128, 128, 77), torch.Generator().manual_seed(0))
    trainer = PriorTrainer(pairs, network, start, settings, look_every=500)
    with Run(folder / "prior", {"stage": "prior", "pairs": len(pairs)}, {"steps": STEPS}) as run:
        for progress in train(trainer, run, STEPS):
            if progress.step % 500 == 0:
                log.info("prior %d %s", progress.step, {k: round(v, 3) for k, v in progress.scalars.items()})
    prior = trainer.finished()
    prior.network.half()
    prior.space = f"Pocket's CLIP, {prior.dim} numbers"
    prior.facts = {"steps": STEPS, "pairs": len(pairs), "figures": trainer.look()}
    artefact.write_whole(pocket_models.MODELS / "clip_priors" / "pocket-prior.safetensors", to_bytes(prior))
    pocket_card.write(pocket_card.known())


def pocket_pairs(folder: Path) -> Pairs:
    images, scenes = pictures.load(folder, "train", PICTURES // pictures.SHARD)
    (captions,) = pictures.caption_variants(scenes, 1)

    def part(first: int) -> Iterator[Pair]:
        for i in range(first, min(first + SHARD, PICTURES)):
            yield images[i].movedim(0, -1)[None].float() / 255, captions[i]

    parts = [
        (f"world-{pictures.VERSION} {first}", lambda first=first: part(first)) for first in range(0, PICTURES, SHARD)
    ]
    with torch.inference_mode():
        encoders = encoders_of(pocket_models.load_clip(), pocket_models.load_vision())
        return measured(parts, encoders, folder / "prior-pairs")


def train_tokens(folder: Path) -> None:
    """About 15 minutes on one idle core."""
    images, _ = pictures.load(folder, "train", 2)
    shown = [image.movedim(0, -1)[None].float() / 255 for image in images[:TOKEN_PICTURES]]
    models = pocket_models.load_model(), pocket_models.load_clip(), pocket_models.load_vae()
    values = training_job.defaults(train_image_tokens.TrainImageTokens)
    values |= {
        "clip_vision": pocket_models.load_vision(),
        "steps": TOKEN_STEPS,
        "learning_rate": 0.004,  # long and slow; what the node takes unless told is for a few minutes
        "noise": 0.3,
        "preview_every": 0,
        "snapshot_every": 0,
    }
    learned, _, said, _ = train_image_tokens.TokenJob(*models, shown, None, None, values).run()
    log.info(said)
    file = pocket_models.MODELS / image_tokens.FOLDER / "pocket-tokens.safetensors"
    artefact.write_whole(file, to_file(learned))
    pocket_card.write(pocket_card.known())
