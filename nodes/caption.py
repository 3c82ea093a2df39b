"""Caption Images: what is in each picture, in the words of an image-to-text model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..training import captioner, captions
from ..training.features import images_hash
from ..training.run import config_hash
from .bridge import encoder_tokenizers
from .dataset import CATEGORY
from .features import managed
from .progress import Reporter

FOLDER = "caption_models"  # of ComfyUI's models folder
HUB = "hub id below"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BATCH = 4
ROOM = 2**29  # bytes beside the weights for each picture of a batch
PROMPT = (
    "Describe what is in this picture in at most 25 words: objects, people, places, actions. Do not mention style, medium, "
    "colours of the paper, artist or technique."
)
STYLE = (
    "oil painting, watercolor, watercolour, pencil drawing, digital art, painting of, drawing of, illustration of, "
    "photo of, photograph of, in the style of *"
)


def folders() -> list[Path]:
    return [Path(f) for f in folder_paths.get_folder_paths(FOLDER)]


def choices() -> list[str]:
    found = {item.name for place in folders() if place.is_dir() for item in place.iterdir() if item.is_dir()}
    return [HUB, *sorted(found)]


def folder_of(model: str, hub_id: str, download: bool) -> Path:
    """Where a model lies. Raises ValueError; only with `download` may it come from the network."""
    if model != HUB:
        plain = Path(model).name == model and model not in ("", "..")
        found = next((place / model for place in folders() if plain and (place / model).is_dir()), None)
        if found is None:
            raise ValueError(f"There is no {model!r} in models/{FOLDER}: put the model's folder there and press R.")
        return found
    if not HUB_ID.fullmatch(hub_id):
        raise ValueError(
            f"{repr(hub_id) + ' is no hub id' if hub_id else 'No model is chosen'}: choose a folder of models/{FOLDER}, or write "
            "a hub id such as Salesforce/blip-image-captioning-large."
        )
    import huggingface_hub

    only = {"allow_patterns": [f"*{suffix}" for suffix in captioner.PARTS], "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=not download, **only))
    except OSError as error:
        if not download:
            raise ValueError(
                f"{hub_id} is not on this machine: turn `download` on to fetch it once, or put its folder into models/{FOLDER}, "
                "press R, and choose it."
            ) from None
        reason = str(error).strip().split("\n")[0][:200].rstrip(". ")
        raise ValueError(
            f"{hub_id} could not be downloaded ({reason}): look at its name and at your network."
        ) from error


def describe(
    pictures: list[torch.Tensor], folder: Path, prompt: str, tokens: int, batch: int, reporter: Reporter
) -> tuple[list[str], int]:
    """The raw reply for each picture (1, H, W, 3), and how many are new; what was said once is kept on disk."""
    asked = captioner.question(captioner.model_type(folder), prompt)
    facts = {"model": captioner.identity(folder), "asked": asked, "max_tokens": tokens}
    kept = Path(folder_paths.get_output_directory()) / "counterpoint" / "captions" / f"{config_hash(facts)[:16]}.json"
    replies = captioner.read_replies(kept)
    hashes = [images_hash([p]) for p in pictures]
    new = {h: p for h, p in zip(hashes, pictures, strict=True) if h not in replies}
    if new:
        model, unsaid = captioner.load(folder, fitting_dtype()), iter(new)
        for said in in_batches(model, list(new.values()), asked, tokens, batch or BATCH, reporter):
            replies.update((next(unsaid), reply) for reply in said)
            captioner.write_replies(kept, facts, replies)
    return [replies[h] for h in hashes], len(new)


def fitting_dtype() -> torch.dtype:
    device = comfy.model_management.get_torch_device()
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def advance(reporter: Reporter, before: int, at_once: int, said: int) -> None:
    """Moves the bar after each piece of a word. Raises ComfyUI's interruption."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    reporter.bar.update_absolute(before + said * at_once)


def in_batches(
    model: captioner.Captioner, pictures: list[torch.Tensor], asked, tokens: int, size: int, reporter: Reporter
) -> Iterator[list[str]]:
    """The replies of one batch after the other, the model in the device's memory only meanwhile."""
    patcher, known = managed(model.model), reporter.bar.total - len(pictures) * tokens
    try:
        comfy.model_management.load_models_gpu([patcher], memory_required=size * ROOM, force_full_load=True)
        for start in range(0, len(pictures), size):
            some = [p[0] for p in pictures[start : start + size]]
            tell = functools.partial(advance, reporter, known + start * tokens, len(some))
            tell(0)
            yield model.replies(some, asked, tokens, tell)
            tell(tokens)
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"There is not memory enough for this model and {size} pictures at once: set batch to {max(1, size // 2)}, or take a smaller model."
        ) from error
    finally:
        comfy.model_management.unload_model_and_clones(patcher)


