"""Claim: Train Style LoRA learns a style from pictures that all show one object; what keeps the object out of it?

    python dev.py evidence learn_style_lora --screen       every arm, one seed
    python dev.py evidence learn_style_lora                all but the reference point, three fresh seeds

The pictures, negatives and questions are those of `learn_style`; the node's defaults, trigger "picture". A LoRA strengthens the
style by itself, so the same questions are asked at CFG 1.5 and, for comparison with words, at 4 ("strong").

Found: negatives do not keep the object out. Captions do, if none of them is left empty; without captions empty ones keep more style.
"""

from __future__ import annotations

import statistics

from evidence.learn_style import CONDITION, Laboratory
from harness.claim import Claim, Plan, command, models_hash

A_QUARTER = {
    "empty": 0.25
}  # of the captions are left empty, so that what is painted without a prompt takes the style too
ARMS = {
    "base": None,
    "plain": {"method": "plain", **A_QUARTER},
    "paper": {"method": "paper", **A_QUARTER},
    "reference point": {"method": "reference point", **A_QUARTER},
    "plain, none empty": {"method": "plain", "empty": 0.0},
    "plain, captions": {"method": "plain", "caption_use": "caption", **A_QUARTER},
    "plain, captions, none empty": {"method": "plain", "caption_use": "caption", "empty": 0.0},
}
CONFIRMED = tuple(arm for arm in ARMS if arm != "reference point")
README = ("style", "leak", "style elsewhere", "shape followed", "style elsewhere, strong")
KEPT = ("style", "leak", "style elsewhere", "shape followed")
CFG = {"": 1.5, ", strong": 4.0}
CLAIM = Claim(
    name="learn_style_lora",
    about=__doc__,
    screen=Plan((CONDITION,), tuple(ARMS), (0,)),
    confirm=Plan((CONDITION,), CONFIRMED, (1, 2, 3)),
    measures=tuple(measure + how for how in CFG for measure in KEPT),
    baseline="plain",
    seconds=230,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Laboratory.open()
    return models_hash(), lambda condition, arm, seed: measure(laboratory, int(condition[-1]), arm, seed)


def measure(laboratory: Laboratory, style: int, arm: str, seed: int) -> dict:
    import comfy.sd

    shape, images, captions = laboratory.pictures(style, seed)
    if ARMS[arm] is None:
        return {"measures": look(laboratory, style, shape, seed)}
    learned, records = learn(laboratory, ARMS[arm], seed, images, captions)
    unchanged = laboratory.model
    try:
        laboratory.model, _ = comfy.sd.load_lora_for_models(unchanged, None, learned, 1.0, 0.0)
        measures = look(laboratory, style, shape, seed)
    finally:
        laboratory.model = unchanged
    told = {
        k: round(statistics.mean(r[k] for r in records), 3) for k in ("cosine", "removed", "norm") if k in records[0]
    }
    return {"measures": measures, "contrast": told, "last losses": [round(r["loss"], 4) for r in records[-20:]]}


def learn(laboratory: Laboratory, given: dict, seed: int, images: list, captions: list[str]):
    train = laboratory.nodes.train_lora
    negatives = None if given["method"] == "plain" else laboratory.negatives_of(seed, captions)
    fixed = {"preview_every": 0, "snapshot_every": 0, "caption_use": "template"}
    values = {**laboratory.nodes.training_job.defaults(train.TrainStyleLora), **fixed, **given, "seed": seed}
    return train.LoraJob(laboratory.model, laboratory.clip, laboratory.vae, images, captions, negatives, values).run()[
        :2
    ]


def look(laboratory: Laboratory, style: int, shape: int, seed: int) -> dict[str, float]:
    measures = {}
    for how, laboratory.cfg in CFG.items():
        seen = laboratory.look(laboratory.clip, "picture", laboratory.world.HELD_OUT[style], shape, seed)
        measures |= {measure + how: seen[measure] for measure in KEPT}
    return measures
