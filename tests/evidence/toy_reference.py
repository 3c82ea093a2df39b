"""How long the reference point knows where the content is: followed step by step in the world of toy_style.

    python dev.py evidence toy_reference --seeds 6 7 8

A word is learned plainly and with `reference point`, its norm kept. Now and then: where it leaks, how far it has come,
and the cosine of two mean gradients on the negatives, at the start (what `reference point` removes) and where the word
is now (where the content is now). One JSON file per seed; about a minute each.

Found: the first direction holds the content back while the word is near its start. The style lies about one length of
the word away; on the way there the content turns to other directions, and the word takes it from those.
"""

from __future__ import annotations

import argparse
import json

from evidence import toy_style
from harness import claim

RESULTS = claim.RESULTS / "toy_reference"
ARMS = ("plain", "reference point, norm")
LOOKS = (0, 25, 50, 100, 200, 400, 800, 1500)
BATCHES = 100  # of 4, for a mean gradient


def main(argv: list[str]) -> int:
    words = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="dev.py evidence toy_reference", description=__doc__, formatter_class=words)
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 7, 8])
    options = parser.parse_args(argv)
    models, _ = toy_style.open_laboratory()
    laboratory = toy_style.Laboratory()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        file = RESULTS / f"seed-{seed}.json"
        if not file.exists():
            found = {arm: follow(laboratory, arm, seed) for arm in ARMS}
            file.write_text(json.dumps({"seed": seed, "models": models, **found}, indent=1) + "\n", encoding="utf-8")
        print(file.read_text(encoding="utf-8"), flush=True)
    return 0


def follow(laboratory: toy_style.Laboratory, arm: str, seed: int) -> list[dict[str, float]]:
    content = laboratory.content(seed)
    trainer = laboratory.prepare(toy_style.ARMS[arm], content, seed, toy_style.STEPS)
    at_start = content_gradient(laboratory, content, seed, laboratory.start)
    looks = []
    for i in range(toy_style.STEPS + 1):
        vector = trainer.vectors["word"].detach().clone()
        if i in LOOKS:
            here = content_gradient(laboratory, content, seed, vector)
            measures = laboratory.look(vector, content, seed)
            cosine = (here @ at_start / here.norm() / at_start.norm()).item()
            moved = ((vector - laboratory.start).norm() / laboratory.start.norm()).item()
            looks.append({"step": i, "cosine": round(cosine, 3), "moved, over its length": round(moved, 3), **measures})
        if i < toy_style.STEPS:
            trainer.step(i)
    return looks


def content_gradient(laboratory: toy_style.Laboratory, content: str, seed: int, vector):
    """(width,) mean gradient on the negatives for a word at `vector`."""
    import torch
    from counterpoint.training.latents import draw

    arm = toy_style.ARMS["reference point"]
    trainer = laboratory.prepare(arm, content, seed, 1, vector)
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(BATCHES):
        batch = draw(trainer.latents, trainer.denoiser, 4, generator)
        rows.append(trainer._gradients(batch, ["thing {token}"] * 4)[2][0].flatten())
    return torch.stack(rows).mean(0)
