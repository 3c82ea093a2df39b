"""Claim: what do negatives do for a learned word? Every method of `Train Embedding`, what NSYNC's published code computes,
and what else was thought of, from 16 pictures that all show one object.

    python dev.py evidence nsync --screen                       every method, the demo's style, three seeds
    python dev.py evidence nsync                                four methods, three other styles, five fresh seeds
    python dev.py evidence nsync --conditions style-1-clean style-1-captions --arms base plain paper

Conditions: `style-N` has one object and the template as caption; `-captions` has complete captions; `-clean` has all eight objects.
Each training is 200 steps of 8 pictures, whatever the method: equal pictures seen, equal rate, equal noise by seed.

leak               share of "a picture in the style of S*" that shows the training pictures' object (chance .125)
style              share of the same whose stroke, paper and line are all right
style elsewhere    the same of prompts that name another object
shape followed     share of those that show the object named
loss               denoising error on pictures of other objects in the style, with their captions and the word, on a fixed grid of
                   16 pictures x 8 noise levels
KID, CMMD          between those pictures painted and real ones of the same prompts (64 each, Pocket's features); CMMD x 1000

Found: no method keeps the object out of the word alone. `paper` carries the style to other objects more often than plain, follows
these more often, and its pictures are nearer to real ones; `reference point` cannot be told from plain; bootstrapping loses the style.
With complete captions nothing is left for negatives to do; with clean pictures under one sentence `paper` carries a little further.
"""

from __future__ import annotations

import functools
import operator
import statistics
from concurrent.futures import ThreadPoolExecutor

from evidence.learn_style import PICTURES, SAMPLES, Laboratory
from harness.claim import Claim, Plan, command, models_hash

