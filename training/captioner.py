"""Image-to-text models, from folders as transformers saves them: pictures in, a few words for each out.

Nothing here reaches the network, runs code that lies in a folder, or reads weights that are not safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import artefact

# What each model is asked, by the model_type in its config.json. None: it describes pictures without being asked. All
# others are asked with the prompt, in the chat template that lies beside them.
QUESTIONS = {
    "blip": None,
    "blip-2": None,
    "git": None,
    "vision-encoder-decoder": None,
    "florence2": "<DETAILED_CAPTION>",
    "instructblip": "{prompt}",
    "paligemma": "caption en",
}
PARTS = {".json", ".txt", ".model", ".jinja", ".safetensors"}  # all that is read of a folder
LACKING = 0.01  # of the numbers of a model; fewer may be missing that captions do not need, such as a pooling layer
SAMPLE = 1 << 16  # bytes


class FolderError(ValueError):
    """A model folder that cannot be used; the message is to be put after the folder's name."""


def model_type(folder: Path) -> str:
    """What config.json says the model is. Raises FolderError where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise FolderError("has no config.json: copy the whole folder.") from None
    except ValueError:  # no UTF-8, or no JSON
        raise FolderError("has a broken config.json: copy it again.") from None
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def question(kind: str, prompt: str) -> str | None:
    """The text that a model of this type is given; None where it takes none."""
    asked = QUESTIONS.get(kind, "{prompt}")
    return None if asked is None else asked.replace("{prompt}", prompt)


def identity(folder: Path) -> str:
    """16 hex digits for what the folder holds, wherever it lies: small files whole, of large ones 17 samples."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in PARTS and f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}|{size}\n".encode())
        places = [i * (size - SAMPLE) // 16 for i in range(17)] if size > 17 * SAMPLE else range(0, size, SAMPLE)
        with open(file, "rb") as opened:
            for place in places:
                opened.seek(place)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()[:16]


def read_replies(file: Path) -> dict[str, str]:
    """Replies by the hash of their picture, as `write_replies` left them. Raises ValueError on another file."""
    if not file.exists():
        return {}
    try:
        replies = json.loads(file.read_text(encoding="utf-8"))["replies"]
        return {str(k): str(v) for k, v in replies.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"The kept captions in {file.name} are broken: delete that file.") from None


def write_replies(file: Path, facts: dict[str, Any], replies: dict[str, str]) -> None:
    text = json.dumps({**facts, "replies": replies}, indent=1, ensure_ascii=False)
    artefact.write_whole(file, text.encode("utf-8", "replace"))


@dataclass
class Captioner:
    """A loaded model."""

    model: torch.nn.Module
    tokenizer: Any
    see: Callable[[list[Image.Image], str | None], dict[str, Any]]  # pictures and what is asked -> the model's inputs

    def replies(
        self, pictures: list[torch.Tensor], asked: str | None, tokens: int, tell: Callable[[int], None] = lambda n: None
    ) -> list[str]:
        """What the model says about each picture (H, W, 3) in 0..1, `tokens` pieces of words at most.

        The likeliest words, without chance. `tell(n)` after each piece of a word; what it raises ends the work.
        """
        from transformers import StoppingCriteriaList

        given = self.see([to_pil(p) for p in pictures], asked)
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        inputs = {
            k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype)
            for k, v in given.items()
            if isinstance(v, torch.Tensor)
        }
        listener = StoppingCriteriaList([_listener(tell)])
        how = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": False}
        said = self.model.generate(**inputs, **how, max_new_tokens=tokens, stopping_criteria=listener)
        return self.tokenizer.batch_decode(without_question(said, inputs.get("input_ids")), skip_special_tokens=True)


