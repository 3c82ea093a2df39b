"""Correspondences from Depth, from Coordinates, from Features: three ways to know which point of one view is which of another."""

from __future__ import annotations

import torch
from comfy.model_management import throw_exception_if_processing_interrupted as stop
from comfy_api.latest import io

from .correspondences import at_most, checked_masks, found, from_coordinates, from_depth, from_features, sampled
from .geometry import Camera, along_axis, centres, read_camera

CATEGORY = "Counterpoint/views"
CorrespondencesType = io.Custom("CORRESPONDENCES")
AXIS, RAY = "along the camera's axis", "along each ray"
OTSU = 0.0
TOKENS = 8  # a CLIP_VISION has no more than these beside its patches


def one_size(what: str, given: list[torch.Tensor]) -> torch.Tensor:
    """Batches and lists (b, H, W, ...) as one batch. Raises ValueError for a single view, and for views of different sizes."""
    singles = [picture for batch in given for picture in batch.split(1)]
    if len(singles) < 2:
        raise ValueError(f"There is {len(singles)} view in {what!r}: give 2 or more of one object.")
    sizes = [tuple(single.shape[1:3]) for single in singles]
    other = next((n for n, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        (h, w), (height, width) = sizes[other], sizes[0]
        raise ValueError(
            f"View {other + 1} of {what!r} is {w} x {h} and the first {width} x {height}: make them one size."
        )
    return torch.cat(singles).float().cpu()


def read_masks(masks: list[torch.Tensor] | None, views: int, height: int, width: int) -> torch.Tensor:
    """(views, height, width) bool of masks of any size, that need not have one size."""
    if not masks:
        return checked_masks(None, views, height, width)
    return checked_masks(torch.cat([sampled(m.float().cpu(), height, width) for m in masks]), views, height, width)


def distances(depth: torch.Tensor, cameras: list[dict], along_rays: bool) -> tuple[torch.Tensor, list[Camera]]:
    """Grey pictures (n, H, W), white near and black far -> depth (n, H, W) along the axis, in units of the scene; and their cameras."""
    if len(depth) != len(cameras):
        raise ValueError(
            f"There are {len(depth)} pictures of depth and {len(cameras)} cameras: give 1 camera for each."
        )
    read = [read_camera(camera) for camera in cameras]
    blind = next((n for n, c in enumerate(read) if c.near is None or c.far is None or not 0 <= c.near < c.far), None)
    if blind is not None:
        raise ValueError(
            f"Camera {blind + 1} does not say how near white is and how far black: take the cameras of Views of a Mesh or Pocket Pictures."
        )
    height, width = depth.shape[1:]
    at, metric = centres(height, width), [c.near + (1 - d.double()) * (c.far - c.near) for c, d in zip(read, depth, strict=True)]  # fmt: skip
    if along_rays:
        metric = [along_axis(c, at, d, width / height) for c, d in zip(read, metric, strict=True)]
    return torch.stack(metric), read


def patches(vision, images: torch.Tensor) -> torch.Tensor:
    """Features (n, h, w, d) of a CLIP_VISION's patches; pictures (n, H, W, 3) are squeezed into its square, not cropped."""
    seen = vision.encode_image(images, crop=False)["last_hidden_state"].float().cpu()
    side = vision.image_size // vision.config.get("patch_size", 16)
    beside = seen.shape[1] - side * side
    if side < 1 or not 0 <= beside <= TOKENS:
        raise ValueError(
            f"This CLIP_VISION has {seen.shape[1]} tokens, which are no square of patches: take CLIP, SigLIP or DINOv2."
        )
    return seen[:, beside:].unflatten(1, (side, side))


def masks_input(more: str = "") -> io.Mask.Input:
    return io.Mask.Input("masks", optional=True, tooltip=f"1 mask for each view, white where the object is. {more}")


def size_input() -> io.Int.Input:
    return io.Int.Input("size", default=128, min=8, max=256, advanced=True,
                        tooltip="Pixels of the longer side at which points are looked for: 128 is twice FLUX's tokens of a picture of 1024.")  # fmt: skip


def tolerance_input() -> io.Float.Input:
    return io.Float.Input("tolerance", default=0.01, min=0.0001, max=0.5, step=0.001,
                          tooltip="How far two points may lie apart and still be one, as a share of the object's size: 0.01 is usual.")  # fmt: skip


def output() -> list:
    return [CorrespondencesType.Output(display_name="correspondences", tooltip="To Feature Warp, or to Draw Correspondences, for all 2 or more views.")]  # fmt: skip


class CorrespondencesFromDepth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointCorrespondencesFromDepth",
            display_name="Correspondences from Depth",
            category=CATEGORY,
            description="Finds which point of one view is which of another, from each view's depth and camera. What is hidden in one of the "
            "two is left out.",
            is_experimental=True,
            is_input_list=True,
            search_aliases=["reprojection", "multi view", "syncd", "depth test"],
            inputs=[
                io.Image.Input("depth", tooltip="2 or more views: white is as near as the camera's `near`, black as far as its `far`, even between."),
                io.Load3DCamera.Input("cameras", tooltip="1 camera for each view, all in 1 scene: from Views of a Mesh or Pocket Pictures."),
                masks_input("Without masks the background counts too."),
                tolerance_input(),
                size_input(),
                io.Combo.Input("measured", options=[AXIS, RAY], default=AXIS, advanced=True,
                               tooltip="How depth is measured: 1 way is usual, along the axis. Pocket Pictures measures along each ray."),
            ],
            outputs=output(),
        )  # fmt: skip

    @classmethod
    def execute(cls, depth, cameras, tolerance, size, measured, masks=None) -> io.NodeOutput:
        grey = one_size("depth", depth)[..., 0]
        height, width = at_most(*grey.shape[1:], size[0])
        metric, read = distances(sampled(grey, height, width), cameras, measured[0] == RAY)
        matches = from_depth(metric, read, read_masks(masks, len(grey), height, width), tolerance[0])
        remedy = "check that depth and cameras are of one object and in one order, choose views nearer to each other, or a larger tolerance"
        return io.NodeOutput(found(matches, remedy))


class CorrespondencesFromCoordinates(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointCorrespondencesFromCoordinates",
            display_name="Correspondences from Coordinates",
            category=CATEGORY,
            description="Finds which point of one view is which of another, from pictures whose colours say which point of the object each "
            "pixel shows. No camera is needed.",
            is_experimental=True,
            is_input_list=True,
            search_aliases=["nocs", "position map", "surface map", "multi view"],
            inputs=[
                io.Image.Input("coordinates", tooltip="2 or more views: red, green and blue are X, Y and Z of the object, the same scale in all."),
                masks_input("Without masks all that is not black counts."),
                tolerance_input(),
                size_input(),
            ],
            outputs=output(),
        )  # fmt: skip

    @classmethod
    def execute(cls, coordinates, tolerance, size, masks=None) -> io.NodeOutput:
        every = one_size("coordinates", coordinates)[..., :3]
        height, width = at_most(*every.shape[1:3], size[0])
        shown = sampled(every, height, width)
        inside = read_masks(masks or [(shown != 0).any(-1)], len(shown), height, width)
        remedy = "check that all views have coordinates of one object, choose views nearer to each other, or a larger tolerance"
        return io.NodeOutput(found(from_coordinates(shown, inside, tolerance[0], stop), remedy))


class CorrespondencesFromFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CounterpointCorrespondencesFromFeatures",
            display_name="Correspondences from Features",
            category=CATEGORY,
            description="Finds which patch of one picture is most like which of another, and the other way round, by a vision model: for objects "
            "of which nothing is known but pictures. Less certain than depth.",
            is_experimental=True,
            is_input_list=True,
            search_aliases=["dino correspondences", "semantic matching", "nearest neighbours", "multi view"],
            inputs=[
                io.Image.Input("images", tooltip="2 or more pictures of the object."),
                io.ClipVision.Input("clip_vision", tooltip="1 model that looks: DINOv2 is best at places. From Load CLIP Vision."),
                masks_input("Without masks backgrounds are compared too."),
                io.Float.Input("threshold", default=OTSU, min=0.0, max=1.0, step=0.01,
                               tooltip="Least cosine of two patches that are one, 0.6 for example; 0 finds it by Otsu's method."),
            ],
            outputs=output(),
        )  # fmt: skip

    @classmethod
    def execute(cls, images, clip_vision, threshold, masks=None) -> io.NodeOutput:
        seen = patches(clip_vision[0], one_size("images", images)[..., :3])
        inside = read_masks(masks, len(seen), *seen.shape[1:3])
        matches = from_features(seen, inside, None if threshold[0] == OTSU else threshold[0], stop)
        return io.NodeOutput(found(matches, "lower the threshold, or look whether the masks show the object"))


NODES = [CorrespondencesFromDepth, CorrespondencesFromCoordinates, CorrespondencesFromFeatures]
