"""Train Embedding: from pictures (and negatives) to a new word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from comfy_api.latest import io

from ..training import embedding as files
from ..training.contrast import Tensors
from ..training.embedding import Embedding
from ..training.textual_inversion import TextualInversion
from .bridge import (
    TOKEN,
    TOKENS,
    ComfyTextEncoder,
    check_belong_together,
    own_learning_rates,
    spell,
    starting_vectors,
    usual_lengths,
    with_embeddings,
)
from .training_inputs import caption_inputs, last_inputs, later_inputs, loss_outputs, picture_inputs, time_inputs
from .training_job import Job, output, template_fault

CATEGORY = "Counterpoint/embedding"
EmbeddingType = io.Custom("EMBEDDING")
RATE = (
    "0 takes a 15th of the size of the numbers in the text encoder's own words, for each encoder by itself: 0.02 for Pocket, "
    "about 0.001 for CLIP-L."
)


class TrainEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointTrainEmbedding",
            display_name="Train Embedding",
            category=CATEGORY,
            description="Teaches the model a new word for the style of your pictures. With negatives (the same content in no style in "
            "particular) what your pictures show besides their style is kept out of the word.",
            search_aliases=["textual inversion", "nsync", "learn style", "train style"],
            is_input_list=True,
            not_idempotent=True,
            inputs=[
                *picture_inputs("the word"),
                io.String.Input(
                    "start",
                    default="picture",
                    tooltip="The word or phrase the new vectors start from; 1 plain word is best. embedding:my-style goes on from a word "
                    "that was learned before.",
                ),
                io.Int.Input(
                    "vectors",
                    default=0,
                    min=0,
                    max=16,
                    tooltip="How many vectors the word has, up to 16; more hold more detail and are harder to combine. 0 takes what suits "
                    "the model: 1 for Pocket, 4 elsewhere.",
                ),
                *caption_inputs(),
                *time_inputs(RATE, snapshots=50),
                io.Boolean.Input(
                    "keep_norm",
                    default=False,
                    advanced=True,
                    tooltip="Hold every vector at its starting length (1 times its start).",
                ),
                *last_inputs(),
                *later_inputs(),
            ],
            outputs=[
                EmbeddingType.Output(
                    display_name="embedding", tooltip="The new word: to Use Embedding or Save Embedding."
                ),
                *loss_outputs(),
            ],
        )

    @classmethod
    def validate_inputs(cls, template):
        return template_fault(template) or True

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return output(WordJob, **inputs)


def starting_words(clip, start: str, others: Iterable[str], count: int) -> Tensors:
    """`{token}` starts as the phrase that was asked for, `{token:dog}` as "dog"; every word has `count` vectors."""
    phrases = {"": start, **{f"{other}/": other.replace("_", " ") for other in sorted(others)}}
    found = {before: starting_vectors(clip, phrase, count) for before, phrase in phrases.items()}
    return {before + key: vectors for before, word in found.items() for key, vectors in word.items()}


class WordJob(Job):
    kind = "train-embedding"
    trains = TextualInversion

    def own_values(self) -> dict:
        return {"vectors": self.family.vectors, "learning_rate": own_learning_rates(self.clip)}

    def decides(self) -> dict:
        return {"start": self.values["start"], "vectors": self.values["vectors"]}

    def trainer(self, denoiser, model, clip, latents, ways, negatives, masks) -> TextualInversion:
        others = {other for way in ways for text in way for other in TOKENS.findall(text)} - {""}
        found = starting_words(clip, self.values["start"], others, self.values["vectors"])
        start, encoder = {k: v.to(latents.device) for k, v in found.items()}, ComfyTextEncoder(clip)
        with torch.no_grad():
            check_belong_together(model, encoder.encode([ways[0][0]], [start]))
        lengths = usual_lengths(clip)
        usual = {k: lengths[k.rpartition("/")[2]] for k in start}
        return self.trains(denoiser, encoder, latents, ways, start, self.settings, negatives, masks, usual)

    @contextlib.contextmanager
    def previewed(self, learned: Tensors, model, clip) -> Iterator[tuple]:
        words = Embedding.of(learned, "", {}).words("preview")
        yield with_embeddings(clip, words), spell(self.values["template"], "preview")

    def unmoved(self, name: str) -> str:
        other, _, encoder = name.rpartition("/")
        return (
            f"The vectors of {f'{{token:{other}}}' if other else TOKEN} for {encoder} did not move: that encoder's part does not reach the "
            "model here (FLUX.1 reads of clip_l the first 77 tokens only: shorten the captions, or put {token} first)."
        )

    def file(self, learned: Tensors, name: str, facts: dict) -> bytes:
        return files.to_bytes(Embedding.of(learned, name, facts))

    def result(self, learned: Tensors, name: str, facts: dict) -> tuple[Embedding, str]:
        facts = {"counterpoint": "textual inversion", "start": self.values["start"], **facts}
        made = Embedding.of(learned, name, facts)
        rates = self.settings.learning_rates(made.vectors)
        by_encoder = (
            [f"{r:g} for {k}" for k, r in rates.items()] if len(rates) > 1 else [f"{r:g}" for r in rates.values()]
        )
        also = f" for each of {len(made.others) + 1} words" if made.others else ""
        return made, f"{made.count} vector{'s' * (made.count > 1)}{also}, learning rate {', '.join(by_encoder)}"


NODES = [TrainEmbedding]
