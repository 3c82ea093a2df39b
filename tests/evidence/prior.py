"""Claim: what a prior gains by where it begins is how wide the start is, not where its middle lies.

    python dev.py evidence prior --screen       learning rates, lengths and the candidates for `recommended`, one seed
    python dev.py evidence prior                every arm, three fresh seeds

A caption says what is in a picture of Pocket's world, and nothing of style, view or light. 6000 captioned pictures are learned from. For
each of 96 captions that are not among them 16 true pictures are painted, so the true distribution of embeddings given the text is
known, and 8 embeddings are made. All arms of a seed have the same network, data, order of data, noise and optimiser. Embeddings are
Pocket's divided by 6.2, so that their root mean square is 0.44, which is about CLIP's: as they are, N(0, I) would be narrower than they.

none               begins at N(0, I)
shift only         at the mean of all embeddings, as wide as N(0, I)
scale only         at zero, as wide as the embeddings
whitened           both
clusters           64 k-means clusters of the captions; x5: five times as wide
ridge              at a mean computed from the text, as wide as what that leaves
flow, linear, P2   with that schedule instead of cosine, that weight instead of uniform
unnormed           the network meets embeddings and answers with them as they are. Elsewhere both are brought to mean 0 and variance 1, and
                   a mean falls out: "shift only" has the network of "none" there, "scale only" that of "whitened"
paper              as published: clusters of the pictures, chosen by cosine, x5, linear, P2, unnormed. The network is not told the cluster,
                   which is a function of the text, by a token of its own
none, as paper     the same from N(0, I), which is what the paper compares itself with
paper's sampler    the network of "paper", sampled with fresh noise of variance beta on levels that end at 0
released code      the same as the published script does it: no noise at all, and each step at the cluster nearest to what was predicted
regressor          one evaluation of the network of "whitened", from the mean
last layer as fast its learning rate is that of all others, where elsewhere it is 5 times as much
real               8 other true pictures: what a perfect prior would reach

All figures are of 8 steps of DDIM unless an arm has a sampler of its own; `training/prior/measures.py` says what they are. Printed below
them is what a perfect network would keep of the variance within a text, where embeddings are Gaussian, and what training would reward
it for: how much smaller its weighted loss is than that of a network which does not look at the noisy embedding at all.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from harness.boot import DEV, boot, load_pack, prepare
from harness.claim import Claim, Plan, command, models_hash, read

TOWERS = "pocket-text", "pocket-vision"
PAIRS, CAPTIONS, REAL, MADE = 6000, 96, 16, 8
CONDITION = "content"
SMALLER = 6.2  # times Pocket's embeddings
GRID = (1, 2, 4, 8, 16, 64)
STEPS, BATCH, RATE = 400, 32, 0.004  # of a training; 4 noises for each caption
LOOKS = {"ddim": GRID, "dpm++ 2m": (4, 8, 16)}


class Arm(NamedTuple):
    """What is different from the default."""

    start: str = "whitened"
    scale: float = 1.0
    schedule: str = "cosine"
    weight: str = "uniform"
    normed: bool = True  # what the network meets and answers
    smaller: float = SMALLER
    steps: int = STEPS
    rate: float = RATE
    last: float = 5.0  # times the rate, of the last layer
    sampler: str = ""  # of its own


PAPER = Arm("clusters as published", 5.0, "linear", "P2", normed=False)
CONFIRMED = {
    "real": None,
    "none": Arm("none"),
    "shift only": Arm("shift only"),
    "scale only": Arm("scale only"),
    "whitened": Arm(),
    "clusters": Arm("clusters"),
    "clusters x5": Arm("clusters", 5.0),
    "ridge": Arm("ridge"),
    "whitened, flow": Arm(schedule="flow"),
    "whitened, linear, P2": Arm(schedule="linear", weight="P2"),
    "none, unnormed": Arm("none", normed=False),
    "shift only, unnormed": Arm("shift only", normed=False),
    "scale only, unnormed": Arm("scale only", normed=False),
    "whitened, unnormed": Arm(normed=False),
    "none, as paper": PAPER._replace(start="none", scale=1.0),
    "paper": PAPER,
    "paper's sampler": PAPER._replace(sampler="fixed large"),
    "released code": PAPER._replace(sampler="released"),
    "regressor": Arm(sampler="regressor"),
    "last layer as fast": Arm(last=1.0),
}
SCREENED = {
    "rate .001": Arm(rate=0.001),
    "rate .002": Arm(rate=0.002),
    "rate .004": Arm(rate=0.004),
    "rate .008": Arm(rate=0.008),
    "paper, rate .001": PAPER._replace(rate=0.001),
    "paper, rate .004": PAPER._replace(rate=0.004),
    "ridge": Arm("ridge"),
    "whitened, flow": Arm(schedule="flow"),
    "ridge, flow": Arm("ridge", schedule="flow"),
    "four times as long": Arm(steps=4 * STEPS),
    "four times as long, last layer as fast": Arm(steps=4 * STEPS, last=1.0),
    "paper, four times as long": PAPER._replace(steps=4 * STEPS),
    "linear, P2, four times as long": Arm(schedule="linear", weight="P2", steps=4 * STEPS),
    "Pocket's own size": Arm("none", smaller=1.0),
}
# A mean falls out of what a normed network is shown, so these have one network.
ONE_NETWORK = {"shift only": "none", "scale only": "whitened"}
ARMS = CONFIRMED | SCREENED
CLAIM = Claim(
    name="prior",
    about=__doc__,
    screen=Plan((CONDITION,), tuple(SCREENED), (0,)),
    confirm=Plan((CONDITION,), tuple(CONFIRMED), (1, 2, 3)),
    measures=("frechet", "energy per text", "diversity", "centred cosine", "rank", "norm", "cosine"),
    baseline="whitened",
    seconds=60,
    digits=3,
)
UNEXPLAINED = 0.43  # share of the variance of embeddings within a text: 1 - centred cosine of "real"
LAST_CHOSEN_BEFORE = (
    4,
    5,
    6,
)  # that the last layer learns 5 times as fast was decided after the confirming seeds were seen; these were not
BESIDE = ("diversity", "norm", "centred cosine", "cosine")


def main(argv: list[str]) -> int:
    done = command(CLAIM, argv, open_laboratory)
    print(by_steps(CLAIM.confirm.seeds if "--screen" not in argv else CLAIM.screen.seeds))
    print(perfect())
    return done


def open_laboratory():
    prepare(Path(tempfile.mkdtemp(prefix="counterpoint-evidence-")))
    boot()
    laboratory = Laboratory(load_pack())
    return models_hash(*TOWERS), lambda _, arm, seed: laboratory.record(ARMS[arm], seed)


def by_steps(seeds: tuple[int, ...]) -> str:
    """Of each arm the Frechet distance by sampler and number of steps, and other figures of 8 steps, in Markdown."""
    found: dict[str, list[dict]] = {}
    for record in read(CLAIM, CONDITION):
        if record["seed"] in seeds:
            found.setdefault(record["arm"], []).append(record)
    columns = [("own", n) for n in GRID] + [("dpm++ 2m", n) for n in LOOKS["dpm++ 2m"]]
    names = [f"{n}" if sampler == "own" else f"{n} DPM++" for sampler, n in columns]
    lines = [
        "| frechet after steps | " + " | ".join([*names, *BESIDE]) + " |",
        "|---" * (len(columns) + len(BESIDE) + 1) + "|",
    ]
    for arm in (a for a in ARMS if a in found):
        looks = [[run.get("by steps", {}).get(s, {}).get(str(n), {}) for run in found[arm]] for s, n in columns]
        cells = [[look["frechet"] for look in runs if look] for runs in looks]
        cells += [[run["measures"][name] for run in found[arm]] for name in BESIDE]
        lines.append(f"| {arm} | " + " | ".join(f"{statistics.mean(c):.3f}" if c else "" for c in cells) + " |")
    return "\n".join(lines)


def perfect() -> str:
    """What the best possible network would do, in Markdown: of the way we begin and of the published one."""
    ways = {
        "cosine, uniform": ("cosine", "uniform", 1.0),
        "flow, uniform": ("flow", "uniform", 1.0),
        "linear, P2": ("linear", "P2", 1.0),
    }
    ways |= {"cosine, uniform, x5": ("cosine", "uniform", 5.0), "paper: linear, P2, x5": ("linear", "P2", 5.0)}
    columns = [(s, n) for s in LOOKS for n in (4, 8, 64)]
    lines = [
        "| a perfect network | loss it saves by looking | " + " | ".join(f"kept, {n} of {s}" for s, n in columns) + " |"
    ]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, (schedule, weight, scale) in ways.items():
        cells = [saved(schedule, weight, scale), *(kept(schedule, scale, s, n) for s, n in columns)]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def saved(schedule: str, weight: str, scale: float) -> float:
    """Share of the weighted loss of a network that knows the text alone, in units where embeddings of a text have the variance
    UNEXPLAINED and the start `scale` squared."""
    from counterpoint.training.prior import process

    table = process.schedule(schedule)
    weights = process.WEIGHTS[weight](process.Level(table.signal, table.noise, table.slope))
    snr = (table.signal / (scale * table.noise)) ** 2
    return 1 - ((weights / (1 + UNEXPLAINED * snr)).sum() / weights.sum()).item()


def kept(schedule: str, scale: float, sampler: str, steps: int) -> float:
    """Share of the variance within a text. A perfect network is linear there, so what comes out is the draw times a number: of a draw
    of 1, the number."""
    import torch
    from counterpoint.training.prior import process
    from counterpoint.training.prior.samplers import sample

    table, begin = process.schedule(schedule), torch.full((1, 1), scale, dtype=torch.float64)

    def predict(z, t: int):
        a, s, _ = table.level(t)
        return UNEXPLAINED * a / (UNEXPLAINED * a**2 + (scale * s) ** 2) * z

    start = process.Start(torch.zeros_like(begin), begin)
    noise = itertools.repeat(torch.ones_like(begin))
    *_, made = sample(predict, start, table, process.levels(steps), noise, sampler)
    return made.item() ** 2 / UNEXPLAINED


class Laboratory:
    """Pocket's painter and its two towers; what they see is measured once and kept in .dev/, and so is each network."""

    def __init__(self, pack):
        import torch

        torch.set_num_threads(1)  # the same numbers on every machine, and the fastest for networks so small
        self.pack, self.world = pack, pack.training.pocket
        self.folder = DEV / "evidence" / "prior"
        with torch.inference_mode():
            self.pairs, self.test = self.seen()

    def seen(self):
        """Pairs to learn from, and of each caption held out REAL + MADE pictures, one caption's after the other's."""
        from counterpoint.training.prior.pairs import measured

        models, see = self.pack.nodes.pocket_models, self.pack.nodes.prior.pairs.encoders_of
        encoders = see(models.load_clip(), models.load_vision())
        held, scenes = self.scenes()
        parts = {"learned": (scenes, 500), "held out": (held, 16 * (REAL + MADE))}
        return tuple(
            measured(
                [(f"{CLAIM.name} {name} {i}", partial(self.painted, s[i : i + n])) for i in range(0, len(s), n)],
                encoders, self.folder / "pairs",
            )
            for name, (s, n) in parts.items()
        )  # fmt: skip

    def scenes(self):
        """Those held out, and others that no caption of theirs describes."""
        import torch

        world = self.world.world
        said = ("colour", "pattern", "shape", "background")
        sizes = [len(world.ATTRIBUTES[k]) for k in said]
        total = torch.tensor(sizes).prod().item()
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:CAPTIONS]
        fixed = torch.unravel_index(chosen.repeat_interleave(REAL + MADE), sizes)
        held = world.sample_scenes(CAPTIONS * (REAL + MADE), 1, **dict(zip(said, fixed, strict=True)))
        scenes = world.sample_scenes(PAIRS + PAIRS // 4, 2)
        number = torch.zeros(len(scenes), dtype=torch.long)
        for name, size in zip(said, sizes, strict=True):
            number = number * size + getattr(scenes, name)
        return held, scenes[(~torch.isin(number, chosen)).nonzero().flatten()[:PAIRS]]

    def painted(self, scenes) -> Iterator:
        for i in range(0, len(scenes), 50):
            some = scenes[i : i + 50]
            pictures = self.world.painter.paint(some).image.movedim(1, -1)
            yield from ((p[None], self.world.grammar.content(some, j)) for j, p in enumerate(pictures))

    def record(self, arm: Arm | None, seed: int) -> dict:
        import torch
        from counterpoint.training.prior.measures import figures

        started, smaller = time.process_time(), arm.smaller if arm else SMALLER
        shown = (self.test.images / smaller).view(CAPTIONS, REAL + MADE, -1)
        order = torch.randperm(REAL + MADE, generator=torch.Generator().manual_seed(seed))
        real, other = shown[:, order[:REAL]], shown[:, order[REAL:]]

        def judged(made) -> dict[str, float]:
            return {k: round(v, 4) for k, v in figures(made, real, self.pairs.images / smaller).items()}

        if arm is None:
            return {"measures": judged(other)}
        prior, facts = self.prior(arm, seed)
        looks = {"own": GRID} if arm.sampler else {"own": LOOKS["ddim"], "dpm++ 2m": LOOKS["dpm++ 2m"]}
        looks = {"own": (1,)} if arm.sampler == "regressor" else looks
        with torch.no_grad():
            drawn = {
                name: {n: judged(self.drawn(arm, prior, seed, n, name)) for n in steps} for name, steps in looks.items()
            }
        own = drawn["own"]
        facts |= {"cpu seconds": round(time.process_time() - started, 1)}
        return {"measures": own.get(8, own[1]), "by steps": drawn, **facts}

    @cache  # noqa: B019
    def start(self, kind: str, scale: float, smaller: float, seed: int):
        """ "shift only" and "scale only" are one cluster each."""
        import torch
        from counterpoint.training.prior.starts import StartDistribution, fit

        text, image = self.pairs.pooled, self.pairs.images / smaller
        if not kind.endswith("only"):
            return fit(kind, text, image, generator=torch.Generator().manual_seed(seed), scale=scale)
        norm = fit("whitened", text, image).tensors
        mean, std = norm["norm.mean"][None], norm["norm.std"][None]
        one = {"shift only": (mean, torch.ones_like(std)), "scale only": (torch.zeros_like(mean), std)}[kind]
        return StartDistribution(
            "clusters as published", {**norm, **dict(zip(("start.mean", "start.std"), one, strict=True))}
        )

    def prior(self, arm: Arm, seed: int):
        """And what its training said."""
        network = ONE_NETWORK.get(arm.start, arm.start) if arm.normed else arm.start
        prior = self.trained(arm._replace(sampler="", start=network), seed)
        return replace(prior, start=self.start(arm.start, arm.scale, arm.smaller, seed)), dict(prior.facts)

    def trained(self, arm: Arm, seed: int):
        import torch
        from counterpoint.training import artefact
        from counterpoint.training.loop import train
        from counterpoint.training.prior.network import Shape, drawn
        from counterpoint.training.prior.prior import load, to_bytes
        from counterpoint.training.prior.trainer import PriorTrainer, Settings

        key = hashlib.sha256(f"{arm} {seed} {models_hash(*TOWERS)} {PAIRS} {BATCH}".encode()).hexdigest()[:16]
        file = self.folder / "networks" / f"{key}{artefact.SUFFIX}"
        if not file.exists():
            pairs, started = copy.copy(self.pairs), time.process_time()
            pairs.images = pairs.images / arm.smaller
            settings = Settings(
                arm.schedule, arm.weight, steps=arm.steps, batch=BATCH, learning_rate=arm.rate, last=arm.last, seed=seed
            )
            network = drawn(Shape(128, 128, 128, 128, 4, 4, 77), torch.Generator().manual_seed(seed))
            trainer = PriorTrainer(pairs, network, self.start(arm.start, arm.scale, arm.smaller, seed), settings)
            trainer.units = units(trainer.prior, arm)
            losses = [progress.scalars["loss"] for progress in train(trainer, None, arm.steps)]
            prior = trainer.finished()
            prior.facts = {
                "training": round(time.process_time() - started, 1), "last losses": round(statistics.mean(losses[-100:]), 4)
            }  # fmt: skip
            artefact.write_whole(file, to_bytes(prior))
        return load(file)

    def drawn(self, arm: Arm, prior, seed: int, steps: int, sampler: str):
        """(CAPTIONS, MADE, d)."""
        import torch
        from counterpoint.training.prior.process import Start, levels, schedule
        from counterpoint.training.prior.samplers import sample

        texts = self.test.texts(list(range(0, len(self.test), REAL + MADE)))
        begin, table, meets = prior.start.start(texts.pooled), schedule(prior.schedule), units(prior, arm)
        begin = Start(*(x.expand(CAPTIONS, -1).repeat_interleave(MADE, 0) for x in begin))
        prefix = prior.network.read(texts.states, texts.pooled, texts.mask)

        def predict(z, t: int):
            return meets.x0(prior.network(meets.shown(z, table.level(t), begin), t, prefix))

        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(begin.mean.shape, generator=generator) for _ in itertools.count())
        if arm.sampler == "regressor":
            made = predict(begin.mean, 999)
        elif arm.sampler:
            *_, made = as_published(arm.sampler, prior.start, predict, begin, table, steps, noise)
        else:
            how = "ddim" if sampler == "own" else sampler
            *_, made = sample(predict, begin, table, levels(steps), noise, how)
        return made.view(CAPTIONS, MADE, -1)


