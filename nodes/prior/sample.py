"""Sample Prior: from text to image embeddings."""

from __future__ import annotations

import copy
from dataclasses import replace

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy_api.latest import io, ui

from ...training.prior.prior import Prior, Sampling, sampled, steps_of
from ...training.prior.samplers import SAMPLERS
from ..progress import Reporter
from .embedding import ImageEmbedding, vector
from .pairs import CATEGORY
from .text import identity, text_of
from .train import PriorType, on_device

BETWEEN = 1_000_003  # seeds from one candidate to the next
PRIORS = {  # which serve a model, by the numbers that it takes
    768: "the prior of Karlo or of Kandinsky 2.1",
    1024: "a prior that was trained on ViT-H's embeddings",
    1280: "the prior of Kandinsky 2.2",
}


class SamplePrior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointSamplePrior",
            display_name="Sample Prior",
            category=CATEGORY,
            description="Makes image embeddings from a text: what a picture of it might look like to a CLIP. To unCLIPConditioning, an "
            "IP-Adapter, or Apply Image Tokens.",
            search_aliases=["unclip", "text to image embedding", "revision", "prior"],
            inputs=[
                PriorType.Input("prior", tooltip="From Train Prior or Load Prior; 1 prior."),
                io.Clip.Input("clip", tooltip="The CLIP that the prior was trained with; 1 CLIP."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What the picture shows. Of more than 77 tokens the first 77 are read; weights such as (red:1.3) are plain characters."),
                io.String.Input("negative", multiline=True, default="", tooltip="What guidance leads away from; empty is the usual 1."),
                io.Int.Input("count", default=1, min=1, max=1024, tooltip="How many embeddings; each makes another picture. 1 and up."),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=True, tooltip="Embedding i uses seed + i, counted from 0."),
                io.Int.Input("steps", default=8, min=1, max=200, tooltip="8 are enough with dpm++ 2m; 25 for Kandinsky's and Karlo's own ancestral."),
                io.Combo.Input("sampler", options=list(SAMPLERS), default="dpm++ 2m", tooltip="dpm++ 2m for 4 to 16 steps. ddim is Euler for a prior of the flow schedule. ancestral needs 25."),
                io.Float.Input("guidance", default=1.5, min=1.0, max=20.0, step=0.1, tooltip="1 is none and half the work; 1.5 follows the text more closely; 4, as usual for Kandinsky, gives embeddings that are too long and too alike."),
                io.Float.Input("guide_to", default=1.0, min=0.0, max=1.0, step=0.05, advanced=True, tooltip="Share of the steps after which guidance stops: 1 never, 0.8 keeps lengths nearer to real ones."),
                io.Float.Input("guide_from", default=0.0, min=0.0, max=1.0, step=0.05, advanced=True, tooltip="Share of the steps before which there is no guidance; 0 is from the first."),
                io.Int.Input("best_of", default=1, min=1, max=64, advanced=True, tooltip="Draw so many for each embedding and keep the 1 that its text is nearest to; the text and the picture encoder must be of one CLIP."),
                io.ClipVisionOutput.Input("image", optional=True, tooltip="Make variations of this picture: 1 CLIP_VISION_OUTPUT of core's CLIP Vision Encode, or an image embedding."),
                io.Float.Input("variation", default=0.6, min=0.01, max=1.0, step=0.01, tooltip="With an image: 0.1 hardly changes it, 1 forgets it."),
                io.Model.Input("model", optional=True, tooltip="The 1 model that shall paint, only to check before anything is made that it takes these embeddings; nothing is done to it."),
            ],
            outputs=[
                io.ClipVisionOutput.Output(display_name="embeddings", is_output_list=True, tooltip="1 for each seed, as a list, so that unCLIP does not sum them."),
                io.ClipVisionOutput.Output(display_name="mean", tooltip="The mean of all: 1 embedding, the safest guess, without variety."),
                io.String.Output(display_name="report", tooltip="Lengths and likeness of what was made."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, prior, clip, prompt, negative, count, seed, steps, sampler, guidance, guide_to, guide_from, best_of, variation,
        image=None, model=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_taken(model, prior)
        check_read(prior, clip)
        read = text_of(clip, [prompt, negative], prior.network.shape.text_dim)
        start = varied(image, prior)
        how = Sampling(steps, sampler, guidance, guide_from, guide_to, 1.0 if start is None else variation)
        seeds = [seed + i + BETWEEN * n for i in range(count) for n in range(best_of)]
        made = draw(prior, read.texts.rows([0]), read.texts.rows([1]), seeds, how, start)
        if best_of > 1:
            made = best(made.view(count, best_of, -1), read.texts.pooled[:1])
        facts = {"prompt": prompt, "negative": negative, "steps": steps, "sampler": sampler, "guidance": guidance}
        found = [ImageEmbedding(x, prior.image, prior.space, {**facts, "seed": seed + i}) for i, x in enumerate(made)]
        warnings = (
            read.warnings if prompt.strip() else ["The prompt is empty, so these are of any picture.", *read.warnings]
        )
        report = " ".join([said(prior, made), *warnings])
        mean = ImageEmbedding(made.mean(0), prior.image, prior.space, {**facts, "mean of": count, "seed": seed})
        return io.NodeOutput(found, mean, report, ui=ui.PreviewText(report))


def taken_by(model) -> int | None:
    """How many numbers the image embedding has that a MODEL takes from unCLIPConditioning; None where it takes none."""
    if augmentor := getattr(model.model, "noise_augmentor", None):  # SD 2.1 unCLIP; SDXL and its refiner (ReVision)
        return augmentor.time_embed.dim
    mapper = getattr(model.model.diffusion_model, "clip_img_mapper", None)  # Stable Cascade, stage C
    return None if mapper is None else mapper.in_features


def check_taken(model, prior: Prior) -> None:
    """Raises ValueError where the model that is to paint does not take what the prior makes."""
    if model is None:
        return
    kind, wanted = type(model.model.model_config).__name__, taken_by(model)
    if wanted is None:
        raise ValueError(
            f"This model ({kind}) takes no image embedding: use SD 2.1 unCLIP, SDXL (ReVision) or Stable Cascade's stage C, or give the "
            "embedding to Apply Image Tokens or to an IP-Adapter and leave the input model empty."
        )
    if wanted != prior.dim:
        raise ValueError(
            f"This prior makes embeddings of {prior.dim} numbers ({prior.space or 'of a CLIP it does not name'}) and this model ({kind}) "
            f"takes {wanted}: use {PRIORS.get(wanted, f'a prior of {wanted} numbers')}."
        )


def check_read(prior: Prior, clip) -> None:
    """Raises ValueError where the prior was trained with another text encoder."""
    if prior.text and prior.text != identity(clip, prior.network.shape.text_dim):
        raise ValueError(
            f"This prior was trained with another text encoder (its pictures were seen by {prior.space or 'one it does not name'}): connect the "
            "CLIP that went into Embed Pairs, without a LoRA on it."
        )


def varied(image, prior: Prior) -> torch.Tensor | None:
    """(1, d) of the picture to vary, if there is one. Raises ValueError where the prior makes embeddings of another CLIP."""
    if image is None:
        return None
    found, own = vector(image, prior.dim, "The picture to vary"), getattr(image, "image", "")
    if own and prior.image and own != prior.image:
        raise ValueError(
            f"The picture to vary was seen by another CLIP ({getattr(image, 'space', '') or own}) than the prior makes embeddings of "
            f"({prior.space or prior.image}): see it with that one."
        )
    return found


def draw(prior: Prior, texts, negative, seeds: list[int], how: Sampling, image: torch.Tensor | None) -> torch.Tensor:
    """(len(seeds), d) of one text, with progress and interruption at each step."""
    reporter = Reporter(steps_of(prior, how, len(seeds)))

    def tell(step: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        reporter.bar.update_absolute(step)

    prior = computed(prior)
    with on_device(prior.network):
        return sampled(prior, texts, negative, seeds, how, image, tell)[0]


def computed(prior: Prior) -> Prior:
    """In the precision that core would compute a model of these weights in; on a CPU half precision is slow."""
    kept = next(prior.network.parameters()).dtype
    cast = comfy.model_management.unet_manual_cast(kept, comfy.model_management.get_torch_device())
    return prior if cast is None else replace(prior, network=copy.deepcopy(prior.network).to(cast))


def best(made: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(count, n, d) -> (count, d): of each n that which the text (1, d) is nearest to by cosine."""
    if made.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"best_of asks which embedding is nearest to the text, and the text has {text.shape[-1]} numbers and the embedding "
            f"{made.shape[-1]}: they lie in different spaces, so set best_of to 1."
        )
    chosen = F.cosine_similarity(made, text.to(made), dim=-1).argmax(1)
    return made[torch.arange(len(made)), chosen]


def said(prior: Prior, made: torch.Tensor) -> str:
    """How long they are beside real ones, and how much they differ."""
    norm = prior.start.norm
    usual = (norm.mean.square().sum() + norm.std.square().sum()).sqrt()
    text = f"{len(made)} of {made.shape[1]} numbers, {(made.norm(dim=1).mean() / usual).item():.2f} times as long as real ones"
    if prior.one_shot:
        return f"{text}; one shot: the mean of what the text may look like, without variety."
    if len(made) > 1:
        white = norm.whitened(made)
        text += f", variance {white.var(0).mean().item():.2f} of that of all pictures"
    return f"{text}."


NODES = [SamplePrior]
