"""Image tokens on the canvas: put into a prompt, saved, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..training import artefact
from ..training import image_tokens as files
from ..training.embedding import check_name
from ..training.image_tokens import EMPTY, POOLED, Projector, appended
from .embedding import RUN, name_fault, source_file

CATEGORY = "Counterpoint/image tokens"
ImageTokensType = io.Custom("IMAGE_TOKENS")
FOLDER = "image_tokens"  # of ComfyUI's models folder
BEHIND = "image_tokens"  # in a conditioning: how many of its tokens are no text
EMPTY_FOLDER = "there is none: train some, or put a file into models/image_tokens"


class ApplyImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointApplyImageTokens",
            display_name="Apply Image Tokens",
            category=CATEGORY,
            description="Tells the model what a picture looks like: its embedding, as words of its own, behind the words of your prompt.",
            search_aliases=["ip-adapter", "image prompt", "unclip", "image variation", "style transfer"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="Your prompt, 1 for all pictures or 1 for each; empty to paint from the picture alone."),
                ImageTokensType.Input("image_tokens", tooltip="From Train Image Tokens or Load Image Tokens; 1 of the model's family."),
                io.ClipVisionOutput.Input("clip_vision_output", tooltip="From core's CLIP Vision Encode, with crop at center, or from Sample Prior; 1 picture, or a batch of as many as you paint."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="How much of the picture: 1 as trained, 0.5 half-way to no picture, 0 leaves everything as it was."),
                io.Float.Input("text_weight", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="How much of the prompt: 1 as it is, 0 the empty prompt, with which the tokens were trained."),
                io.Conditioning.Input("negative", optional=True, tooltip="Your negative prompt, which gets the tokens for no picture; without one the empty prompt is taken. 1 prompt."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="With the picture's tokens; to the sampler. On Pocket cfg 4 follows a little better, cfg 2 looks more like real pictures."),
                io.Conditioning.Output(display_name="negative", tooltip="With the tokens for no picture; to the sampler, or CFG paints the wrong difference."),
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="To core's Load LoRA Model at strength 1, if they were trained with a rank above 0; else it changes nothing."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, positive, image_tokens, clip_vision_output, strength, text_weight, negative=None) -> io.NodeOutput:
        embeddings = embeddings_of(clip_vision_output, image_tokens)
        positive = turned_down(positive, image_tokens, text_weight)
        if negative is None:
            negative = empty_prompt(image_tokens)
        if strength == 0:
            return io.NodeOutput(positive, negative, {})
        return io.NodeOutput(
            with_tokens(positive, image_tokens.tokens(embeddings, strength)),
            with_tokens(negative, image_tokens.nothing()),
            image_tokens.lora,
        )


def embeddings_of(output, projector: Projector) -> torch.Tensor:
    """(n, d) of a CLIP_VISION_OUTPUT of n pictures, made as in training. Raises ValueError for those of another encoder."""
    embeds, name = getattr(output, "image_embeds", None), projector.facts.get("clip_vision_name", "another")
    if embeds is None:
        raise ValueError(
            "This CLIP_VISION_OUTPUT has no embedding: take it from CLIP Vision Encode, or from Sample Prior."
        )
    embeds = embeds.mean(1) if embeds.ndim == 3 else embeds  # SigLIP's patches
    own, known = getattr(output, "image", ""), projector.facts.get("clip_vision", "")
    if embeds.shape[1] != projector.dim or (own and known and own != known):
        raise ValueError(
            f"The picture's embedding ({embeds.shape[1]} numbers) and these image tokens ({projector.dim} numbers) are of different encoders: "
            f"use the CLIP_VISION that they were trained with ({name})."
        )  # fmt: skip
    return embeds.detach()


def empty_prompt(projector: Projector) -> list:
    """What the text encoder said of no text, as core's CLIP Text Encode gives it."""
    pooled = {"pooled_output": projector.tensors[POOLED][None]} if POOLED in projector.tensors else {}
    return [[projector.tensors[EMPTY][None], pooled]]


