"""Claim: Train Style LoRA learns a style from pictures that all show one object; what keeps the object out of it?

    python dev.py evidence learn_style_lora --screen       every arm, one seed
    python dev.py evidence learn_style_lora                every arm, three fresh seeds

The pictures, negatives and questions are those of `learn_style`; the node's defaults, trigger "picture". Not run yet.
"""

from __future__ import annotations

import statistics

from evidence.learn_style import CONDITION, Laboratory
from harness.claim import Claim, Plan, command, models_hash

ARMS = {
    "plain": {"method": "plain"},
    "paper": {"method": "paper"},
    "reference point": {"method": "reference point"},
    "reference point, together": {"method": "reference point", "together": True},
    "plain, captions": {"method": "plain", "caption_use": "caption"},
    "plain, captions, none empty": {"method": "plain", "caption_use": "caption", "empty": 0.0},
}
CLAIM = Claim(
    name="learn_style_lora",
    about=__doc__,
    screen=Plan((CONDITION,), tuple(ARMS), (0,)),
    confirm=Plan((CONDITION,), tuple(ARMS), (1, 2, 3)),
    measures=("style", "stroke", "paper", "line", "leak", "style elsewhere", "shape followed", "colour followed"),
    baseline="plain",
    seconds=90,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Laboratory.open()
    return models_hash(), lambda condition, arm, seed: measure(laboratory, int(condition[-1]), arm, seed)


def measure(laboratory: Laboratory, style: int, arm: str, seed: int) -> dict:
    import comfy.sd

    train, given = laboratory.nodes.train_lora, ARMS[arm]
    shape, images, captions = laboratory.pictures(style, seed)
    negatives = None if given["method"] == "plain" else laboratory.negatives_of(seed, captions)
    values = {
        **laboratory.nodes.training_job.defaults(train.TrainStyleLora),
        "preview_every": 0,
        "caption_use": "template",
        **given,
        "seed": seed,
    }
    unchanged = laboratory.model
    job = train.LoraJob(unchanged, laboratory.clip, laboratory.vae, images, captions, negatives, values)
    learned, records, *_ = job.run()
    try:
        laboratory.model, _ = comfy.sd.load_lora_for_models(unchanged, None, learned, 1.0, 0.0)
        measures = laboratory.look(laboratory.clip, "picture", laboratory.world.HELD_OUT[style], shape, seed)
    finally:
        laboratory.model = unchanged
    told = {
        k: round(statistics.mean(r[k] for r in records), 3) for k in ("cosine", "removed", "norm") if k in records[0]
    }
    return {"measures": measures, "contrast": told, "last losses": [round(r["loss"], 4) for r in records[-20:]]}
