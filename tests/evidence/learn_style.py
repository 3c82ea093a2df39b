"""Claim of `01 learn a style`: a style is learned from pictures that all show one object, and the object is not.

    python dev.py evidence learn_style --screen            plain inversion on the six held-out styles, one seed
    python dev.py evidence learn_style                     every arm on the demo's style, three fresh seeds (20 minutes)

Found: contrast, as published and with a fixed reference, keeps nothing out of the word here, with or without its length
held; captions do. `why_no_contrast.py` says why.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from harness.boot import boot, load_pack, prepare
from harness.claim import Claim, Plan, command, models_hash

PICTURES = 16
SAMPLES = 64
ARMS = {
    "base": None,
    "plain": {"method": "plain", "strength": 1.0},
    "paper": {"method": "paper", "strength": 1.0},
    "reference point": {"method": "reference point", "strength": 1.0},
    "plain, captions": {"method": "plain", "strength": 1.0, "caption_use": "caption"},
    "reference point, norm kept": {"method": "reference point", "strength": 1.0, "keep_norm": True},
}
STYLE, SEEDS = 1, (1, 2, 3)  # of the demo; seed 0 was for choosing it
CONDITION = f"style-{STYLE}"
CLAIM = Claim(
    name="learn_style",
    about=__doc__,
    screen=Plan(tuple(f"style-{i}" for i in range(6)), ("plain",), (0,)),
    confirm=Plan((CONDITION,), tuple(ARMS), SEEDS),
    measures=("style", "stroke", "paper", "line", "leak", "style elsewhere", "shape followed", "colour followed"),
    baseline="plain",
    seconds=70,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Laboratory.open()
    return models_hash(), lambda condition, arm, seed: laboratory.measure(int(condition[-1]), arm, seed)


class Laboratory:
    """Pocket, its painter and its judge."""

    cfg = 4.0

    @classmethod
    def open(cls) -> Laboratory:
        """Inside a ComfyUI of its own, with an empty base directory."""
        prepare(Path(tempfile.mkdtemp(prefix="counterpoint-evidence-")))
        boot()
        return cls(load_pack())

    def __init__(self, pack):
        nodes, world = pack.nodes, pack.training.pocket
        self.nodes, self.world, self.grammar = nodes, world.world, world.grammar
        self.paint = world.painter.paint
        models = nodes.pocket_models
        self.model, self.clip, self.vae, self.judge = (
            models.load_model(),
            models.load_clip(),
            models.load_vae(),
            models.load_judge(),
        )
        self.negatives: dict[tuple[int, int], list] = {}

    def pictures(self, style: int, seed: int) -> tuple[int, list, list[str]]:
        """The one object, training pictures of it in the style, and their captions."""
        factors = dict(zip(self.world.FACTORS, self.world.HELD_OUT[style], strict=True))
        shape = seed % 8
        scenes = self.world.sample_scenes(PICTURES, 500 + seed, shape=shape, **factors)
        images = [i[None].movedim(1, -1) for i in self.paint(scenes).image]
        return shape, images, [self.grammar.content(scenes, i) for i in range(PICTURES)]

    def negatives_of(self, seed: int, captions: list[str]) -> list:
        key = (seed, hash(tuple(captions)))
        if key not in self.negatives:
            prompts = [f"{c} in the style of picture" for c in captions]
            self.negatives[key], _ = self.nodes.generate.generate_set(
                self.model, self.clip, self.vae, prompts, self.recipe(seed), "", "negatives"
            )
        return self.negatives[key]

    def measure(self, style: int, arm: str, seed: int) -> dict:
        shape, images, captions = self.pictures(style, seed)
        clip, word, facts = self.clip, "picture", {}
        if ARMS[arm]:
            learned, records = self.learn(arm, seed, images, captions)
            clip, word = self.nodes.bridge.with_embeddings(self.clip, {"word": learned.vectors}), "embedding:word"
            facts["last losses"] = [round(r["loss"], 4) for r in records[-20:]]
            facts["contrast"] = {
                k: round(statistics.mean(r[k] for r in records), 3)
                for k in ("cosine", "removed", "norm")
                if k in records[0]
            }
        return {"measures": self.look(clip, word, self.world.HELD_OUT[style], shape, seed), **facts}

    def learn(self, arm: str, seed: int, images: list, captions: list[str]):
        train, arm = self.nodes.train_embedding, ARMS[arm]
        negatives = None if arm["method"] == "plain" else self.negatives_of(seed, captions)
        given = {"preview_every": 0, "caption_use": "template", **arm, "seed": seed}
        values = {**self.nodes.training_job.defaults(train.TrainEmbedding), **given}
        job = train.WordJob(self.model, self.clip, self.vae, images, captions, negatives, values)
        return job.run()[:2]

    def recipe(self, seed: int):
        return self.nodes.generate.Recipe("", 128, 128, 10_000 * (seed + 1), 20, self.cfg, "euler", "normal")

    def look(self, clip, word: str, combination, shape: int, seed: int) -> dict[str, float]:
        import torch

        others = torch.tensor([s for s in range(8) if s != shape])
        scenes = self.world.sample_scenes(SAMPLES, 900 + seed, shape=others[torch.arange(SAMPLES) % 7])
        alone = self.judge.see(self.sample(clip, [f"a picture in the style of {word}"] * SAMPLES, seed))
        elsewhere = self.judge.see(
            self.sample(
                clip, [f"{self.grammar.content(scenes, i)} in the style of {word}" for i in range(SAMPLES)], seed
            )
        )

        def style(seen):
            return {f: seen[f] == v for f, v in zip(self.world.FACTORS, combination, strict=True)}

        shares = {
            "style": torch.stack(list(style(alone).values())).all(0), **style(alone), "leak": alone["shape"] == shape,
            "style elsewhere": torch.stack(list(style(elsewhere).values())).all(0),
            "shape followed": elsewhere["shape"] == scenes.shape, "colour followed": elsewhere["colour"] == scenes.colour,
        }  # fmt: skip
        return {k: round(shares[k].float().mean().item(), 4) for k in CLAIM.measures}

    def sample(self, clip, prompts: list[str], seed: int):
        import torch

        encoded = {p: clip.encode_from_tokens_scheduled(clip.tokenize(p)) for p in {*prompts, ""}}
        parts = []
        with torch.inference_mode():
            for start in range(0, len(prompts), 16):
                rows = list(range(start, min(start + 16, len(prompts))))
                latents = self.nodes.generate.sample(
                    self.model, [encoded[prompts[i]] for i in rows], encoded[""], self.recipe(seed), rows
                )
                parts.append(self.vae.decode(latents).movedim(-1, 1).clone())
        return torch.cat(parts)
