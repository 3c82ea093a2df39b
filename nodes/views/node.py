"""Views of a Mesh, Draw Correspondences, Feature Warp."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from . import sources
from .correspondences import Correspondences, at_most, found, from_depth, sampled
from .drawing import lines, to_tensor
from .geometry import Camera, orbit, read_camera
from .patch import FEATURES, LATENTS, MODES, with_feature_warp
from .raster import Solid, read_mesh, render
from .sources import CATEGORY, CorrespondencesType

MEASURED, TOLERANCE = 128, 0.01  # as the nodes that find correspondences have it


class ViewsOfAMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        angle = {"min": -360.0, "max": 360.0, "step": 5.0}
        return io.Schema(
            node_id="CounterpointViewsOfAMesh",
            display_name="Views of a Mesh",
            category=CATEGORY,
            description="Looks at a 3D model from several sides: pictures, depth for a ControlNet, masks, and which point is which. Nothing has "
            "to be compiled, and no graphics card is needed.",
            is_experimental=True,
            search_aliases=["render mesh", "rasterizer", "turntable", "multi view", "syncd", "depth from mesh"],
            inputs=[
                io.Mesh.Input("mesh", tooltip="1 object with faces; its vertex colours or texture, else it is shaded grey."),
                io.Int.Input("views", default=3, min=2, max=32, tooltip="How many sides it is seen from: 3 as in SynCD."),
                io.Float.Input("first", default=-30.0, **angle, tooltip="Where the first camera stands, in degrees around the object: 0 is in front."),
                io.Float.Input("last", default=30.0, **angle, tooltip="Where the last stands; a whole turn is 0 to 360. Near views have more in common."),
                io.Float.Input("elevation", default=20.0, min=-89.0, max=89.0, step=5.0, tooltip="How high they stand, in degrees: 20 looks down a little."),
                io.Float.Input("fov", default=35.0, min=5.0, max=120.0, step=5.0, advanced=True,
                               tooltip="Vertical field of view in degrees: 35 is a usual lens. The object always just fits in."),
                io.Int.Input("width", default=512, min=64, max=4096, step=8, tooltip="Pixels: 512 for SD 1.5, 1024 for SDXL and FLUX."),
                io.Int.Input("height", default=512, min=64, max=4096, step=8, tooltip="Pixels: 512 for SD 1.5, 1024 for SDXL and FLUX."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="1 picture for each view, on black."),
                io.Image.Output(display_name="depth", tooltip="White is near and black far: for a ControlNet, 1 for each view."),
                io.Mask.Output(display_name="masks", tooltip="1 where the object is."),
                io.Image.Output(display_name="coordinates", tooltip="Which point each pixel shows, as a colour: 1 colour, 1 point."),
                io.Load3DCamera.Output(display_name="cameras", is_output_list=True, tooltip="1 for each view."),
                CorrespondencesType.Output(display_name="correspondences", tooltip="Which point is which, for all 2 or more views: to Feature Warp."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, mesh, views, first, last, elevation, fov, width, height) -> io.NodeOutput:
        solid = read_mesh(mesh)
        low, high = solid.box()
        if not (high - low).max() > 0:
            raise ValueError("The MESH is a single point: give one with a surface.")
        centre, side = (low + high) / 2, float((high - low).max())
        radius = float((solid.vertices[solid.faces.unique()] - centre).norm(dim=1).max())
        infos = orbit(angles(views, first, last), elevation, fov, width / height, centre, radius)
        cameras = [read_camera(info) for info in infos]
        images, depth, masks, coordinates = seen(solid, cameras, height, width)
        near, far = ([getattr(c, k) for c in cameras] for k in ("near", "far"))
        near, far = (torch.tensor(k)[:, None, None] for k in (near, far))
        grey = torch.where(masks, 1 - (depth - near) / (far - near), 0.0).clamp(0, 1).float()
        places = torch.where(masks[..., None], (coordinates - centre) / side + 0.5, 0.0).clamp(0, 1).float()
        small = at_most(height, width, MEASURED)
        matches = from_depth(sampled(depth, *small), cameras, sampled(masks, *small), TOLERANCE)
        return io.NodeOutput(images, grey[..., None].repeat(1, 1, 1, 3), masks.float(), places, infos, matches)


def angles(views: int, first: float, last: float) -> list[float]:
    """Evenly from first to last; around a whole turn the last is not the first again."""
    steps = views if abs(last - first) >= 360 else views - 1
    return [first + (last - first) * n / steps for n in range(views)]


def seen(solid: Solid, cameras: list[Camera], height: int, width: int) -> list[torch.Tensor]:
    """Pictures, depth, masks and coordinates of all views; can be stopped between two."""
    bar, rendered = comfy.utils.ProgressBar(len(cameras)), []
    for camera in cameras:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rendered.append(render(solid, camera, height, width))
        bar.update(1)
    return [torch.stack([getattr(view, k) for view in rendered]) for k in ("picture", "depth", "mask", "coordinates")]


class DrawCorrespondences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointDrawCorrespondences",
            display_name="Draw Correspondences",
            category=CATEGORY,
            description="Shows which point of one view is which of the next, as coloured lines: look here before you warp.",
            is_experimental=True,
            is_input_list=True,
            is_output_node=True,
            search_aliases=["matches", "lines", "show correspondences"],
            inputs=[
                io.Image.Input("images", tooltip="1 picture for each view, in the same order: a batch or a list."),
                CorrespondencesType.Input("correspondences", tooltip="Of the same 2 or more views."),
                io.Int.Input("most", default=30, min=1, max=1000, tooltip="Lines between two views, chosen evenly: 30 can be followed by eye."),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="1 picture with all views side by side.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, correspondences, most) -> io.NodeOutput:
        pictures, matches = [picture for batch in images for picture in batch], one(correspondences)
        if len(pictures) != matches.views:
            raise ValueError(
                f"There are {len(pictures)} pictures and correspondences of {matches.views} views: give the same views to both."
            )
        found(matches, "there is nothing to draw. Choose views nearer to each other, or a larger tolerance")
        out = to_tensor(lines(pictures, matches, most[0]))
        return io.NodeOutput(out, ui=ui.PreviewImage(out, cls=cls))


def one(given: list[Correspondences]) -> Correspondences:
    if len(given) != 1:
        raise ValueError(f"There are {len(given)} correspondences: give 1, of all views together.")
    return given[0]


class FeatureWarp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        share = {"min": 0.0, "max": 1.0, "step": 0.05}
        return io.Schema(
            node_id="CounterpointFeatureWarp",
            display_name="Feature Warp",
            category=CATEGORY,
            description="Makes the pictures of one batch agree where they show the same point of an object, while they are painted. Any sampler; "
            "put it between the model and the sampler, with Shared Attention and ControlNet if you like.",
            is_experimental=True,
            search_aliases=["syncd", "multi view consistency", "same object", "warp latents"],
            inputs=[
                io.Model.Input("model", tooltip="1 MODEL, which does not change: SD 1.5, SD 2, SDXL, SD 3, FLUX, Qwen-Image, Pocket; for latents any."),
                CorrespondencesType.Input("correspondences", tooltip="Of as many views as pictures are painted in 1 batch, in the same order."),
                io.Float.Input("strength", default=1.0, **share, tooltip="1: a point of a later view is that of the first that sees it; 0.5: half of each; 0: off."),
                io.Float.Input("start", default=0.0, **share, advanced=True, tooltip="Share of the way from pure noise after which it begins: 0 is from the first step."),
                io.Float.Input("end", default=0.6, **share, tooltip="Share of the way from pure noise after which it stops: 0.2 as in SynCD, 1 agrees most and has hard borders. KSampler's denoise 0.75 begins at 0.25."),
                io.Combo.Input("mode", options=list(MODES), default=LATENTS,
                               tooltip=f"{FEATURES}: what attention reads, as in the paper. {LATENTS}: the picture itself, as in its released code; stronger, any model. 1 of 2."),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="To the sampler, with all views in 1 batch.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, correspondences, strength, start, end, mode) -> io.NodeOutput:
        return io.NodeOutput(with_feature_warp(model, correspondences, strength, start, end, mode))


NODES = [ViewsOfAMesh, *sources.NODES, DrawCorrespondences, FeatureWarp]