def to_pil(picture: torch.Tensor) -> Image.Image:
    """(H, W, 3) in 0..1 with 8 bits."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def without_question(said: torch.Tensor, asked: torch.Tensor | None) -> torch.Tensor:
    """(B, t) of new tokens only: some models repeat what they were asked, others do not."""
    repeated = asked is not None and torch.equal(said[:, : asked.shape[1]], asked)
    return said[:, asked.shape[1] :] if repeated else said


def _listener(tell: Callable[[int], None]) -> Callable[..., torch.Tensor]:
    """A stopping criterion that never stops, and is asked after every piece of a word."""
    said = 0

    def never(input_ids: torch.Tensor, scores: Any, **_) -> torch.Tensor:
        nonlocal said
        tell(said := said + 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return never


def load(folder: Path, dtype: torch.dtype) -> Captioner:
    """The model of a folder, on the CPU. Raises FolderError where it is incomplete, of another kind, or not safe."""
    kind = model_type(folder)
    _check_kind(folder, kind)
    _check_parts(folder)
    try:
        return _load(folder, kind, dtype)
    except FolderError:
        raise
    except Exception as error:  # transformers fails in a way of its own on each file that is broken
        reason = re.split(r"\.\s|\n", str(error).strip())[0].replace(str(folder), "it")[:200].rstrip(".: ")
        raise FolderError(
            f"is not complete or broken ({reason}): copy the whole folder, with config.json, preprocessor_config.json, all "
            ".safetensors, and the tokenizer's files."
        ) from error


def _check_kind(folder: Path, kind: str) -> None:
    from transformers.models.auto import modeling_auto

    if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise FolderError(
            "brings its own program code, which is not run: take the same model in the form that transformers has itself, "
            "such as OpenGVLab/InternVL3-1B-hf or florence-community/Florence-2-base."
        )
    raise FolderError(
        f"is no model that describes pictures (model_type {kind or 'missing'}): take one such as BLIP, Florence-2 or Qwen-VL."
    )


def _check_parts(folder: Path) -> None:
    """transformers makes up a tokenizer that it does not find, and what is said with it is nonsense."""

    def has(*names: str) -> bool:
        return any(any(folder.glob(name)) for name in names)

    if not has("*.safetensors"):
        if has("*.bin"):
            raise FolderError(
                "has its weights as .bin, which may hide program code and is not read: take a version with .safetensors."
            )
        raise FolderError("has no weights: copy all its .safetensors files, too.")
    if not has("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tekken.json"):
        raise FolderError("has no tokenizer: copy its tokenizer.json, vocab.txt or tokenizer.model, too.")
    if not has("preprocessor_config.json", "processor_config.json"):
        raise FolderError("does not say how pictures are prepared: copy its preprocessor_config.json, too.")


def _load(folder: Path, kind: str, dtype: torch.dtype) -> Captioner:
    import transformers

    safe = {"local_files_only": True, "trust_remote_code": False}
    newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    if QUESTIONS.get(kind, "") is None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **safe)
        tokenizer, see = transformers.AutoTokenizer.from_pretrained(folder, **safe), _alone(processor)
    else:
        processor = transformers.AutoProcessor.from_pretrained(folder, **safe)
        tokenizer = processor.tokenizer
        see = _asked(processor) if kind in QUESTIONS else _chat(processor)
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **{"dtype" if newer else "torch_dtype": dtype}, **safe
    )
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    missing = [name for name in info["missing_keys"] if name in sizes]
    if sum(sizes[name] for name in missing) > LACKING * sum(sizes.values()):
        raise FolderError(
            f"lacks {len(missing)} of its model's {len(sizes)} weights ({min(missing)}...): copy it again, or, where it was "
            "saved for another program, take the form that transformers has itself, such as florence-community/Florence-2-base."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # what is said must follow what was asked
    return Captioner(model.eval().requires_grad_(False), tokenizer, see)


def _alone(image_processor):
    """Pictures, and not a word."""
    return lambda pictures, asked: image_processor(images=pictures, return_tensors="pt")


def _asked(processor):
    """Pictures, and the same words for each."""
    return lambda pictures, asked: processor(
        images=pictures, text=[asked] * len(pictures), padding=True, return_tensors="pt"
    )


def _chat(processor):
    """Each picture in a conversation of its own."""
    template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise FolderError(
            "has no chat template: copy its chat_template.jinja or chat_template.json, too, or take another model."
        )

    at_once = {"enable_thinking": False} if "enable_thinking" in str(template) else {}

    def see(pictures: list[Image.Image], asked: str) -> dict[str, Any]:
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
        text = processor.apply_chat_template(said, template, add_generation_prompt=True, **at_once)
        first = processor.tokenizer.bos_token
        once = {"add_special_tokens": False} if first and text.startswith(first) else {}
        return processor(
            text=[text] * len(pictures), images=[[p] for p in pictures], padding=True, return_tensors="pt", **once
        )

    return see
