"""The study of contrast in a world of 360 pictures (harness/toy.py), where every measure is exact: content in a style's word.

    python dev.py evidence toy_style --screen    every rule, three seeds
    python dev.py evidence toy_style             those that matter, twelve fresh seeds
    python dev.py evidence toy_style --base      train the model of that world again (11 minutes on one thread)

Sixteen pictures of one content in a style that the model never saw teach a word under "thing S*"; negatives are what the
model makes of the same content as a "painting". `leak` is how often "thing S*" shows that content (1 in 6 is chance).

Found: captions that name the content keep it out of the word. No gradient rule does that leaves the style as it is, and
`reference point` costs what the word can do beside other contents; `toy_reference.py` says why. The world was
changed once before these seeds: at first a word that brings a content along overruled a content that is named. A text
encoder of one layer gave the same null (not kept).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harness.boot import boot, load_pack, prepare
from harness.claim import RESULTS, Claim, Plan, command

PICTURES, SAMPLES, STEPS = 16, 60, 1500
CONDITION = "unseen-style"
BASE = RESULTS / "toy_style" / "base.safetensors"


class Arm(NamedTuple):
    """What is different from learning plainly from one content under "thing S*"."""

    method: str = "plain"
    keep_norm: bool = False
    captions: str = "thing"  # or "true"
    contents: str = "one"  # or "all"
    negatives: str = "paired"  # or "random": of any content
    variant: str = ""  # of variants.py
    options: dict = {}  # of the settings


REFERENCE = Arm("reference point", keep_norm=True)
ARMS = {
    "base": None,
    "oracle": Arm(captions="true", contents="all"),
    "plain": Arm(),
    "plain, norm": Arm(keep_norm=True),
    "plain, true captions": Arm(captions="true"),
    "paper": Arm("paper"),
    "reference point": Arm("reference point"),
    "reference point, norm": REFERENCE,
    "reference point, norm, true captions": REFERENCE._replace(captions="true"),
    "reference point, norm, random negatives": REFERENCE._replace(negatives="random"),
    "reference point, norm, strength .5": REFERENCE._replace(options={"strength": 0.5}),
    "reference point, norm, average .99": REFERENCE._replace(options={"average": 0.99}),
    "reference point, norm, low frequencies": REFERENCE._replace(options={"weighting": "low frequencies"}),
    "plain, low frequencies": Arm(options={"weighting": "low frequencies"}),
    "plain, constant rate": Arm(variant="constant"),
    "reference point, norm, constant rate": REFERENCE._replace(variant="constant"),
    "paper, noise apart": Arm("paper", variant="apart"),
    "shipped v4.1": Arm("paper", variant="v4.1"),
    "shipped v4.2": Arm("paper", variant="v4.2"),
    "shipped v5.0": Arm("paper", variant="v5.0"),
    "shipped v5.1": Arm("paper", variant="v5.1"),
    "average, current point": Arm("paper", variant="averaged"),
    "reference point, step projected": Arm("reference point", variant="step projected"),
    "confined, rank 1": Arm("reference point", variant="rank 1"),
    "confined, rank 4": Arm("reference point", variant="rank 4"),
    "bootstrapped": Arm(variant="bootstrapped"),
}
CLAIM = Claim(
    name="toy_style",
    about=__doc__,
    screen=Plan((CONDITION,), tuple(ARMS), (0, 1, 2)),
    confirm=Plan(
        (CONDITION,),
        ("base", "plain", "paper", "reference point, norm", "plain, true captions", "oracle"),
        tuple(range(6, 18)),
    ),
    measures=("leak", "style", "content followed", "all three", "held-out loss"),
    baseline="plain",
    seconds=10,
    digits=3,
)

README = ("leak", "style", "content followed", "held-out loss")


def main(argv: list[str]) -> int:
    if argv == ["--base"]:
        return make_base()
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    load()
    laboratory = Laboratory()
    return models(), lambda _, arm, seed: laboratory.measure(arm, seed)


def models() -> str:
    """12 hex digits of the toy's weights."""
    return hashlib.sha256(BASE.read_bytes()).hexdigest()[:12]


def load() -> None:
    """The pack, inside a ComfyUI with an empty base directory; and one thread, which is fastest for nets so small."""
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-evidence-")))
    boot()
    load_pack()
    import torch

    torch.set_num_threads(1)


