"""Prompt per Picture: each picture of a batch has a prompt of its own."""

from __future__ import annotations

import comfy.text_encoders.flux
import comfy.text_encoders.qwen_image
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from .attention.words import name_subject
from .bridge import unknown_words

READS_MASKS = (
    comfy.text_encoders.qwen_image.QwenImageTokenizer
)  # what its text is filled up with is masked in the model
FILLED_BY_MODEL, FILLED_TO = (
    comfy.text_encoders.flux.Flux2Tokenizer,
    512,
)  # zeros before the text, whatever the encoder says


def lines(texts: list[str]) -> list[str]:
    """What is typed line by line, or comes as a list; empty lines are left out."""
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def check_words(clip, prompts: list[str]) -> None:
    """Raises ValueError for the first `embedding:name` in the prompts that a CLIP does not know."""
    if unknown := unknown_words(clip, dict.fromkeys(prompts)):
        raise ValueError(
            f"The prompts say embedding:{unknown[0]}, and this CLIP does not know that word: connect Use Embedding with this name, or put "
            "the word's file into models/embeddings."
        )


def encoded_alike(clip, prompts: list[str]) -> list:
    """A conditioning for each prompt, all of one token length, filled up as the family itself does it.

    CLIP: more empty sections of 77. T5 and FLUX.2 Klein: more of their filling than their least length. FLUX.2: zeros before
    the text. Qwen-Image: what is filled up is masked. Where nothing is to be filled up a prompt is what it is alone. Raises
    ValueError where prompts differ in length and their model would read the filling as text.
    """
    tokens = _filled_up(clip, [clip.tokenize(p) for p in prompts], prompts)
    encoded = {p: clip.encode_from_tokens_scheduled(t) for p, t in zip(prompts, tokens, strict=True)}
    lengths = {p: c[0][0].shape[1] for p, c in encoded.items()}
    if isinstance(clip.tokenizer, FILLED_BY_MODEL) and max(lengths.values()) <= FILLED_TO:
        return filled_in_front([encoded[p] for p in prompts])
    shortest, longest = min(lengths, key=lengths.get), max(lengths, key=lengths.get)
    if lengths[shortest] != lengths[longest]:
        raise ValueError(
            f"{type(clip.tokenizer).__name__.removesuffix('Tokenizer')} cannot read prompts of different lengths in one batch, and "
            f"{shortest[:60]!r} has {lengths[shortest]} tokens, {longest[:60]!r} {lengths[longest]}: make all equally long by adding "
            "or leaving out words, or paint them one by one."
        )
    return [encoded[p] for p in prompts]


def _filled_up(clip, tokens: list[dict], prompts: list[str]) -> list[dict]:
    """Tokens of every prompt with as many in each encoder, where the encoder has a way to fill them up."""
    least = {}
    for key in tokens[0]:
        part = _tokenizer(clip, key)
        counts = {sum(map(len, each[key])) for each in tokens}
        fills = (getattr(part, "min_length", None) or 1) > 1 or type(clip.tokenizer) is READS_MASKS
        if len(counts) > 1 and fills and not part.pad_to_max_length:
            least[f"{part.embedding_key}_min_length"] = max(counts)
    if least:
        tokens = [clip.tokenize(p, tokenizer_options=least) for p in prompts]
    for key in tokens[0]:
        part = _tokenizer(clip, key)
        if getattr(part, "pad_to_max_length", False):
            most = max(len(each[key]) for each in tokens)
            for each in tokens:
                each[key] += part.tokenize_with_weights("") * (most - len(each[key]))
    return tokens


def _tokenizer(clip, key: str):
    """ComfyUI's tokenizer for a key of a tokenized prompt ("l", "t5xxl"...); None where it is named otherwise."""
    return getattr(clip.tokenizer, f"clip_{key}", None) or getattr(clip.tokenizer, key, None)


def filled_in_front(conditionings: list) -> list:
    """Conditionings with zeros before the shorter ones, as core's FLUX.2 puts them before every text of less than 512."""
    most = max(c[0][0].shape[1] for c in conditionings)
    return [[[F.pad(states, (0, 0, most - states.shape[1], 0)), facts] for states, facts in c] for c in conditionings]


def together(conditionings: list) -> list:
    """Conditionings of equal length as one of B rows, by stages where there are any; only what concerns a prompt is joined."""
    return [_joined(entries) for entries in zip(*conditionings, strict=True)]


def _joined(entries: tuple) -> list:
    """[(B, tokens, width), facts] of B entries [(1, tokens, width), facts] of which each may have a summary and a mask."""
    states, facts = torch.cat([states for states, _ in entries]), dict(entries[0][1])
    if facts.get("pooled_output") is not None:
        facts["pooled_output"] = torch.cat([each["pooled_output"] for _, each in entries])
    masks = [each.get("attention_mask") for _, each in entries]
    if any(mask is not None and not mask.all() for mask in masks):
        whole = torch.ones(states.shape[:2], dtype=torch.long)[:1]
        facts["attention_mask"] = torch.cat([whole.to(states.device) if mask is None else mask for mask in masks])
    return [states, facts]


class PromptPerPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointPromptPerPicture",
            display_name="Prompt per Picture",
            category="Counterpoint/attention",
            description="Gives each picture of a batch a prompt of its own: the first prompt to the first picture, and so on. Paint as many "
            "latents in 1 batch with any sampler, with Shared Attention before it to show one object in many scenes.",
            search_aliases=["batch prompts", "prompt list", "prompt schedule", "clip text encode", "per image prompt"],
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip", tooltip="Reads the prompts; from the checkpoint that paints. 1 for all."),
                io.String.Input("prompts", multiline=True, tooltip="A list of prompts, or 1 prompt per line: 1 for each picture."),
                io.String.Input("subject", default="",
                                tooltip="The words for the object that stand in every prompt, such as 'small red fox': Shared Attention without masks "
                                        "finds it by them, the better the more of its description is named. Empty names 0 words."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="1 prompt for each picture of the batch; as positive or negative."),
                io.Int.Output(display_name="count", tooltip="How many prompts there are: the batch_size of the empty latents."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, prompts, subject=("",)) -> io.NodeOutput:
        wanted, words = lines(prompts), subject[0].strip()
        if not wanted:
            raise ValueError("There are no prompts: connect a list, or type one prompt per line.")
        check_words(clip[0], wanted)
        rows = together(encoded_alike(clip[0], wanted))
        return io.NodeOutput(name_subject(rows, clip[0], wanted, words) if words else rows, len(wanted))


NODES = [PromptPerPicture]