TEMPLATE = "a picture in the style of {token}"
SHIPPED = ("v4.1", "v4.2", "v5.0", "v5.1")
ARMS = {  # values of the node, and a rule from `variants.py` with its arguments
    "base": None,
    "plain": ({"method": "plain"}, None),
    "plain, norm kept": ({"method": "plain", "keep_norm": True}, None),
    "paper": ({"method": "paper"}, None),
    "paper, noise apart": ({"method": "paper"}, ("Apart", {})),
    **{f"released code {v}": ({"method": "paper"}, ("Shipped", {"version": v})) for v in SHIPPED},
    "paper, averaged": ({"method": "paper"}, ("Averaged", {})),
    "reference point": ({"method": "reference point"}, None),
    "reference point, half": ({"method": "reference point", "strength": 0.5}, None),
    "reference point, norm kept": ({"method": "reference point", "keep_norm": True}, None),
    "reference point, of the step": ({"method": "reference point"}, ("StepProjected", {})),
    "confined, rank 1": ({"method": "reference point"}, ("Confined", {"rank": 1})),
    "confined, rank 4": ({"method": "reference point"}, ("Confined", {"rank": 4})),
    "bootstrapped": ({"method": "plain"}, ("Bootstrapped", {})),
}
# The methods of the node, and what the screen favours.
CONFIRMED = ("base", "plain", "paper", "reference point", "bootstrapped")
MORE = ("style-1-captions", "style-1-clean")  # what they say of the object as captions; pictures of all objects
README = ("leak", "style", "style elsewhere", "shape followed", "KID", "CMMD")
CLAIM = Claim(
    name="nsync",
    about=__doc__,
    screen=Plan(("style-1",), tuple(ARMS), (0, 1, 2)),
    confirm=Plan(("style-0", "style-3", "style-5"), CONFIRMED, (11, 12, 13, 14, 15)),
    measures=("leak", "style", "style elsewhere", "shape followed", "loss", "KID", "CMMD"),
    baseline="plain",
    seconds=80,
    budget=5 * 3600.0,
    digits=3,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Styles.open()
    return models_hash(), laboratory.record


class Styles(Laboratory):
    """One style, many ways to learn it."""

    def record(self, condition: str, arm: str, seed: int) -> dict:
        style, kind = int(condition.split("-")[1]), condition.partition(f"{condition[:7]}-")[2]
        shape, images, captions = self.pictures(style, seed) if kind != "clean" else self.all_objects(style, seed)
        clip, word, facts = self.clip, "picture", {}
        if ARMS[arm]:
            done = self.train(condition, arm, seed, images, captions, "caption" if kind == "captions" else "template")
            clip, word = self.nodes.bridge.with_embeddings(self.clip, {"word": done.learned.vectors}), "embedding:word"
            told = ("cosine", "removed", "norm", "usual", "signal", "skipped")
            means = {k: [r[k] for r in done.records if k in r] for k in told}
            facts = {"told": {k: round(statistics.mean(v), 3) for k, v in means.items() if v}}
        return {"measures": self.look_closely(clip, word, style, shape, seed), **facts}

    def all_objects(self, style: int, seed: int) -> tuple[int, list, list[str]]:
        factors = dict(zip(self.world.FACTORS, self.world.HELD_OUT[style], strict=True))
        scenes = self.world.sample_scenes(PICTURES, 500 + seed, **factors)
        images = [i[None].movedim(1, -1) for i in self.paint(scenes).image]
        return seed % 8, images, [self.grammar.content(scenes, i) for i in range(PICTURES)]

    def train(self, condition: str, arm: str, seed: int, images: list, captions: list[str], use: str):
        from evidence import variants

        given, rule = ARMS[arm]
        negatives = None if given["method"] == "plain" else self.negatives_of(seed, captions)
        train, defaults = self.nodes.train_embedding, self.nodes.training_job.defaults
        name = f"{condition} {arm} {seed}".replace(", ", "-").replace(" ", "-")
        fixed = {
            "preview_every": 0,
            "snapshot_every": 0,
            "caption_use": use,
            "template": TEMPLATE,
            "run": name,
            "seed": seed,
        }
        values = {**defaults(train.TrainEmbedding), **fixed, **given}
        job = train.WordJob(self.model, self.clip, self.vae, images, captions, negatives, values)
        if rule:
            kind, arguments = rule
            also = (
                {"paint": functools.partial(elsewhere, self.others_with_the_word, seed)}
                if kind == "Bootstrapped"
                else {}
            )
            job.trains = functools.partial(getattr(variants, kind), **arguments, **also)
        return job.run()

    def others_with_the_word(self, seed: int, vectors: dict):
        """Latents of pictures of all objects, painted with the word so far; the template says nothing of the objects."""
        scenes = self.world.sample_scenes(PICTURES, 700 + seed)
        clip = self.nodes.bridge.with_embeddings(self.clip, {"word": vectors})
        prompts = [f"{self.grammar.content(scenes, i)} in the style of embedding:word" for i in range(PICTURES)]
        return self.latents(self.sample(clip, prompts, seed)), [[TEMPLATE]] * PICTURES

    def latents(self, pictures):
        """(n, 3, 128, 128) as the model sees them."""
        encoded = self.nodes.training_job.encode_pictures(self.vae, list(pictures.movedim(1, -1)[:, None]), 128)
        return self.model.model.process_latent_in(encoded)

    def look_closely(self, clip, word: str, style: int, shape: int, seed: int) -> dict[str, float]:
        real, scenes = self.others_in_the_style(style, shape, SAMPLES, 900 + seed)
        contents = [self.grammar.content(scenes, i) for i in range(SAMPLES)]
        alone = self.judge.see(self.sample(clip, [TEMPLATE.replace("{token}", word)] * SAMPLES, seed))
        painted = self.sample(clip, [f"{c} in the style of {word}" for c in contents], seed)
        elsewhere = self.judge.see(painted)

        def in_style(seen):
            right = zip(self.world.FACTORS, self.world.HELD_OUT[style], strict=True)
            return functools.reduce(operator.and_, (seen[factor] == value for factor, value in right))

        shares = {"leak": alone["shape"] == shape, "style": in_style(alone), "style elsewhere": in_style(elsewhere),
                  "shape followed": elsewhere["shape"] == scenes.shape}  # fmt: skip
        found = {k: round(v.float().mean().item(), 4) for k, v in shares.items()}
        return {**found, "loss": self.loss(clip, word, style, shape), **self.distances(painted, real)}

    def others_in_the_style(self, style: int, shape: int, count: int, seed: int):
        """Real pictures (n, 3, 128, 128) of the other objects, and their scenes."""
        import torch

        factors = dict(zip(self.world.FACTORS, self.world.HELD_OUT[style], strict=True))
        shapes = torch.tensor([s for s in range(8) if s != shape])[torch.arange(count) % 7]
        scenes = self.world.sample_scenes(count, seed, shape=shapes, **factors)
        return self.paint(scenes).image, scenes

    def loss(self, clip, word: str, style: int, shape: int) -> float:
        """Mean squared error in the model's own terms; the same pictures, noise and noise levels for every word."""
        import comfy.model_management
        import torch

        protocols, bridge = self.nodes.bridge.Conditioning, self.nodes.bridge
        pictures, scenes = self.others_in_the_style(style, shape, 16, 4321)
        contents = [self.grammar.content(scenes, i) for i in range(16)]
        latents, generator = self.latents(pictures), torch.Generator().manual_seed(99)
        comfy.model_management.load_models_gpu([self.model])
        denoiser, losses = bridge.ComfyDenoiser(self.model), []
        with torch.inference_mode():
            said = [
                clip.encode_from_tokens(clip.tokenize(f"{c} in the style of {word}"), return_pooled=True)
                for c in contents
            ]
            cond = protocols.stacked([protocols(*each) for each in said])
            for level in range(8):
                noise = torch.randn(latents.shape, generator=generator)
                sigma = torch.full((16,), float(denoiser.sampling.percent_to_sigma((level + 0.5) / 8)))
                losses.append(denoiser.error(latents, noise, sigma, cond).square().mean().item())
        return round(statistics.mean(losses), 5)

    def distances(self, painted, real) -> dict[str, float]:
        import torch
        from counterpoint.training import distances

        see = self.nodes.features.pocket().pictures
        with torch.inference_mode():  # as in the nodes; core's vision tower keeps its gradients for ever
            seen = [see(pictures.movedim(1, -1)) for pictures in (painted, real)]
        cubic, _ = distances.mmd2(seen[0].double(), seen[1].double(), distances.cubic, unbiased=True)
        return {"KID": round(cubic, 3), "CMMD": round(distances.cmmd(*seen)[0], 3)}


def elsewhere(work, *arguments):
    """`work(*arguments)` in a thread of its own: torch's training mode belongs to the thread, and nothing is painted under it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments).result()