def make_base() -> int:
    load()
    import torch
    from counterpoint.training import artefact

    from harness.toy import train_base

    started = time.monotonic()
    toy, seconds = train_base(), time.monotonic() - started
    artefact.write(BASE, {k: v.to(torch.float16) for k, v in toy.state_dict().items()})
    card = {"seconds": round(seconds), "parameters": sum(p.numel() for p in toy.parameters()), **Laboratory().card()}
    BASE.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(card)
    return 0


class Laboratory:
    """The trained toy, and its exact measures."""

    def __init__(self):
        from counterpoint.training import artefact

        from harness import toy

        self.world, self.toy = toy, toy.Toy()
        self.toy.load_state_dict({k: v.float() for k, v in artefact.read(BASE)[0].items()})
        self.toy.eval().requires_grad_(False)
        self.start = self.toy.text.words.weight[toy.NUMBER["painting"]][None].clone()

    def content(self, seed: int) -> str:
        return self.world.CONTENTS[seed % len(self.world.CONTENTS)]

    def measure(self, arm: str, seed: int, steps: int = STEPS) -> dict:
        vector, facts = self.start, {}
        if ARMS[arm]:
            vector, facts = self.learn(ARMS[arm], self.content(seed), seed, steps)
        return {"measures": self.look(vector, self.content(seed), seed), **facts}

    def learn(self, arm: Arm, content: str, seed: int, steps: int):
        from counterpoint.training.loop import train

        trainer = self.prepare(arm, content, seed, steps)
        said = [progress.scalars for progress in train(trainer, None, steps)]
        means = {k: sum(s[k] for s in said) / len(said) for k in ("cosine", "removed") if k in said[0]}
        return trainer.vectors["word"].detach(), {"contrast": {k: round(v, 3) for k, v in means.items()}}

    def prepare(self, arm: Arm, content: str, seed: int, steps: int, start=None):
        """The trainer of this arm; it starts at "painting", else at a vector (1, width)."""
        from counterpoint.training.textual_inversion import Settings

        pictures, contents = self.pictures(arm, content, seed)
        captions = [[f"{c if arm.captions == 'true' else 'thing'} {{token}}"] for c in contents]
        negatives = None if arm.method == "plain" else self.negatives(arm, contents, seed)
        given = {"weighting": "uniform", **arm.options, "method": arm.method, "keep_norm": arm.keep_norm}
        settings = Settings(steps=steps, batch=4, learning_rate=5e-3, seed=seed, **given)
        start = {"word": self.start if start is None else start}
        return self.trainer(arm.variant, seed)(self.toy, self.toy, pictures, captions, start, settings, negatives)

    def trainer(self, variant: str, seed: int):
        from counterpoint.training.textual_inversion import TextualInversion

        from evidence import variants

        return {
            "": TextualInversion,
            "apart": variants.Apart,
            "averaged": variants.Averaged,
            "constant": variants.Constant,
            "step projected": variants.StepProjected,
            "rank 1": partial(variants.Confined, rank=1),
            "rank 4": partial(variants.Confined, rank=4),
            "bootstrapped": partial(variants.Bootstrapped, paint=partial(self.paint_all, seed)),
            **{version: partial(variants.Shipped, version=version) for version in variants.SHIPPED},
        }[variant]

    def pictures(self, arm: Arm, content: str, seed: int):
        """(16, 3, 8, 8) renders in the unseen style on drawn canvases, and the content of each."""
        import torch

        generator = torch.Generator().manual_seed(1_000 + seed)
        canvases = torch.randint(len(self.world.CANVASES), (PICTURES,), generator=generator).tolist()
        contents = self.world.CONTENTS if arm.contents == "all" else (content,)
        contents = [contents[i % len(contents)] for i in range(PICTURES)]
        scenes = [self.world.Scene(c, self.world.UNSEEN, v) for c, v in zip(contents, canvases, strict=True)]
        return self.world.renders(scenes), contents

    def negatives(self, arm: Arm, contents: list[str], seed: int):
        import torch

        generator = torch.Generator().manual_seed(2_000 + seed)
        if arm.negatives == "random":
            drawn = torch.randint(len(self.world.CONTENTS), (len(contents),), generator=generator)
            contents = [self.world.CONTENTS[i] for i in drawn]
        return self.toy.sample([f"{c} painting" for c in contents], generator)

    def paint_all(self, seed: int, vectors: dict):
        """As many pictures of each content as there are of the one, as the word paints them, and captions without it."""
        import torch

        contents = [
            c for c in self.world.CONTENTS if c != self.world.CONTENTS[seed % len(self.world.CONTENTS)]
        ] * PICTURES
        generator = torch.Generator().manual_seed(3_000 + seed)
        pictures = self.toy.sample([f"{c} {{token}}" for c in contents], generator, vectors["word"])
        return pictures, [["thing {token}"]] * len(contents)

    def look(self, vector, content: str, seed: int) -> dict[str, float]:
        import torch

        others = [c for c in self.world.CONTENTS if c != content]
        asked = [others[i % len(others)] for i in range(SAMPLES)]
        captions = ["thing {token}"] * SAMPLES + [f"{c} {{token}}" for c in asked]
        seen = self.world.nearest(self.toy.sample(captions, torch.Generator().manual_seed(4_000 + seed), vector))
        free, told = seen[:SAMPLES], list(zip(seen[SAMPLES:], asked, strict=True))
        shares = {
            "leak": [s.content == content for s in free],
            "style": [s.style == self.world.UNSEEN for s in free],
            "content followed": [s.content == c for s, c in told],
            "all three": [s.content == c and s.style == self.world.UNSEEN for s, c in told],
        }
        length = (vector.norm() / self.start.norm()).item()
        return {
            **{k: round(sum(v) / len(v), 4) for k, v in shares.items()},
            "held-out loss": round(self.held_out_loss(vector, others), 5),
            "norm": round(length, 4),
        }

    def held_out_loss(self, vector, contents: list[str]) -> float:
        """Mean squared error of eps on renders of these contents in the unseen style, 8 fixed noises at 10 fixed levels."""
        import torch

        world, toy = self.world, self.toy
        scenes = [world.Scene(c, world.UNSEEN, v) for c in contents for v in range(len(world.CANVASES))]
        noise = torch.randn(8, 1, 3, 8, 8, generator=torch.Generator().manual_seed(5_000))
        noise = noise.expand(8, len(scenes), 3, 8, 8).flatten(0, 1)
        pictures, captions = world.renders(scenes * 8), [f"{s.content} {{token}}" for s in scenes * 8]
        with torch.no_grad():
            cond = toy.encode(captions, [{"word": vector}] * len(captions))
            errors = [
                toy.error(pictures, noise, toy.sigma[level].expand(len(noise)), cond)
                for level in range(10, world.LEVELS, 20)
            ]
        return torch.stack(errors).square().mean().item()

    def card(self, each: int = 4) -> dict[str, float]:
        """How often the model paints what words that it knows ask for."""
        import torch

        world = self.world
        styles = [(f"{c} {w}", c, s) for w, s in world.STYLE_WORDS.items() for c in world.CONTENTS[:each]]
        compounds = [(f"thing {w}", c, s) for w, (c, s) in world.COMPOUNDS.items()] * each
        spelled = [(f"{c} {s[0]} {s[1]}", c, s) for s in world.SEEN for c in world.CONTENTS[:each]]
        found = {}
        for name, asked in {"a style's word": styles, "a compound": compounds, "texture and palette": spelled}.items():
            seen = world.nearest(self.toy.sample([a[0] for a in asked], torch.Generator().manual_seed(6_000)))
            right = [(s.content, s.style) == a[1:] for s, a in zip(seen, asked, strict=True)]
            found[f"content and style by {name}"] = round(sum(right) / len(right), 3)
        seen = world.nearest(self.toy.sample(["thing painting"] * 240, torch.Generator().manual_seed(6_001)))
        found["commonest content of a thing, painting"] = round(max(Counter(s.content for s in seen).values()) / 240, 3)
        found["of the unseen style among those"] = round(sum(s.style == world.UNSEEN for s in seen) / 240, 3)
        seen = world.nearest(
            self.toy.sample([f"{c} painting" for c in world.CONTENTS] * 40, torch.Generator().manual_seed(6_002))
        )
        right = [s.content == c for s, c in zip(seen, world.CONTENTS * 40, strict=True)]
        found["content of a content, painting"] = round(sum(right) / 240, 3)
        return found
