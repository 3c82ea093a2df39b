"""Pocket on the canvas: the little models, pictures of their world, and the judge of both."""

from __future__ import annotations

import json
import math

import torch
from comfy_api.latest import io, ui

from ..training.intervals import wilson
from ..training.pocket import grammar
from ..training.pocket.painter import FOCAL, RAISED, eyes, paint
from ..training.pocket.world import ATTRIBUTES, FACTORS, HELD_OUT, MEDIUMS, SIZE, Scenes, sample_scenes
from . import pocket_models
from .views.geometry import looking_at

CATEGORY = "Counterpoint/start"
ANY = "any"
NEAREST, FARTHEST = 2.0, 12.0  # world units; white and black in a picture of depth
WIDEST = 2.4  # object units from one end of a coordinate's colours to the other
# What a style can be called in a menu: the ten named mediums, then the six that the grammar has no word for.
STYLES = {**MEDIUMS, **{f"held out: {grammar.factor_words(c)}": c for c in HELD_OUT}}


class LoadPocketModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointLoadPocketModels",
            display_name="Load Pocket Models",
            category=CATEGORY,
            description="The small models that come with Counterpoint: 128 x 128 pictures of coloured objects in ten styles, with no "
            "download. Stock nodes work on them; swap this node for your own checkpoint loader when the graph does what you want.",
            search_aliases=["toy model", "tiny model", "counterpoint", "checkpoint loader"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="Paints 128 x 128 pictures; CFG 3 and 20 euler steps are its defaults.",
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="Knows about 90 words: 8 shapes, 8 colours, 6 patterns, 6 places, 10 styles.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="128 x 128 pixels to 16 x 16 latents and back."),
                io.ClipVision.Output(display_name="CLIP_VISION", tooltip="Sees 128 x 128 pictures; 128 numbers each."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            pocket_models.load_model(), pocket_models.load_clip(), pocket_models.load_vae(), pocket_models.load_vision()
        )


def _menu(attribute: str) -> list[str]:
    return [ANY, *ATTRIBUTES[attribute]]


def _fixed(**chosen: str) -> dict[str, int]:
    return {k: ATTRIBUTES[k].index(v) for k, v in chosen.items() if v != ANY}


class PocketPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointPocketPictures",
            display_name="Pocket Pictures",
            category=CATEGORY,
            description="Paints pictures of Pocket's little world with exact captions, masks and depth: a training set made on the spot.",
            search_aliases=["synthetic dataset", "toy dataset"],
            inputs=[
                io.Int.Input("count", default=16, min=1, max=1000, tooltip="How many pictures, about 0.02 s each."),
                io.Combo.Input(
                    "style",
                    options=[ANY, *STYLES],
                    default=next(iter(STYLES)),
                    tooltip="The style they are all in. The held-out ones were never shown to the models: they are there to be learned.",
                ),
                io.Combo.Input(
                    "shape", options=_menu("shape"), default=ANY, tooltip="One shape for all, or any of the 8."
                ),
                io.Combo.Input(
                    "colour", options=_menu("colour"), default=ANY, tooltip="One colour for all, or any of the 8."
                ),
                io.Combo.Input(
                    "pattern",
                    options=_menu("pattern"),
                    default=ANY,
                    tooltip="One surface pattern for all, or any of the 6.",
                ),
                io.Combo.Input(
                    "background",
                    options=_menu("background"),
                    default=ANY,
                    tooltip="One place for all, or any of the 6.",
                ),
                io.Combo.Input(
                    "captions",
                    options=["content", "content and style", "varied"],
                    default="content",
                    tooltip="content: what is in the picture and nothing about its style, as for training a style. varied: the ways "
                    "Pocket's text encoder was taught, about 20 % with something left out.",
                ),
                io.Int.Input(
                    "seed",
                    default=1,
                    min=0,
                    max=2**31,
                    control_after_generate=False,
                    tooltip="The same seed paints the same pictures, 0 and up.",
                ),
                io.Int.Input(
                    "same_object",
                    default=0,
                    min=0,
                    max=2**31,
                    optional=True,  # graphs saved before it was there go on as they are
                    control_after_generate=False,
                    tooltip="0: every picture shows another object. 1 and up: all show one and the same, with one shape, colour and "
                    "pattern, in different places, views and light; another number is another object.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="One picture of 128 x 128 each."),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="One caption for each picture."),
                io.Mask.Output(display_name="masks", is_output_list=True, tooltip="1 where the object is."),
                io.Image.Output(
                    display_name="depth",
                    is_output_list=True,
                    tooltip="Near is white, far is black, over 2 to 12 world units.",
                ),
                io.Load3DCamera.Output(
                    display_name="cameras",
                    is_output_list=True,
                    tooltip="1 for each picture, in the frame of its object: with same_object, views of 1 object.",
                ),
                io.Image.Output(
                    display_name="coordinates",
                    is_output_list=True,
                    tooltip="Which point of the object each pixel shows, as a colour: 1 colour, 1 point. Black beside it.",
                ),
            ],
        )

    @classmethod
    def execute(cls, count, style, shape, colour, pattern, background, captions, seed, same_object=0) -> io.NodeOutput:
        fixed = _fixed(shape=shape, colour=colour, pattern=pattern, background=background)
        if same_object:
            one = sample_scenes(1, same_object)
            fixed = {k: getattr(one, k).item() for k in ("shape", "colour", "pattern", "instance")} | fixed
        if style != ANY:
            fixed |= dict(zip(FACTORS, STYLES[style], strict=True))
        scenes = sample_scenes(count, seed, **fixed)
        said = {
            "content": lambda i: grammar.content(scenes, i),
            "content and style": lambda i: (
                f"{grammar.content(scenes, i)}, {grammar.factor_words(scenes.combination(i))}"
            ),
            "varied": grammar.captions(scenes, seed).__getitem__,
        }[captions]
        painting = [paint(scenes[i : i + 50]) for i in range(0, count, 50)]
        images = torch.cat([p.image for p in painting]).movedim(1, -1)
        masks = torch.cat([p.mask for p in painting])
        depth = torch.cat([p.depth for p in painting])
        depth = 1 - ((depth - NEAREST) / (FARTHEST - NEAREST)).clamp(0, 1)
        depth = depth[..., None].expand(-1, -1, -1, 3)
        shown = right_handed(torch.cat([p.coordinates for p in painting]).movedim(1, -1)) / WIDEST + 0.5
        shown = shown.clamp(0, 1) * (masks > 0.5)[..., None]
        return io.NodeOutput(
            [i[None] for i in images],
            [said(i) for i in range(count)],
            [m[None] for m in masks],
            [d[None].contiguous() for d in depth],
            cameras(scenes),
            [c[None] for c in shown],
        )


def right_handed(points: torch.Tensor) -> torch.Tensor:
    """(..., 3) of the painter, whose Z goes into the picture, as ComfyUI's cameras have it."""
    return points * torch.tensor([1.0, 1.0, -1.0])


def cameras(scenes: Scenes) -> list[dict]:
    """LOAD3D_CAMERAs in units of each scene's object. What they call near and far is along the ray, as the depth is."""
    positions, ways = map(right_handed, eyes(scenes))
    whole = {"fullWidth": SIZE, "fullHeight": SIZE, "width": SIZE, "height": SIZE, "offsetX": 0, "offsetY": RAISED}
    fov = 2 * math.degrees(math.atan(1 / FOCAL))
    return [
        looking_at(position, position + way, fov, NEAREST / scale, FARTHEST / scale, view=whole)
        for position, way, scale in zip(positions, ways, scenes.scale.tolist(), strict=True)
    ]


class PocketJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointPocketJudge",
            display_name="Pocket Judge",
            category=CATEGORY,
            description="Says what it sees in pictures of Pocket's world: how many show the style you were after, and how many show "
            "the object that happened to be in the training pictures. It only knows Pocket's world.",
            search_aliases=["classifier", "leak", "measure style"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Pictures to look at: a batch, a list, or both; 64 or more give a figure worth having.",
                ),
                io.Combo.Input(
                    "style",
                    options=[ANY, *STYLES],
                    default=ANY,
                    tooltip="The style they should be in: 3 factors are compared.",
                ),
                io.Combo.Input(
                    "object",
                    options=_menu("shape"),
                    default=ANY,
                    tooltip="The object that should NOT have been learned with the style; by chance it shows in 1 of 8 pictures.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    tooltip="What the line is called in the report, for example: contrastive, token alone.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="One line in words, with 95 % intervals."),
                io.String.Output(display_name="json", tooltip="The same as numbers."),
            ],
        )

    @classmethod
    def execute(cls, images, style, object, label) -> io.NodeOutput:
        pictures = torch.cat([pocket_size(batch) for batch in images])
        seen = pocket_models.load_judge().see(pictures)
        rows: dict[str, torch.Tensor] = {}
        if style[0] != ANY:
            rights = {f: seen[f] == v for f, v in zip(FACTORS, STYLES[style[0]], strict=True)}
            rows |= {"style (all three)": torch.stack(list(rights.values())).all(0), **rights}
        if object[0] != ANY:
            rows[f"shows a {object[0]}"] = seen["shape"] == ATTRIBUTES["shape"].index(object[0])
        if not rows:
            common = {k: ATTRIBUTES[k][int(v.mode().values)] for k, v in seen.items() if k in ATTRIBUTES}
            text = "most often: " + ", ".join(f"{k} {v}" for k, v in common.items())
            return _said(label[0], len(pictures), text, common)
        shares = {k: (v.float().mean().item(), *wilson(int(v.sum()), len(v))) for k, v in rows.items()}
        text = ", ".join(
            f"{k} {100 * p:.0f} % ({100 * low:.0f} to {100 * high:.0f})" for k, (p, low, high) in shares.items()
        )
        return _said(label[0], len(pictures), text, shares)


def _said(label: str, n: int, text: str, facts: dict) -> io.NodeOutput:
    line = f"{label + ': ' if label else ''}{text}; {n} pictures"
    return io.NodeOutput(line, json.dumps({"label": label, "pictures": n, **facts}), ui=ui.PreviewText(line))


def pocket_size(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) in 0..1 -> (B, 3, 128, 128), the smaller side fitted and the rest cropped away."""
    x = images[..., :3].movedim(-1, 1).float()
    scale = 128 / min(x.shape[-2:])
    if scale != 1:
        size = [max(128, round(s * scale)) for s in x.shape[-2:]]
        x = torch.nn.functional.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((s - 128) // 2 for s in x.shape[-2:])
    return x[:, :, top : top + 128, left : left + 128]


NODES = [LoadPocketModels, PocketPictures, PocketJudge]
