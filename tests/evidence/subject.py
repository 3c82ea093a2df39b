"""Claim: where words show their object is read best in the second half of the network, from all words that describe it.

    python dev.py evidence subject --screen       24 pictures
    python dev.py evidence subject                72 fresh ones (2 minutes)

The painter's pictures, whose masks are exact, are noised as they are at three steps of twenty, and the model paints one step of each
with a caption that says what they show ("a red spotted heart at sea, ..."). From that step alone the subject is found, as Shared
Attention finds it while it paints: the share of attention that goes to the subject's words, mean over the layers that are read, Otsu's
threshold. `all words` are those that describe the object, "red spotted heart"; the noun is "heart".

overlap       of object and mask: what both cover over what either covers, on the grid of 16 x 16 tokens, mean over pictures, 0..1
covered       share of the object's tokens that are in the mask
too much      share of the mask's tokens that are not the object's
"""

from __future__ import annotations

from evidence.learn_style import Laboratory
from harness.claim import Claim, Plan, command, models_hash

PICTURES, STEPS, GRID = 24, 20, 16
CONDITIONS = {"step-4": 4, "step-10": 10, "step-16": 16}
ARMS = {
    "second half, all words": {"everywhere": False, "noun": False},
    "all layers, all words": {"everywhere": True, "noun": False},
    "second half, noun alone": {"everywhere": False, "noun": True},
}
MEASURES = ("overlap", "covered", "too much")
CLAIM = Claim(
    name="subject",
    about=__doc__,
    screen=Plan(tuple(CONDITIONS), tuple(ARMS), (0,)),
    confirm=Plan(tuple(CONDITIONS), tuple(ARMS), (1, 2, 3)),
    measures=MEASURES,
    baseline="second half, all words",
    seconds=4,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Masks.open()
    return models_hash(), laboratory.record


class Masks(Laboratory):
    """Pictures whose object is known, and where the model sees it."""

    def record(self, condition: str, arm: str, seed: int) -> dict:
        import torch

        with torch.inference_mode():
            found, truth = self.found(CONDITIONS[condition], seed, **ARMS[arm]), self.truth(seed)
        both, either = (m.flatten(1).sum(1) for m in (found & truth, found | truth))
        inside, shown = (m.flatten(1).sum(1) for m in (truth, found))
        each = {"overlap": both / either, "covered": both / inside, "too much": 1 - both / shown.clamp_min(1)}
        means = {k: round(v.mean().item(), 4) for k, v in each.items()}
        return {"measures": means, "overlap of each": [round(v, 3) for v in each["overlap"].tolist()]}

    def scenes(self, seed: int):
        return self.world.sample_scenes(PICTURES, 3000 + seed)

    def truth(self, seed: int):
        """(n, 16, 16) bool: tokens of which the object covers three tenths."""
        import torch

        masks = self.paint(self.scenes(seed)).mask[:, None].float()
        return torch.nn.functional.adaptive_avg_pool2d(masks, GRID)[:, 0] > 0.3

    def found(self, step: int, seed: int, everywhere: bool, noun: bool):
        """(n, 16, 16) bool."""
        import torch

        scenes = self.scenes(seed)
        latents = self.vae.encode(self.paint(scenes).image.movedim(1, -1)).split(1)
        prompts = [
            f"{self.grammar.content(scenes, i)}, {self.grammar.factor_words(scenes.combination(i))}"
            for i in range(PICTURES)
        ]
        nouns = [self.grammar.words("shape", int(shape)) for shape in scenes.shape]
        masks = [
            self.seen(step, x, p, n if noun else described(p, n), everywhere, PICTURES * seed + i)
            for i, (x, p, n) in enumerate(zip(latents, prompts, nouns, strict=True))
        ]
        return torch.cat(masks).bool()

    def seen(self, step: int, latents, prompt: str, subject: str, everywhere: bool, seed: int):
        """(1, 16, 16) of one picture, after one step that shares nothing."""
        import comfy.sample
        import torch

        attention = self.nodes.attention
        positive = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))
        positive = attention.words.name_subject(positive, self.clip, [prompt], subject)
        model = attention.patch.with_shared_attention(self.model, None, attention.patch.How(strength=0.0))
        if everywhere:
            read_everywhere(model)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        made = comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "normal", positive, positive, latents, start_step=step, last_step=step + 1,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        return attention.patch.found_masks(model, made)


def described(prompt: str, noun: str) -> str:
    """What a caption says of its object: all words between the article and the noun, and it."""
    return prompt[: prompt.index(noun) + len(noun)].split(" ", 1)[1]


def read_everywhere(model) -> None:
    """Every layer is told that it is of the second half, where the reader reads."""
    options = model.model_options["transformer_options"]
    reader = options["optimized_attention_override"]

    def read(*args, transformer_options: dict, **more):
        return reader(*args, transformer_options={**transformer_options, "block": ("output", 0)}, **more)

    options["optimized_attention_override"] = read
