"""How alike single pictures are: Style Similarity, Identity Similarity, Prompt Fidelity."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ..training import similarity
from ..training.features import Extractor
from ..training.intervals import mean_interval
from .features import CATEGORY, FeaturesType
from .metrics import CONNECTED, measure

SHARE = "R-precision"


def score_outputs() -> list:
    return [
        io.Float.Output(display_name="scores", is_output_list=True, tooltip="1 number for each picture, in order."),
        io.String.Output(display_name="report", tooltip="The mean with its 95 % interval, in words."),
        io.String.Output(display_name="json", tooltip="The same as numbers."),
    ]


def said(what: str, columns: dict[str, torch.Tensor]) -> io.NodeOutput:
    """Scores are the first column; every column's mean is said, with its 95 % interval where there are two or more."""
    parts, facts = [], {}
    for name, values in columns.items():
        facts[name] = {"mean": values.mean().item(), "values": [round(v, 6) for v in values.tolist()]}
        parts.append(f"{name} {values.mean():.4g}")
        if len(values) > 1:
            _, low, high = mean_interval(values, share=name == SHARE)
            facts[name] |= {"low": low, "high": high}
            parts[-1] += f" ({low:.4g} to {high:.4g})"
    scores = next(iter(columns.values()))
    count = "1 picture" if len(scores) == 1 else f"{len(scores)} pictures"
    line = f"{what}: {', '.join(parts)}; {count}"
    return io.NodeOutput(scores.tolist(), line, json.dumps(facts), ui=ui.PreviewText(line))


class StyleSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointStyleSimilarity",
            display_name="Style Similarity",
            category=CATEGORY,
            description="How near each picture is to the style of a reference: the cosine with the reference's mean, as CSD does it. With "
            "pictures in other styles connected, also corrected for styles that are near to everything.",
            search_aliases=["csd", "style score", "csls"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FeaturesType.Input("features", tooltip="From Load Features: CSD's weights see style; Pocket sees its own. 1 for all."),
                io.Image.Input("made", tooltip="The pictures to judge, 1 or more."),
                io.Image.Input("reference", tooltip="Pictures in the style, 10 or more make a steady mean."),
                io.Image.Input("others", optional=True, tooltip="Pictures in other styles, 10 or more, for the corrected score."),
            ],
            outputs=score_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(cls, features, made, reference, others=None) -> io.NodeOutput:
        sets = [measure(features[0], name, given, CONNECTED, False).values
                for name, given in (("made", made), ("reference", reference), ("others", others)) if given]  # fmt: skip
        columns = {"cosine": similarity.to_mean(*sets[:2])}
        if len(sets) == 3:
            columns["corrected"] = similarity.csls(*sets)
        return said(f"Style similarity, as {features[0].name} sees it", columns)


class IdentitySimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        masks = "1 mask for each picture, white where the object is; without masks whole pictures are compared."
        return io.Schema(
            node_id="CounterpointIdentitySimilarity",
            display_name="Identity Similarity",
            category=CATEGORY,
            description="Whether pictures show the same object: each is cut out by its mask, put on grey, and compared with every reference. "
            "DINO tells objects apart better than CLIP.",
            search_aliases=["dino score", "subject fidelity", "same object"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FeaturesType.Input("features", tooltip="From Load Features: DINOv2 is usual; 1 for all."),
                io.Image.Input("made", tooltip="The pictures to judge, 1 or more."),
                io.Image.Input("reference", tooltip="1 or more pictures of the object."),
                io.Mask.Input("made_masks", optional=True, tooltip=masks),
                io.Mask.Input("reference_masks", optional=True, tooltip=masks),
            ],
            outputs=score_outputs(),
        )

    @classmethod
    def execute(cls, features, made, reference, made_masks=None, reference_masks=None) -> io.NodeOutput:
        sets = [
            measure(features[0], name, cut_out(name, images, masks), CONNECTED, False).values
            for name, images, masks in (("made", made, made_masks), ("reference", reference, reference_masks))
        ]
        cosines = similarity.to_each(*sets)
        return said(
            f"Identity, as {features[0].name} sees it", {"mean cosine": cosines.mean(1), "nearest": cosines.amax(1)}
        )


def cut_out(name: str, images: list[torch.Tensor], masks: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Single pictures, cut out by their masks where there are any."""
    singles = [picture for batch in images for picture in batch.split(1)]
    if not masks:
        return singles
    flat = [mask for batch in masks for mask in batch.split(1)]
    if len(flat) != len(singles):
        raise ValueError(
            f"There are {len(flat)} masks for the {len(singles)} pictures of {name!r}: give 1 each, or none."
        )
    return [similarity.cut_out(image, mask) for image, mask in zip(singles, flat, strict=True)]


class PromptFidelity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointPromptFidelity",
            display_name="Prompt Fidelity",
            category=CATEGORY,
            description="How well pictures show what their prompts say: the CLIP score, and in how many cases a picture's own prompt is "
            "nearer to it than 99 others (R-precision).",
            search_aliases=["clip score", "r-precision", "prompt adherence", "text alignment"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                FeaturesType.Input("features", tooltip="1 that reads as well as sees: Pocket, or a CLIP folder in models/features."),
                io.Image.Input("images", tooltip="The pictures, 1 or more."),
                io.String.Input("captions", force_input=True, tooltip="What each was asked for: 1 caption each, or 1 for all."),
                io.Int.Input("seed", default=0, min=0, max=2**31, control_after_generate=False, advanced=True,
                             tooltip="Draws the 99 other captions."),
            ],
            outputs=score_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(cls, features, images, captions, seed) -> io.NodeOutput:
        (extractor,), singles = features[:1], [picture for batch in images for picture in batch.split(1)]
        captions, texts = read_captions(extractor, captions, len(singles))
        seen = measure(extractor, "images", singles, CONNECTED, False).values
        columns = {"CLIP score": similarity.clip_scores(seen, texts)}
        if len(set(captions)) > 1:
            columns[SHARE] = similarity.found(seen, texts, captions, seed[0])
        return said(f"Prompt fidelity, as {extractor.name} sees it", columns)


def read_captions(extractor: Extractor, captions: list[str], count: int) -> tuple[list[str], torch.Tensor]:
    """One caption for each of `count` pictures, and what the extractor reads in them (count, d), each text once.

    Raises ValueError where it cannot read, or the numbers differ.
    """
    if extractor.texts is None:
        raise ValueError(f"{extractor.name} sees and cannot read: choose Pocket in Load Features, or a CLIP folder.")
    captions = captions * count if len(captions) == 1 else captions
    if len(captions) != count:
        raise ValueError(f"There are {len(captions)} captions for {count} pictures: give 1 each, or 1 for all.")
    distinct = list(dict.fromkeys(captions))
    read = dict(zip(distinct, extractor.texts(distinct).float().cpu(), strict=True))
    return captions, torch.stack([read[c] for c in captions])


NODES = [StyleSimilarity, IdentitySimilarity, PromptFidelity]
