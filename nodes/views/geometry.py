"""Pinhole cameras, as core's LOAD3D_CAMERA says them: right-handed, Y up, the camera looks along its own -Z.

A point of a picture is (x, y), 0..1 from its left and upper edge; pixel i of n has its centre at (i + 1/2) / n. Depth is measured along
the axis of the camera, in units of the scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

UP, WHEN_UPRIGHT = (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)  # the second for a camera that looks straight up or down
ROOM = 1.1  # around what is looked at


@dataclass(frozen=True)
class Camera:
    """Where a picture was taken from, in float64."""

    position: torch.Tensor  # (3)
    axes: torch.Tensor  # (3, 3), rows: to the right, upwards, and backwards
    focal: float  # in halves of the picture's height: 1 / tan(fov / 2)
    near: float | None = None  # what is white in a picture of depth
    far: float | None = None  # and what is black
    window: tuple[float, float, float, float] = (
        0.0,
        0.0,
        1.0,
        1.0,
    )  # left, top, width, height: the part of the whole view


def read_camera(info: dict) -> Camera:
    """A LOAD3D_CAMERA. Its `view`, where it has one, is three.js's: the picture is a window on a larger one, so that the axis need not
    meet its centre. Raises ValueError for one that is not a perspective camera or looks nowhere."""
    if str(info.get("cameraType", "perspective")) != "perspective" or not 0 < float(info.get("fov") or 0) < 180:
        raise ValueError("A camera has no field of view between 0 and 180 degrees: take a perspective camera.")
    position, target = (
        torch.tensor([float(info[k][axis]) for axis in "xyz"], dtype=torch.float64) for k in ("position", "target")
    )
    turned = info.get("quaternion")
    axes = _turned(turned) if turned else _looking(position - target)
    if not axes.isfinite().all() or not position.isfinite().all():
        raise ValueError("A camera stands where it looks, or its numbers are not finite: move it away from its target.")
    focal = float(info.get("zoom") or 1) / math.tan(math.radians(float(info["fov"])) / 2)
    near, far = (None if info.get(k) is None else float(info[k]) for k in ("near", "far"))
    return Camera(position, axes, focal, near, far, _window(info.get("view")))


def _window(view: dict | None) -> tuple[float, float, float, float]:
    if not view or not view.get("enabled", True):
        return 0.0, 0.0, 1.0, 1.0
    wide, high = float(view["fullWidth"]), float(view["fullHeight"])
    return view["offsetX"] / wide, view["offsetY"] / high, view["width"] / wide, view["height"] / high


def _looking(backwards: torch.Tensor) -> torch.Tensor:
    back = backwards / backwards.norm()
    upright = back[1].abs() > 0.999
    right = torch.linalg.cross(torch.tensor(WHEN_UPRIGHT if upright else UP, dtype=back.dtype), back)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(back, right), back])


def _turned(quaternion: dict) -> torch.Tensor:
    q = torch.tensor([float(quaternion[k]) for k in "wxyz"], dtype=torch.float64)
    w, x, y, z = (q / q.norm()).tolist()
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
        [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def looking_at(position, target, fov: float, near: float, far: float, **more) -> dict:
    """A LOAD3D_CAMERA at `position` (3) that looks at `target` (3), upright. `fov` is vertical, degrees."""
    places = [dict(zip("xyz", map(float, place), strict=True)) for place in (position, target)]
    return {"position": places[0], "target": places[1], "zoom": 1.0, "cameraType": "perspective", "fov": fov,
            "near": near, "far": far, **more}  # fmt: skip


def orbit(angles: list[float], elevation: float, fov: float, aspect: float, centre: torch.Tensor, radius: float) -> list[dict]:  # fmt: skip
    """LOAD3D_CAMERAs around a ball, which just fits into each picture. Angles in degrees: 0 sees the front (+Z), 90 the right side."""
    half = math.radians(fov) / 2
    distance = ROOM * radius / math.sin(min(half, math.atan(math.tan(half) * aspect)))
    rise = math.radians(elevation)
    cameras = []
    for turn in map(math.radians, angles):
        way = [math.sin(turn) * math.cos(rise), math.sin(rise), math.cos(turn) * math.cos(rise)]
        position = centre + distance * torch.tensor(way, dtype=centre.dtype)
        cameras.append(looking_at(position, centre, fov, distance - radius, distance + radius))
    return cameras


def project(camera: Camera, points: torch.Tensor, aspect: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the scene (..., 3) -> where they are in a picture that is `aspect` times as wide as high (..., 2), and their depth (...),
    negative behind the camera. Float64."""
    right, up, back = ((points.double() - camera.position) @ camera.axes.T).unbind(-1)
    left, top, width, height = camera.window
    whole = aspect * height / width
    x, y = camera.focal / whole * right / -back, camera.focal * up / -back
    return torch.stack([((0.5 + x / 2) - left) / width, ((0.5 - y / 2) - top) / height], dim=-1), -back


def unproject(camera: Camera, at: torch.Tensor, depth: torch.Tensor, aspect: float) -> torch.Tensor:
    """Points of a picture (..., 2) at a depth (...) -> points of the scene (..., 3). Float64."""
    rays = _rays(camera, at, aspect)
    return camera.position + depth.double()[..., None] * rays @ camera.axes


def along_axis(camera: Camera, at: torch.Tensor, distance: torch.Tensor, aspect: float) -> torch.Tensor:
    """Depth (...) of what is `distance` (...) away along the ray through a point of the picture (..., 2)."""
    return distance.double() / _rays(camera, at, aspect).norm(dim=-1)


def _rays(camera: Camera, at: torch.Tensor, aspect: float) -> torch.Tensor:
    """(..., 3) to the right, up and back, of depth 1."""
    left, top, width, height = camera.window
    whole = aspect * height / width
    x, y = (at.double() * torch.tensor([width, height]) + torch.tensor([left, top]).double()).unbind(-1)
    right, up = (2 * x - 1) * whole / camera.focal, (1 - 2 * y) / camera.focal
    return torch.stack([right, up, -torch.ones_like(right)], dim=-1)


def centres(height: int, width: int) -> torch.Tensor:
    """(height, width, 2) of the pixels of a picture, float64."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def pixels(at: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the pixel in which each point (..., 2) lies, and whether it lies in the picture at all; 0 where not."""
    column, row = (at * torch.tensor([width, height])).floor().unbind(-1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, 0.0).long(), inside
