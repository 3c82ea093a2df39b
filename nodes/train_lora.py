"""Train Style LoRA: the style as small changes of the model itself, by the same contrast as a word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from comfy_api.latest import io

from ..training import artefact
from ..training.contrast import Tensors
from ..training.lora import DOWN, UP, StyleLora, applied, layers_of_the_batch, starting_matrices
from .bridge import TOKENS, ComfyTextEncoder, Conditioning, check_belong_together
from .training_inputs import caption_inputs, last_inputs, later_inputs, loss_outputs, picture_inputs, time_inputs
from .training_job import Job, output, template_fault

CATEGORY = "Counterpoint/lora"
RATE = "0 takes 0.0005, which is usual for LoRA with Adam; Pocket, which is small, takes 0.004."
PREFIX = "diffusion_model."  # of core's names for what lies in a MODEL


class TrainStyleLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointTrainStyleLora",
            display_name="Train Style LoRA",
            category=CATEGORY,
            description="Teaches the model the style of your pictures as a LoRA: more room than a word has, for models and styles that a "
            "word cannot reach. Experimental: whether its negatives keep out what your pictures show besides their style is not measured.",
            is_experimental=True,
            search_aliases=["lora training", "nsync", "learn style", "train style"],
            is_input_list=True,
            not_idempotent=True,
            inputs=[
                *picture_inputs("the style"),
                io.String.Input(
                    "trigger",
                    default="picture",
                    tooltip="What stands for {token} in the template: 1 word or phrase that the model knows, or a new one to call the style by.",
                ),
                io.Int.Input(
                    "rank",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="How much the LoRA can hold: 8 for a style, up to 256; the file grows with it.",
                ),
                *caption_inputs(),
                *time_inputs(RATE, snapshots=250),
                io.Float.Input(
                    "empty",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of captions left empty, so that the picture without a prompt takes the style too, and a high CFG keeps more "
                    "of it. It also teaches the objects of your pictures: on Pocket, with captions, the training object shows in 31 % with 0, in 91 % "
                    "with 0.25.",
                ),
                io.Boolean.Input(
                    "together",
                    default=False,
                    advanced=True,
                    tooltip="Off: what is shared with the negatives is removed from each of the matrices (2 for every layer) by itself. On: "
                    "from all of them as one.",
                ),
                *last_inputs(),
                *later_inputs(),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora",
                    tooltip="To core's Load LoRA Model, to use it, and Save LoRA Weights, to keep it.",
                ),
                *loss_outputs(),
            ],
        )

    @classmethod
    def validate_inputs(cls, template):
        return template_fault(template) or True

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return output(LoraJob, **inputs)


class LoraJob(Job):
    kind = "train-lora"

    def own_values(self) -> dict:
        return {"learning_rate": 0.004 if self.family.name == "Pocket" else 0.0005}

    def decides(self) -> dict:
        return {"trigger": self.values["trigger"], "rank": self.values["rank"]}

    def _say(self, text: str) -> str:
        """`{token}` is the trigger; `{token:dog}` is a dog."""
        return TOKENS.sub(lambda found: found[1] or self.values["trigger"].strip(), text)

    def trainer(self, denoiser, model, clip, latents, ways, negatives, masks) -> StyleLora:
        encoder, network = ComfyTextEncoder(clip), model.model.diffusion_model
        ways = [[self._say(way) for way in each] for each in ways]

        def encode(caption: str) -> Conditioning:
            return encoder.encode([caption], [{}])

        with torch.no_grad():
            first = encode(ways[0][0])
            check_belong_together(model, first)

            def look(rows: int) -> None:
                noise = torch.zeros_like(latents[:1].expand(rows, *latents.shape[1:]))
                sigma = denoiser.sigmas(rows, torch.Generator())
                denoiser.error(noise, noise, sigma.to(latents.device), first.expand([0] * rows))

            names = layers_of_the_batch(network, look)
        if not names:
            raise ValueError(
                f"{type(model.model.model_config).__name__} has no linear layer that a LoRA could change: train a word instead."
            )
        start = starting_matrices(network, names, self.values["rank"], self.settings.seed)
        return StyleLora(denoiser, network, encode, latents, ways, start, self.settings, negatives, masks)

    @contextlib.contextmanager
    def previewed(self, learned: Tensors, model, clip) -> Iterator[tuple]:
        # Not through core's loader: it would change the weights that the training goes on with.
        with applied(model.model.diffusion_model, [learned]):
            yield clip, self._say(self.values["template"])

    def file(self, learned: Tensors, name: str, facts: dict) -> bytes:
        return artefact.encode(named(learned), facts)

    def result(self, learned: Tensors, name: str, facts: dict) -> tuple[Tensors, str]:
        layers = sum(key.endswith(UP) for key in learned)
        return named(learned), (
            f"{layers} layers of rank {self.values['rank']}, learning rate {self.settings.learning_rate:g}, trigger {self.values['trigger']!r}"
        )


def named(learned: Tensors) -> Tensors:
    """As core names a LoRA's tensors; alpha is the rank, so strength 1 is what was trained."""
    tensors = {PREFIX + key: t.detach().float() for key, t in learned.items()}
    alphas = {
        PREFIX + key.removesuffix(DOWN) + ".alpha": torch.tensor(float(len(t)))
        for key, t in learned.items()
        if key.endswith(DOWN)
    }
    return {**tensors, **alphas}


NODES = [TrainStyleLora]
