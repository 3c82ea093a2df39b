"""A learned word: its vectors for every text encoder, and the file that carries it."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from . import artefact
from .protocols import Vectors

ENCODER = re.compile(
    r"(clip_|t5|bert|llama|qwen|mistral|gemma).*"
)  # keys that name a text encoder; others name the word
WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}  # of encoders that files were made for that name none
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BadName(ValueError):
    """A name that ComfyUI's prompts could not read; the message says which one could."""


@dataclass
class Embedding:
    """The type EMBEDDING. `vectors` by ComfyUI's key of the encoder, (k, width) float32 each, the same k for all."""

    vectors: Vectors
    name: str
    facts: dict = field(default_factory=dict)  # method, steps, seed, base fingerprint...: goes into the file's header
    others: dict[str, Vectors] = field(default_factory=dict)  # words learned along with it, by what they stand for

    @staticmethod
    def of(learned: dict[str, torch.Tensor], name: str, facts: dict) -> Embedding:
        """From what a training learns, where `dog/clip_l` is the part for clip_l of the word that stands for a dog."""
        others = by_word({k: v.float() for k, v in learned.items()})
        return Embedding(others.pop(""), name, facts, others)

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    def words(self, name: str) -> dict[str, Vectors]:
        """Everything it teaches, by what prompts call it when it is called `name`."""
        return {word_name(name, other): v for other, v in {"": self.vectors, **self.others}.items()}


def word_name(name: str, other: str | None) -> str:
    """What `{token}` (no other), or `{token:other}`, is called in prompts."""
    return f"{name}-{other}" if other else name


def by_word(learned: dict[str, torch.Tensor]) -> dict[str, Vectors]:
    """`dog/clip_l` -> ["dog"]["clip_l"]; the word that is meant by `{token}` alone is ""."""
    words: dict[str, Vectors] = {}
    for key, tensor in learned.items():
        other, _, encoder = key.rpartition("/")
        words.setdefault(other, {})[encoder] = tensor
    return words


def check_name(name: str) -> str:
    """`embedding:NAME` ends at a blank, `<`, `[` or a comma, and must stay inside the embeddings folder."""
    if not NAME.fullmatch(name):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "my-style"
        raise BadName(
            f"The name {name!r} cannot be used as an embedding: letters, digits, '-', '_' and '.' only, for example {better!r}."
        )
    return name


def to_bytes(embedding: Embedding) -> bytes:
    """ComfyUI's keys, nothing else as tensors: a second tensor would stop A1111 and diffusers from reading the file."""
    facts = {"modelspec.title": embedding.name, "modelspec.trigger_phrase": embedding.name, **embedding.facts}
    others = {f"{other}/{k}": v for other, vectors in embedding.others.items() for k, v in vectors.items()}
    return artefact.encode({k: v.float() for k, v in {**embedding.vectors, **others}.items()}, facts)


def load(path: Path) -> Embedding:
    """An embedding from a file with one (k, width) or (width,) tensor per encoder: ours, A1111's, diffusers', kohya's or
    OneTrainer's, .safetensors or the older .pt and .bin, of which tensors are read and nothing is run."""
    try:
        tensors, metadata = artefact.read(path) if path.suffix == artefact.SUFFIX else (_legacy(path), {})
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path.name} cannot be read: it is broken, or holds more than tensors. Copy or save it again, best as .safetensors."
        ) from error
    tensors = {OTHER_NAMES.get(k, k): v for k, v in tensors.items() if not k.endswith("_out")}
    wrong = {k: tuple(v.shape) for k, v in tensors.items() if v.ndim not in (1, 2)}
    if wrong or not tensors:
        raise ValueError(
            f"{path.name} is not an embedding: it holds {wrong or 'nothing'}, not vectors of shape (k, width)."
        )
    vectors = {k: v.float().reshape(-1, v.shape[-1]) for k, v in tensors.items()}
    if len(vectors) == 1:
        ((key, only),) = vectors.items()
        named = ENCODER.fullmatch(key.rpartition("/")[2])
        vectors = {key if named else WIDTHS.get(only.shape[1], key): only}
    return Embedding.of(
        vectors, path.stem, {k: _plain(v) for k, v in metadata.items() if not k.startswith("modelspec.")}
    )


OTHER_NAMES = {"t5": "t5xxl"}  # OneTrainer's and diffusers', which ComfyUI would ignore


def joined(first: Embedding, second: Embedding) -> Embedding:
    """One word of two files with a part each, as diffusers' training for SDXL leaves them. Raises ValueError where the two are not
    the parts of one word."""
    for part in (first, second):
        if unnamed := [v.shape[1] for k, v in part.vectors.items() if not ENCODER.fullmatch(k)]:
            raise ValueError(
                f"{part.name!r} does not say which text encoder its vectors of {unnamed[0]} numbers are for, so it cannot be joined: those of "
                "768 are taken for clip_l's and those of 1280 for clip_g's."
            )
    if twice := first.vectors.keys() & second.vectors.keys():
        raise ValueError(
            f"{first.name!r} and {second.name!r} are both for {', '.join(sorted(twice))}: choose a second file for another text encoder, "
            "or 'none'."
        )
    if first.count != second.count:
        raise ValueError(
            f"{first.name!r} has {first.count} vectors and {second.name!r} has {second.count}: the parts of one word have equally many, so "
            "choose the two files that one training left."
        )
    vectors, others = first.vectors | second.vectors, second.others | first.others
    return Embedding(vectors, first.name, second.facts | first.facts, others)


def _legacy(path: Path) -> Vectors:
    """A1111: {"string_to_param": {"*": vectors}, ...}; diffusers: {"<word>": vectors}."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("string_to_param", state) if isinstance(state, dict) else {}
    return {k: v.detach() for k, v in state.items() if isinstance(v, torch.Tensor)}


def _plain(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value