def with_tokens(conditioning: list, tokens: torch.Tensor) -> list:
    """CONDITIONING with tokens (n, k, width) behind the text of each entry; areas, masks and summaries stay."""
    return [
        [appended(states, tokens), {**facts, BEHIND: facts.get(BEHIND, 0) + tokens.shape[1]}]
        for states, facts in conditioning
    ]


def turned_down(conditioning: list, projector: Projector, weight: float) -> list:
    """CONDITIONING on its way to the empty prompt, its summaries too."""
    if weight == 1:
        return conditioning
    made = []
    for states, facts in conditioning:
        pooled = facts.get("pooled_output")
        if pooled is not None and POOLED in projector.tensors:
            facts = {**facts, "pooled_output": torch.lerp(projector.tensors[POOLED].to(pooled), pooled, weight)}
        made.append([projector.weighted(states, weight, facts.get(BEHIND, 0)), facts])
    return made


class SaveImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSaveImageTokens",
            display_name="Save Image Tokens",
            category=CATEGORY,
            description="Writes image tokens into models/image_tokens, with their LoRA and what is known about them in the file's header. Nothing "
            "is overwritten: others under a name that is taken get a number.",
            is_output_node=True,
            inputs=[
                ImageTokensType.Input("image_tokens", tooltip="From Train Image Tokens; 1 of them."),
                io.String.Input("name", default="my-pictures", tooltip="File name without ending. 1 word of letters, digits, - _ ."),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="The name they were saved under.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name):
        return name_fault(name) or True

    @classmethod
    def execute(cls, image_tokens, name) -> io.NodeOutput:
        folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
        file = artefact.write_new(folder / f"{check_name(name)}{artefact.SUFFIX}", files.to_bytes(image_tokens))
        return io.NodeOutput(file.stem, ui=ui.PreviewText(f"Saved as {file.name} in models/{FOLDER}."))


class LoadImageTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadImageTokens",
            display_name="Load Image Tokens",
            category=CATEGORY,
            description="Saved image tokens, from models/image_tokens, or a snapshot of a training run.",
            search_aliases=["snapshot", "checkpoint", "image projection"],
            inputs=[
                io.Combo.Input(
                    "image_tokens", options=sources(), tooltip="1 file in models/image_tokens, or run: a step of a run. Press R to see new ones."
                )
            ],
            outputs=[ImageTokensType.Output(display_name="image_tokens", tooltip="To Apply Image Tokens.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, image_tokens):
        if image_tokens is None:  # a wire
            return float("nan")
        stat = find(image_tokens).stat()
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    @classmethod
    def execute(cls, image_tokens) -> io.NodeOutput:
        return io.NodeOutput(files.load(find(image_tokens)))


def sources() -> list[str]:
    """Files, then what trainings of image tokens have left."""
    saved = [f for f in folder_paths.get_filename_list(FOLDER) if f.endswith(artefact.SUFFIX)]
    root = Path(folder_paths.get_output_directory()) / "counterpoint"
    left = [
        RUN + file.relative_to(root).as_posix()
        for config in sorted(root.glob("*/config.json"))
        if {"tokens", "clip_vision"} <= json.loads(config.read_text())["config"].keys()
        for file in sorted(config.parent.glob("snapshots/*.safetensors"))
    ]
    return [*saved, *left] or [EMPTY_FOLDER]


def find(choice: str) -> Path:
    if choice == EMPTY_FOLDER:
        raise ValueError(
            "There are no image tokens yet: train some, or put a file into models/image_tokens and press R."
        )
    return source_file(choice) if choice.startswith(RUN) else Path(folder_paths.get_full_path_or_raise(FOLDER, choice))


NODES = [ApplyImageTokens, SaveImageTokens, LoadImageTokens]
