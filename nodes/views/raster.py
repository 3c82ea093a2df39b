"""Pictures of a mesh: a z-buffer in torch, for machines where nothing can be compiled. Perspective-correct, no gradients.

A pixel shows the nearest triangle that covers its centre. There is no smoothing of edges, so that depth and coordinates are those of one
point. Triangles that reach behind the camera are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .geometry import Camera, project

FRAGMENTS = 1 << 21  # pixels of triangles' boxes looked at together: about 400 MB
EDGE = 1e-9  # two triangles with one edge leave no gap between them
NOTHING = torch.iinfo(torch.int64).max
GREY, DARKEST = 0.8, 0.3  # of a surface without colour, face on and edge on


@dataclass(frozen=True)
class Solid:
    """One mesh: vertices (v, 3), faces (f, 3); colours of the vertices (v, 3), or a texture (h, w, 3) with places in it (v, 2)."""

    vertices: torch.Tensor
    faces: torch.Tensor
    colours: torch.Tensor | None = None
    texture: torch.Tensor | None = None
    uvs: torch.Tensor | None = None

    def box(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and largest coordinates (3) of what the faces use."""
        used = self.vertices[self.faces.unique()]
        return used.amin(0), used.amax(0)


@dataclass(frozen=True)
class View:
    """One picture of a solid, float32."""

    picture: torch.Tensor  # (H, W, 3), 0..1, black where there is nothing
    depth: torch.Tensor  # (H, W) along the axis of the camera; 0 where there is nothing
    mask: torch.Tensor  # (H, W) bool
    coordinates: torch.Tensor  # (H, W, 3) of the point that is seen; 0 where there is nothing


def read_mesh(mesh) -> Solid:
    """Core's MESH. Raises ValueError where it holds several, has no faces, or its numbers are not finite."""
    if len(mesh.vertices) != 1:
        raise ValueError(f"The MESH holds {len(mesh.vertices)} objects: give one with 1.")
    count, faces = (None if c is None else int(c[0]) for c in (mesh.vertex_counts, mesh.face_counts))
    vertices, triangles = mesh.vertices[0, :count].double().cpu(), mesh.faces[0, :faces].long().cpu()
    if not len(triangles):
        raise ValueError("The MESH has no faces, only points: give one with a surface.")
    if int(triangles.min()) < 0 or int(triangles.max()) >= len(vertices):
        raise ValueError(
            f"The MESH has a face with a vertex that is not there (of {len(vertices)}): export the model again."
        )
    broken = (~vertices[triangles.unique()].isfinite().all(1)).sum()
    if broken:
        raise ValueError(f"{int(broken)} vertices of the MESH are no finite numbers: export the model again.")
    colours, uvs = (None if t is None else t[0, :count].double().cpu() for t in (mesh.vertex_colors, mesh.uvs))
    texture = None if mesh.texture is None or uvs is None else mesh.texture[0].double().cpu()
    return Solid(vertices, triangles, None if colours is None else colours[:, :3], texture, uvs)


def render(solid: Solid, camera: Camera, height: int, width: int) -> View:
    at, depth = project(camera, solid.vertices, width / height)
    corners = (at * torch.tensor([width, height]))[solid.faces]  # (f, 3, 2) in pixels
    depths = depth[solid.faces]
    face = nearest_face(corners, depths, height, width)
    mask = face >= 0
    row, column = mask.nonzero().unbind(1)
    seen = face[mask]
    weights, z = _within(corners[seen], depths[seen], torch.stack([column, row], 1) + 0.5)[1:]

    def at_pixels(of_vertices: torch.Tensor) -> torch.Tensor:
        return (weights[..., None] * of_vertices[solid.faces[seen]]).sum(1)

    def picture(values: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(height, width, *values.shape[1:])
        out[mask] = values.float()
        return out

    colour = _colours(solid, seen, at_pixels, camera)
    return View(picture(colour.clamp(0, 1)), picture(z), mask, picture(at_pixels(solid.vertices)))


def nearest_face(corners: torch.Tensor, depths: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Corners (f, 3, 2) in pixels and their depths (f, 3) -> number of the face each pixel shows (height, width), -1 for none.

    Depth and number are one integer, so that the least of a pixel says both: a positive float32 is ordered as its bits are.
    """
    limit = torch.tensor([width, height])
    low = (corners.amin(1) - 0.5).ceil().clamp_min(0).minimum(limit).long()
    high = ((corners.amax(1) - 0.5).floor() + 1).clamp_min(0).minimum(limit).long()
    sides = (high - low).clamp_min(0)
    count = torch.where((depths > 0).all(1), sides.prod(1), 0)
    buffer = torch.full((height * width,), NOTHING)
    faces = count.nonzero().flatten()
    groups = (count[faces].cumsum(0) - 1).div(FRAGMENTS, rounding_mode="floor")
    for some in faces.split(groups.unique_consecutive(return_counts=True)[1].tolist()):
        face = some.repeat_interleave(count[some])
        nth = torch.arange(len(face)) - (count[some].cumsum(0) - count[some]).repeat_interleave(count[some])
        pixel = torch.stack([nth % sides[face, 0], nth // sides[face, 0]], 1) + low[face]
        inside, _, z = _within(corners[face], depths[face], pixel + 0.5)
        keys = (z.float().view(torch.int32).long() << 32) + face
        number = pixel[:, 1] * width + pixel[:, 0]
        buffer.scatter_reduce_(0, number[inside], keys[inside], "amin")
    return torch.where(buffer == NOTHING, -1, buffer & 0xFFFFFFFF).view(height, width)


def _within(corners: torch.Tensor, depths: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Triangles (m, 3, 2) with depths (m, 3) and a point each (m, 2): whether it is inside, the share of each corner in what lies there
    (m, 3), and its depth (m). It is 1 / depth that is linear in a picture."""
    a, b, c = corners.unbind(1)

    def area(p: torch.Tensor, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (q[:, 0] - p[:, 0]) * (r[:, 1] - p[:, 1]) - (q[:, 1] - p[:, 1]) * (r[:, 0] - p[:, 0])

    whole = area(a, b, c)
    flat = torch.stack([area(point, b, c), area(a, point, c), area(a, b, point)], 1) / whole[:, None]
    inside = (flat >= -EDGE).all(1) & (whole != 0)
    shares = flat / depths
    z = 1 / shares.sum(1)
    return inside, shares * z[:, None], z


def _colours(solid: Solid, seen: torch.Tensor, at_pixels, camera: Camera) -> torch.Tensor:
    """(m, 3) of the pixels that show the faces `seen` (m)."""
    if solid.texture is not None:
        place = (at_pixels(solid.uvs) % 1.0) * 2 - 1  # as glTF has it: from the upper left corner, repeated
        texture = solid.texture.movedim(-1, 0)[None, :3]
        return F.grid_sample(texture, place[None, None], "bilinear", "border", align_corners=False)[0, :, 0].T
    if solid.colours is not None:
        return at_pixels(solid.colours)
    a, b, c = solid.vertices[solid.faces[seen]].unbind(1)
    normal = F.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    towards = F.normalize(camera.position - at_pixels(solid.vertices), dim=1)
    facing = (normal * towards).sum(1).abs()  # a lamp at the camera, which lights both sides
    return (GREY * (DARKEST + (1 - DARKEST) * facing))[:, None].expand(-1, 3)
