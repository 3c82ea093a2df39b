"""Claim: pictures that look at each other's subject while they are painted show one object, and keep their own scenes.

    python dev.py evidence attention --screen       every way, 10 sets
    python dev.py evidence attention                the few that matter, 40 fresh sets

A set is four photos of one object in four of the world's six places, from four noises. How its pattern lies (angle, period, phase,
second colour) no prompt can say, so by itself each picture has its own; in the condition `colour-unsaid` the prompts leave out the
colour too ("a photo of a spotted heart at sea"). Five sets are one run; all arms start from the same noises.

identity           cosine of the instance probe between two pictures of a set, mean over its six pairs
colours apart      distance between the mean colours of the middle 48 x 48 pixels, where the object is, mean over pairs, 0..1
object followed    share of pictures whose shape, pattern and, where it is said, colour are those asked for (judge)
place followed     share whose place is the one asked for
scenes apart       distance between the border pixels (16 wide) of two pictures, mean over pairs, 0..1
"""

from __future__ import annotations

import itertools
import statistics

from evidence.learn_style import Laboratory
from harness.claim import Claim, Plan, command, models_hash

SETS, PICTURES = 5, 4
CONDITIONS = ("all-said", "colour-unsaid")
# What Shared Attention is given; `masks` are a square in the middle, else the words are read, else (no words named) all is shared.
ARMS = {
    "unshared": None,
    "shared, by words": {},
    "shared, a square": {"masks": True},
    "whole picture": {"words": False},
    "one anchor, whole": {"words": False, "anchors": 1},
    "StyleAligned": {"words": False, "anchors": 1, "aligned": True},  # Hertz et al. 2024, arXiv 2312.02133
    "by words, one anchor": {"anchors": 1},
    "by words, second half": {"layers": "second half"},
    "by words, half the tokens": {"dropout": 0.5},
    "by words, strength 0.5": {"strength": 0.5},
    "by words, strength 2": {"strength": 2.0},
    "by words, first step alone": {"first_step": "nothing"},
    "by words, until half-way": {"end": 0.5},
}
CONFIRMED = ("unshared", "shared, by words", "shared, a square", "whole picture", "one anchor, whole", "StyleAligned")
MEASURES = ("identity", "colours apart", "object followed", "place followed", "scenes apart")
README = ("identity", "colours apart", "place followed", "scenes apart")  # what its tables show
CLAIM = Claim(
    name="attention",
    about=__doc__,
    screen=Plan(CONDITIONS, tuple(ARMS), (0, 1)),
    confirm=Plan(CONDITIONS, CONFIRMED, tuple(range(11, 19))),
    measures=MEASURES,
    baseline="unshared",
    seconds=20,
    digits=3,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Sets.open()
    return models_hash(), laboratory.record


class Sets(Laboratory):
    """Sets of pictures, painted together."""

    def record(self, condition: str, arm: str, seed: int) -> dict:
        each = [self.of_set(condition, arm, seed * SETS + number) for number in range(SETS)]
        means = {k: round(statistics.mean(one[k] for one in each), 4) for k in MEASURES}
        return {"measures": means, "sets": [{k: round(v, 4) for k, v in one.items()} for one in each]}

    def of_set(self, condition: str, arm: str, number: int) -> dict[str, float]:
        import torch

        with torch.inference_mode():
            return self.measured(condition, arm, number)

    def measured(self, condition: str, arm: str, number: int) -> dict[str, float]:
        import torch

        scenes = self.scenes(number)
        said = ("colour", "pattern", "shape") if condition == "all-said" else ("pattern", "shape")
        subject = " ".join(self.grammar.words(k, int(getattr(scenes, k)[0])) for k in said)
        places = [self.grammar.words("background", int(place)) for place in scenes.background]
        prompts = [f"a photo of {self.grammar.article(subject)} {place}" for place in places]
        latents = self.painted(arm, prompts, subject, number)
        pictures = self.vae.decode(latents).movedim(-1, 1).clone()
        seen, probe = self.judge.see(pictures), self.nodes.pocket_models.load_instance_probe()[0]
        vectors, pairs = probe.see(pictures), list(itertools.combinations(range(PICTURES), 2))
        asked = torch.stack([seen[k] == getattr(scenes, k) for k in said]).all(0)
        middle, border = pictures[:, :, 40:88, 40:88].mean((2, 3)), self.border(pictures)
        return {
            "identity": statistics.mean(float(vectors[a] @ vectors[b]) for a, b in pairs),
            "colours apart": statistics.mean(float((middle[a] - middle[b]).abs().mean()) for a, b in pairs),
            "object followed": asked.float().mean().item(),
            "place followed": (seen["background"] == scenes.background).float().mean().item(),
            "scenes apart": statistics.mean(float((border[a] - border[b]).abs().mean()) for a, b in pairs),
        }

    def scenes(self, number: int):
        """One object (any pattern but plain) in four places, each a photo."""
        import torch

        world, generator = self.world, torch.Generator().manual_seed(number)
        patterned = [i for i, name in enumerate(world.ATTRIBUTES["pattern"]) if name != "plain"]
        drawn = {k: int(torch.randint(0, 8, (), generator=generator)) for k in ("shape", "colour")}
        pattern = patterned[int(torch.randint(0, len(patterned), (), generator=generator))]
        scenes = world.sample_scenes(PICTURES, 7000 + number, pattern=pattern, **drawn)
        scenes.background[:] = torch.randperm(6, generator=generator)[:PICTURES]
        return scenes

    def painted(self, arm: str, prompts: list[str], subject: str, number: int):
        import torch

        attention, settings = self.nodes.attention, dict(ARMS[arm] or {})
        encoded = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(p)) for p in prompts]
        positive, model = self.nodes.generate.together(encoded), self.model
        masks = torch.zeros(1, 128, 128) if settings.pop("masks", False) else None
        if masks is not None:
            masks[:, 24:104, 24:104] = 1
        aligned = settings.pop("aligned", False)
        if settings.pop("words", True):
            positive = attention.words.name_subject(positive, self.clip, prompts, subject)
        if ARMS[arm] is not None:
            model = attention.patch.with_shared_attention(model, masks, attention.patch.How(**settings))
        if aligned:
            align(model, PICTURES)
        negative = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        numbers = list(range(number * PICTURES, (number + 1) * PICTURES))
        return self.nodes.generate.sample(model, [positive], negative, self.recipe(0), numbers)

    @staticmethod
    def border(pictures):
        """(n, 3, pixels) of the frame of 16 pixels."""
        import torch

        inside = torch.ones(128, 128, dtype=torch.bool)
        inside[16:112, 16:112] = False
        return pictures[:, :, inside]


def align(model, count: int) -> None:
    """StyleAligned's normalisation, ahead of the sharing: each channel of every picture's queries and keys gets the mean and the
    deviation, over the tokens, of the first picture's of its prompt."""
    places = model.model_options["transformer_options"]["patches_replace"]["attn1"]

    def as_first(x):
        x = x.unflatten(0, (-1, count))  # (prompts, pictures, tokens, channels)
        mean, deviation = x.mean(2, keepdim=True), x.std(2, keepdim=True) + 1e-5
        return ((x - mean) / deviation * deviation[:, :1] + mean[:, :1]).flatten(0, 1)

    def ahead_of(sharing):
        return lambda q, k, v, options: sharing(as_first(q), as_first(k), v, options)

    for place, sharing in places.items():
        places[place] = ahead_of(sharing)
