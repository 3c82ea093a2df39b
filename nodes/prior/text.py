"""What a prior reads: a prompt in a CLIP's text encoder, after its last layer, and as the one vector that it shares with pictures.

CONDITIONING does not have that. It is the last layer but one for SDXL, and its pooled part is not projected for SD 1.5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import comfy.model_management
import torch

from ...training.prior.pairs import Texts
from ..identity import fingerprint

TEXTS = 32  # prompts in one pass
FILES = {  # whose projection fits, by width
    768: "text_encoder/model.safetensors of Karlo or of Kandinsky 2.1's prior, or the whole of openai/clip-vit-large-patch14",
    1024: "the ViT-H text encoder of an SD 2 checkpoint",
    1280: "the CLIP of an SDXL checkpoint, or text_encoder/model.safetensors of Kandinsky 2.2's prior",
}


class Reading(NamedTuple):
    texts: Texts  # float32 on core's intermediate device
    warnings: list[str]


def text_of(clip, prompts: list[str], width: int | None = None) -> Reading:
    """Prompts as a prior reads them. The CLIP keeps its weights and its settings.

    Of several encoders the one whose projected text has `width` numbers is asked, or the widest. A prompt is its first 77 tokens, with
    no weights in it: (red:1.3) are plain characters. Raises ValueError where the CLIP has no such encoder, or has it without weights.
    """
    name, encoder = chosen_encoder(clip, width)
    check_loaded(encoder, name)
    tokenizer, options = getattr(clip.tokenizer, name), clip.tokenizer_options
    read = [tokenizer.tokenize_with_weights(p, disable_weights=True, tokenizer_options=options) for p in prompts]
    sections = [[token for token, *_ in parts[0]] for parts in read]
    clip.load_model()
    made = []
    with _last_layer(clip, encoder):
        for start in range(0, len(sections), TEXTS):
            comfy.model_management.throw_exception_if_processing_interrupted()
            made.append(_encoded(encoder, sections[start : start + TEXTS], clip.patcher.load_device))
    warnings = [_too_long(prompt) for prompt, parts in zip(prompts, read, strict=True) if len(parts) > 1]
    return Reading(Texts(*(torch.cat(rows) for rows in zip(*made, strict=True))), warnings)


def identity(clip, width: int | None = None) -> str:
    """12 hex digits of the encoder that `text_of` asks, with its LoRAs: the same whichever files the CLIP came in, and whatever is
    beside it (other encoders, clip skip, learned words)."""
    name, encoder = chosen_encoder(clip, width)
    before = f"{name}.transformer."
    own = {
        part: {k.removeprefix(before): v for k, v in getattr(clip.patcher, part).items() if k.startswith(before)}
        for part in ("patches", "backup", "object_patches")
    }
    return fingerprint(SimpleNamespace(model=encoder.transformer, **own))


def _too_long(prompt: str) -> str:
    return f"The prompt {prompt[:40] + '...'!r} has more than 77 tokens: what is beyond them was not read."


def chosen_encoder(clip, width: int | None) -> tuple[str, torch.nn.Module]:
    """Name ("clip_l", "clip_g", "clip_h") and module of core's own encoder of CLIP's kind, by the width of its projection."""
    found = {}
    for name, encoder in clip.cond_stage_model.named_children():
        projection = getattr(getattr(encoder, "transformer", None), "text_projection", None)
        if projection is not None and hasattr(clip.tokenizer, name):
            found[name] = projection.out_features
    if not found:
        raise ValueError(
            f"This CLIP ({type(clip.cond_stage_model).__name__}) has no text encoder of CLIP's own kind, whose texts lie among pictures: load "
            f"{FILES.get(width, 'the one that belongs to the prior')}, with Load CLIP."
        )
    fitting = [name for name, size in found.items() if width in (None, size)]
    if not fitting:
        has = " and ".join(f"{size} ({name})" for name, size in found.items())
        raise ValueError(
            f"The prior reads texts of {width} numbers, and this CLIP gives {has}: load "
            f"{FILES.get(width, 'the one that belongs to the prior')}, with Load CLIP."
        )
    name = sorted(fitting, key=found.get)[-1]
    return name, getattr(clip.cond_stage_model, name)


def check_loaded(encoder, name: str) -> None:
    """Raises ValueError for an encoder whose projection, last layer or last norm no file has filled.

    Core leaves such weights as the memory was: zeros as a rule. What happens to look like weights cannot be told.
    """
    transformer = encoder.transformer
    needed = {
        "text_projection": transformer.text_projection.weight,
        "last layer": transformer.text_model.encoder.layers[-1].mlp.fc2.weight,
        "last norm": transformer.text_model.final_layer_norm.weight,
    }
    empty = [part for part, weight in needed.items() if not _filled(weight)]
    if empty:
        raise ValueError(
            f"The text encoder {name} of this CLIP came without its {' and '.join(empty)} (checkpoints of SD 1.5 and SDXL leave ViT-L's "
            f"projection out), so it cannot tell where a text lies among pictures: load "
            f"{FILES.get(transformer.text_projection.out_features, 'the whole encoder')}, with Load CLIP."
        )


def _filled(weight: torch.Tensor | None) -> bool:
    if weight is None:
        return False
    size = weight.float().square().mean(-1).sqrt()  # of each row
    return bool(size.isfinite().all() and (size > 1e-6).all() and (size < 1e3).all())


@contextlib.contextmanager
def _last_layer(clip, encoder) -> Iterator[None]:
    """While it lasts, the encoder answers after its last layer and norm, and projects. Core resets such options at every prompt."""
    module = clip.cond_stage_model
    module.reset_clip_options()
    encoder.set_clip_options({"layer": None, "projected_pooled": True, "execution_device": clip.patcher.load_device})
    try:
        yield
    finally:
        module.reset_clip_options()


def _encoded(encoder, sections: list[list], device: torch.device) -> Texts:
    """Rows of tokens of one length, each with its end in it."""
    home = comfy.model_management.intermediate_device()
    with torch.no_grad(), comfy.model_management.cuda_device_context(device):
        states, pooled = encoder.encode(sections)[:2]
        mask = encoder.process_tokens(sections, device)[
            1
        ]  # 1 up to and with the end; vectors of learned words are counted
    return Texts(pooled.float().to(home), states.float().to(home), mask.bool().to(home))
