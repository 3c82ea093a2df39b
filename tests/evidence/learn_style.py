"""Claim of `01 learn a style`: a style is learned from pictures that all show one object, and the object is not.

    python dev.py evidence learn_style --screen            plain inversion on the six held-out styles, one seed
    python dev.py evidence learn_style                     every arm on the demo's style, three fresh seeds (20 minutes)

Found: contrast, as published and with a fixed reference, keeps nothing out of the word here, with or without its length
held; captions do. `why_no_contrast.py` says why. Every run is a JSON file in tests/evidence/results/learn_style and is not repeated. About 2 minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness.boot import boot, load_pack, prepare

RESULTS = Path(__file__).parent / "results" / "learn_style"
PICTURES = 16
SAMPLES = 64
ARMS = {
    "base": None,
    "plain": {"method": "plain", "strength": 1.0},
    "paper": {"method": "paper", "strength": 1.0},
    "reference point": {"method": "reference point", "strength": 1.0},
    "plain, captions": {"method": "plain", "strength": 1.0, "caption_use": "caption"},
    "plain, norm kept": {"method": "plain", "strength": 1.0, "keep_norm": True},
    "reference point, norm kept": {"method": "reference point", "strength": 1.0, "keep_norm": True},
}
STYLE, SEEDS = 1, (1, 2, 3)  # of the demo; seed 0 was for choosing it
README = ("style", "leak", "style elsewhere", "shape followed")
MEASURES = ("style", "stroke", "paper", "line", "leak", "style elsewhere", "shape followed", "colour followed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py evidence learn_style", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--screen", action="store_true", help="only plain, on all six styles")
    parser.add_argument("--style", type=int, default=STYLE, help="which held-out style, 0 to 5")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args(argv)
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-evidence-")))
    boot()
    world = Laboratory(load_pack())
    plan = [(s, arm, seed) for s in ([*range(6)] if options.screen else [options.style])
            for seed in ([0] if options.screen else options.seeds) for arm in (["plain"] if options.screen else options.arms)]  # fmt: skip
    for style, arm, seed in plan:
        file = RESULTS / f"style-{style}" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        if not file.exists():
            started = time.monotonic()
            measured = world.measure(style, arm, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = {"style": style, "arm": arm, "seed": seed, "seconds": round(time.monotonic() - started), **measured}
            file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(style, arm, seed, json.loads(file.read_text(encoding="utf-8"))["measures"], flush=True)
    for style in sorted({s for s, _, _ in plan}):
        print(f"held-out style {style}", table(style), sep="\n")
    return 0


def table(style: int, measures: tuple[str, ...] = MEASURES, seeds: tuple[int, ...] = ()) -> str:
    """Means over seeds (all there are, or those), with the paired differences to plain and their 95 % intervals."""
    from counterpoint.training.intervals import bootstrap

    runs: dict[str, dict[int, dict]] = {}
    for file in sorted((RESULTS / f"style-{style}").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if not seeds or record["seed"] in seeds:
            runs.setdefault(record["arm"], {})[record["seed"]] = record["measures"]
    lines = [
        "| | seeds | " + " | ".join(measures) + " |",
        "|---" * (len(measures) + 2) + "|",
    ]
    for arm in [a for a in ARMS if a in runs]:
        cells = [f"{statistics.mean(m[k] for m in runs[arm].values()):.2f}" for k in measures]
        lines.append(f"| {arm} | {len(runs[arm])} | " + " | ".join(cells) + " |")
    for arm in [a for a in ARMS if a in runs and a not in ("base", "plain") and "plain" in runs]:
        shared = sorted(runs[arm].keys() & runs["plain"].keys())
        if len(shared) > 1:
            differences = {k: [runs[arm][s][k] - runs["plain"][s][k] for s in shared] for k in measures}
            cells = [
                "{:+.2f} ({:+.2f} to {:+.2f})".format(statistics.mean(d), *bootstrap(d)) for d in differences.values()
            ]
            lines.append(f"| {arm} - plain | {len(shared)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Laboratory:
    """Pocket, its painter and its judge."""

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
        values = {**train.defaults(), **given}
        learned, records, _ = train.Job(self.model, self.clip, self.vae, images, captions, negatives, values).run()
        return learned, records

    def recipe(self, seed: int):
        return self.nodes.generate.Recipe("", 128, 128, 10_000 * (seed + 1), 20, 4.0, "euler", "normal")

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
        return {k: round(shares[k].float().mean().item(), 4) for k in MEASURES}

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
