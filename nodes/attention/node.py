"""Shared Attention: one object in several pictures; Subject Mask: where the words of the prompt showed it."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..bridge import native_size
from .patch import FIRST_STEP, KEY, LAYERS, POSITIONS, How, found_masks, with_shared_attention

CATEGORY = "Counterpoint/attention"


class SharedAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSharedAttention",
            display_name="Shared Attention",
            category=CATEGORY,
            description="Pictures that are painted in one batch look at each other's subject while they are painted, so that it is the same "
            "object in all of them, each in a scene of its own. Any sampler; put it between the model and the sampler.",
            is_experimental=True,
            search_aliases=["consistent character", "same object", "syncd", "consistory", "story diffusion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="1 MODEL, which does not change: SD 1.5, SD 2, SDXL, SD 3, FLUX.1, FLUX.2, Qwen-Image, Z-Image, Pocket.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the subject will be: 1 for each picture of the batch, or 1 for all. Without masks it is found while "
                    "painting, from the words that Prompt per Picture names as subject; without these whole pictures are shared, and the "
                    "scenes become alike too.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much the subjects of other pictures weigh: 1 as much as the picture's own tokens, 0 nothing (the pictures "
                    "are those of the model without this node), 2 twice as much.",
                ),
                _share(
                    "start",
                    0.0,
                    "Share of the sampling after which pictures begin to look at each other: 0 is from the first step.",
                ),
                _share("end", 1.0, "Share of the sampling after which they stop: 1 is never."),
                io.Int.Input(
                    "per_set",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Pictures of one set, where a batch holds several sets, one after the other: 0 makes the whole batch one set.",
                ),
                io.Int.Input(
                    "anchors",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Only the first so many pictures of a set are looked at: 0 is all. 1 or 2 cost less in large sets, and what "
                    "comes after them follows.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="all",
                    advanced=True,
                    tooltip="Where in the model: all, as published, or the second half, where the layout is settled: it costs less, and the "
                    "pictures are less alike. In a UNet these are its output blocks. 2 choices.",
                ),
                io.Combo.Input(
                    "first_step",
                    options=list(FIRST_STEP),
                    default="auto",
                    advanced=True,
                    tooltip="What is shared in step 1: auto is the subject where masks say what it is, else the whole picture, as published.",
                ),
                _share(
                    "dropout",
                    0.0,
                    "Share of a subject's tokens that is left out, drawn anew for each step: 0.5 makes poses differ more.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITIONS),
                    default="auto",
                    advanced=True,
                    tooltip="Where the subjects of other pictures seem to lie, in FLUX, Qwen-Image and Z-Image: below the picture, 1 height for "
                    "each, as published; where reference pictures lie (auto for FLUX.2); or in place, which copies the pose.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="To the sampler, with all pictures in 1 batch.")],
        )

    @classmethod
    def execute(
        cls, model, strength, start, end, per_set, anchors, layers, first_step, dropout, positions, masks=None
    ) -> io.NodeOutput:
        how = How(start, end, strength, layers, first_step, anchors, per_set, dropout, positions)
        shared = with_shared_attention(model, masks, how)
        return io.NodeOutput(shared, ui=ui.PreviewText(_cost(model, masks, how)))


def _share(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, advanced=True, tooltip=tooltip)


def _cost(model, masks: torch.Tensor | None, how: How) -> str:
    """How many keys each picture gets, before anything is painted."""
    if how.strength == 0:
        return "Nothing is shared at strength 0."
    size = native_size(model)
    tokens = (size // 16) ** 2
    if masks is None:
        return (
            f"At {size} x {size} each picture sees its own {tokens} tokens and, of each other, those of the subject that the prompts name; all "
            f"{tokens} where none is named."
        )
    share = (masks > 0.5).float().mean().item() * (1 - how.dropout)
    return (
        f"The masks show {100 * share:.0f} % of a picture: at {size} x {size} each sees its own {tokens} tokens and about "
        f"{round(share * tokens)} of each other picture."
    )


class SubjectMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSubjectMask",
            display_name="Subject Mask",
            category=CATEGORY,
            description="Where the words of the prompt showed the subject while these latents were painted: what Shared Attention found by "
            "itself, for you to look at, to mend, or to give it as masks the next time.",
            is_experimental=True,
            search_aliases=["attention map", "cross attention mask", "daam"],
            inputs=[
                io.Model.Input("model", tooltip="The 1 MODEL that painted them, from Shared Attention without masks."),
                io.Latent.Input(
                    "latents",
                    tooltip="What the sampler made of it, not changed since; the last 8 samplings are remembered.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    tooltip="Pixels of the masks' longer side: 0 is that of the pictures.",
                ),
            ],
            outputs=[io.Mask.Output(display_name="masks", tooltip="1 for each picture, white where the subject is.")],
        )

    @classmethod
    def execute(cls, model, latents, size) -> io.NodeOutput:
        if model.get_attachment(KEY) is None:
            raise ValueError("This MODEL did not come from Shared Attention: connect the one that went to the sampler.")
        masks = found_masks(model, latents["samples"])
        if masks is None:
            raise ValueError(
                "No subject was looked for in these latents: leave Shared Attention's masks empty, name the subject in Prompt per Picture, "
                "and connect the sampler's own output."
            )
        scale = model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = (side * scale for side in latents["samples"].shape[-2:])
        scale = size / max(height, width) if size else 1.0
        fitted = torch.nn.functional.interpolate(
            masks[:, None], size=(round(height * scale), round(width * scale)), mode="nearest-exact"
        )
        shown = 100 * masks.mean().item()
        empty = int((masks.flatten(1).sum(1) == 0).sum())
        said = f"{len(masks)} masks, {shown:.0f} % white" + (f"; in {empty} nothing was found" if empty else "")
        return io.NodeOutput(fitted[:, 0], ui=ui.PreviewText(said))


NODES = [SharedAttention, SubjectMask]
