"""Can Pocket learn its six held-out styles at all? A word for each, learned plainly, beside the two ceilings it has.

    python dev.py evidence held_out

Twenty captioned pictures of varied things teach the word; it is judged on 64 captions that it has not seen. `real
pictures` is the judge on painted pictures of that style, `described` is Pocket asked for the style's three factors in
words it knows, which is what a word can reach without teaching the model anything.
"""

from __future__ import annotations

import torch

from evidence.learn_style import Laboratory
from harness.claim import Claim, Plan, command, models_hash

TRAINING, ASKED = 20, 64
STYLES = tuple(f"style-{i}" for i in range(6))
ARMS = ("real pictures", "described", "learned")
CLAIM = Claim(
    name="held_out",
    about=__doc__,
    screen=Plan(STYLES, ARMS, (0,)),
    confirm=Plan(STYLES, ARMS, (1, 2)),
    measures=("stroke", "paper", "line", "all three", "shape", "colour"),
    baseline="described",
    seconds=30,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Laboratory.open()
    return models_hash(), lambda condition, arm, seed: measure(laboratory, int(condition[-1]), arm, seed)


def measure(laboratory: Laboratory, style: int, arm: str, seed: int) -> dict:
    world, grammar = laboratory.world, laboratory.grammar
    combination = world.HELD_OUT[style]
    factors = dict(zip(world.FACTORS, combination, strict=True))
    asked = world.sample_scenes(ASKED, 900 + seed, **factors)
    contents = [grammar.content(asked, i) for i in range(ASKED)]
    if arm == "real pictures":
        pictures = laboratory.paint(asked).image
    elif arm == "described":
        prompts = [f"{c}, {grammar.factor_words(combination)}" for c in contents]
        pictures = laboratory.sample(laboratory.clip, prompts, seed)
    else:
        clip = learn(laboratory, world.sample_scenes(TRAINING, 500 + seed, **factors), seed)
        pictures = laboratory.sample(clip, [f"{c} in the style of embedding:word" for c in contents], seed)
    seen = laboratory.judge.see(pictures)
    right = {k: seen[k] == getattr(asked, k) for k in (*world.FACTORS, "shape", "colour")}
    right["all three"] = torch.stack([right[f] for f in world.FACTORS]).all(0)
    return {"measures": {k: round(right[k].float().mean().item(), 4) for k in CLAIM.measures}}


def learn(laboratory: Laboratory, scenes, seed: int):
    """A CLIP that knows `embedding:word`, learned from pictures and captions with the node's own defaults."""
    images = [i[None].movedim(1, -1) for i in laboratory.paint(scenes).image]
    captions = [laboratory.grammar.content(scenes, i) for i in range(len(scenes))]
    train = laboratory.nodes.train_embedding
    values = {**laboratory.nodes.training_job.defaults(train.TrainEmbedding), "preview_every": 0, "seed": seed}
    models = laboratory.model, laboratory.clip, laboratory.vae
    learned = train.WordJob(*models, images, captions, None, values).run().learned
    return laboratory.nodes.bridge.with_embeddings(laboratory.clip, {"word": learned.vectors})