def token_counter(clip) -> Callable[[str], tuple[int, int]]:
    """How many pieces of words a text has for a CLIP's shortest encoder, and how many that reads."""
    shortest = min(encoder_tokenizers(clip).values(), key=lambda t: t.max_length)

    def count(text: str) -> tuple[int, int]:
        batches = shortest.tokenize_with_weights(text, return_word_ids=True)
        return sum(1 for part in batches for _, _, word in part if word), shortest.max_length - 2

    return count


class CaptionImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointCaptionImages",
            display_name="Caption Images",
            category=CATEGORY,
            description="Describes what is in each picture with an image-to-text model of your own (BLIP, Florence-2, Qwen-VL, InternVL...), "
            "without words about the style. What was described once is kept; nothing is downloaded unless you say so.",
            search_aliases=["image to text", "auto caption", "tagger", "blip", "florence", "describe image", "vlm"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="1 or more pictures, of any size: from Load Dataset."),
                io.Combo.Input("model", options=choices(), default=HUB,
                               tooltip=f"1 folder of models/{FOLDER}, as transformers saves it; press R after adding one. Or: {HUB}."),
                io.String.Input("hub_id", default="",
                                tooltip=f"Only for {HUB}: 1 name such as Salesforce/blip-image-captioning-large (2 GB) or Qwen/Qwen2.5-VL-3B-Instruct (8 GB)."),
                io.Boolean.Input("download", default=False,
                                 tooltip="Off: only what is on this machine. On: a hub id is fetched from the hub, 1 to 20 GB the first time."),
                io.String.Input("prompt", default=PROMPT, multiline=True,
                                tooltip="What chat models are asked, 1 for all pictures. BLIP, GIT and Florence-2 are not asked with it: they describe by themselves."),
                io.String.Input("strip", default=STYLE, multiline=True,
                                tooltip="Style words taken out of every caption, with commas; 0 words turn it off. * stands for letters in a word, alone for the rest up to a comma."),
                io.Int.Input("batch", default=0, min=0, max=64, advanced=True,
                             tooltip=f"Pictures described at once; 0 takes {BATCH}, and 1 needs the least memory."),
                io.Int.Input("max_tokens", default=60, min=4, max=1024, advanced=True,
                             tooltip="The longest reply, in pieces of words: 60 is about 45 words. CLIP reads 75."),
                io.Clip.Input("clip", optional=True,
                              tooltip="1 CLIP that will read the captions, to count their pieces of words; without, captions of more than 55 words are named."),
            ],
            outputs=[
                io.String.Output(display_name="captions", is_output_list=True, tooltip="The caption of each picture."),
                io.String.Output(display_name="report", tooltip="Captions that are empty, the same, or too long; then all of them."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, strip):
        try:
            captions.words(strip[0] or "")  # None is a wire
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model, hub_id, **_):
        if None in (model[0], hub_id[0]):  # a wire
            return float("nan")
        try:
            return captioner.identity(folder_of(model[0], hub_id[0].strip(), False))
        except ValueError:  # not on this machine, or not yet
            return ""

    @classmethod
    def execute(cls, images, model, hub_id, download, prompt, strip, batch, max_tokens, clip=None) -> io.NodeOutput:
        pictures = [picture[..., :3] for several in images for picture in several.split(1)]
        style, hub_name = captions.words(strip[0]), hub_id[0].strip()
        folder, name = folder_of(model[0], hub_name, download[0]), hub_name if model[0] == HUB else model[0]
        reporter = Reporter(len(pictures) * max_tokens[0])
        try:
            replies, new = describe(pictures, folder, prompt[0], max_tokens[0], batch[0], reporter)
        except captioner.FolderError as error:
            raise ValueError(f"The model {name} {error}") from error
        tidied = [captions.tidy(reply) for reply in replies]
        made = [captions.strip(caption, style) for caption in tidied]
        counted = [f"{len(made)} captions by {name}: {new} new, {len(made) - new} known from before"]
        if changed := sum(a != b for a, b in zip(made, tidied, strict=True)):
            counted.append(f"Style words were taken out of {changed}")
        look = captions.warnings(made, token_counter(clip[0]) if clip else None)
        listed = [f"{i}. {caption}" for i, caption in enumerate(made, 1)]
        report = "\n".join([*counted, *(["Look at:", *(f"- {line}" for line in look)] if look else []), "", *listed])
        return io.NodeOutput(made, report, ui=ui.PreviewText(report))


NODES = [CaptionImages]