class AsTheyAre:
    """Norm's place where a network meets and answers embeddings as they are."""

    def shown(self, z, level, start):
        return z

    def whitened(self, x0):
        return x0

    def x0(self, said):
        return said


def units(prior, arm: Arm):
    return prior.start.norm if arm.normed else AsTheyAre()


def as_published(sampler: str, distribution, predict, begin, table, steps: int, noise):
    """Ancestral steps with the larger variance, beta, on levels that end at 0; one step is level 0 alone. As released, the deviations are
    zero (they are not loaded), and the posterior's mean is of the cluster that is nearest to the prediction."""
    from counterpoint.training.prior.process import Start, posterior, transition
    from counterpoint.training.prior.samplers import sample

    grid = [round(999 * i / (steps - 1)) for i in reversed(range(steps))] if steps > 1 else [0]

    def fixed_large(now):
        mean, _ = posterior(now.z, now.x0, now.here, now.there, now.start)
        return mean + transition(now.here, now.there)[1] ** 0.5 * now.start.scale * next(now.noise)

    def released(now):
        return fixed_large(now._replace(start=Start(distribution.start(now.x0).mean, now.start.scale)))

    if sampler == "fixed large":
        return sample(predict, begin, table, grid, noise, fixed_large)
    return sample(predict, begin._replace(scale=0 * begin.scale), table, grid, noise, released)
