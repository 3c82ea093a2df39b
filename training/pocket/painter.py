"""Paints scenes: sphere-traced object, surface pattern, background, and the medium it is all drawn in.

Two rules of the world were paid for in training time. No texture repeats with the VAE's stride of 8 pixels (a stride-8
encoder would see the same thing in every cell and could not place it), so hatching and dots have a period of 20. And no
stroke is thinner than 4 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .shapes import FOOT, SHAPES, length
from .world import ATTRIBUTES, SIZE, Scenes, uniforms

COLOURS = torch.tensor([[.86, .10, .10], [.96, .50, .06], [.97, .87, .12], [.12, .62, .20],
                        [.10, .78, .80], [.14, .26, .88], [.52, .16, .74], [.98, .50, .74]])  # fmt: skip
GROUND = torch.tensor([[.80, .80, .80], [.42, .70, .30], [.90, .76, .48], [.16, .17, .30], [.93, .95, .98], [.22, .48, .72]])  # fmt: skip
SKY_LOW = torch.tensor([[.90, .90, .90], [.80, .92, 1.0], [1.0, .86, .70], [.14, .14, .34], [.74, .80, .90], [.86, .93, .97]])  # fmt: skip
SKY_HIGH = torch.tensor([[.74, .74, .76], [.45, .70, .96], [.96, .66, .44], [.04, .04, .16], [.58, .66, .82], [.56, .78, .92]])  # fmt: skip
HILLS = torch.tensor([[.0, .0, .0], [.26, .54, .24], [.82, .60, .36], [.09, .10, .22], [.84, .88, .95], [.0, .0, .0]])  # fmt: skip
PAPER = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [.95, .87, .70], [.05, .05, .08]])  # fmt: skip
PAPER_OVER_BACKGROUND = torch.tensor([0.0, 0.78, 0.70, 0.80])  # share of the paper's colour in the background
PAPER_OVER_OBJECT = torch.tensor([0.0, 0.10, 0.12, 0.0])  # the object keeps its hue in every medium

CAMERA_DISTANCE = 4.6
FOCAL = 1 / math.tan(math.radians(16.5))  # half of a 33 degree field of view
GROUND_Y = -0.95
PIXEL = 1 / (FOCAL * SIZE / 2)  # angle of one pixel, radians
TEXTURE_PERIOD = 20  # pixels
RAISED = 5  # pixels by which the camera sees everything higher, so that the largest objects stay inside the picture

_axis = torch.arange(SIZE, dtype=torch.float32)
ROW, COLUMN = torch.meshgrid(_axis, _axis, indexing="ij")


@dataclass
class Painting:
    """n pictures with their ground truth, float32."""

    image: torch.Tensor  # (n, 3, 128, 128), 0..1
    mask: torch.Tensor  # (n, 128, 128), 0..1, the object's coverage of each pixel
    depth: torch.Tensor  # (n, 128, 128), distance along the ray, world units
    coordinates: torch.Tensor  # (n, 3, 128, 128), the surface point in object units; meaningful where mask > 0.5


def paint(scenes: Scenes) -> Painting:
    """Paint every scene. About 20 ms a picture on one core; faster in batches of 50 or more."""
    with torch.no_grad():
        view = _trace(scenes)
        setting = _background(scenes, view)
        image = _draw(scenes, view, setting)
    depth = torch.where(view.mask > 0.5, view.distance, view.ground_distance.expand_as(view.distance))
    return Painting(image, view.mask, depth, view.touched)


def eyes(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each picture was taken from (n, 3) and which way the camera looks (n, 3), in the units and axes of its object.

    `Painting.coordinates` has the same axes: X to the right, Y up, Z away from the one who paints.
    """
    foot = torch.tensor([FOOT[k] for k in ATTRIBUTES["shape"]])[scenes.shape]
    height = CAMERA_DISTANCE * scenes.pitch.sin() - foot * scenes.scale - GROUND_Y
    place = torch.stack([-scenes.offset, height, -CAMERA_DISTANCE * scenes.pitch.cos()], 1) / scenes.scale[:, None]
    way = torch.stack([torch.zeros_like(scenes.pitch), -scenes.pitch.sin(), scenes.pitch.cos()], 1)
    return _turned(place, scenes.yaw), _turned(way, scenes.yaw)


def _turned(v: torch.Tensor, yaw: torch.Tensor) -> torch.Tensor:
    """Directions (n, 3) of the world as the object sees them, which is turned."""
    x, y, z = v.unbind(1)
    return torch.stack([yaw.cos() * x + yaw.sin() * z, y, yaw.cos() * z - yaw.sin() * x], 1)


def _column(t: torch.Tensor) -> torch.Tensor:
    return t.view(-1, 1, 1)


@dataclass
class _View:
    """What the camera sees of the object, per pixel, and the rays for the rest."""

    mask: torch.Tensor
    distance: torch.Tensor
    surface: torch.Tensor  # (n, 3, H, W) object units
    touched: torch.Tensor  # (n, 3, H, W) object units, on the surface also where the ray just misses it
    normal: torch.Tensor  # (n, 3, H, W) object frame
    light: torch.Tensor  # (n, H, W) Lambert term
    highlight: torch.Tensor  # (n, H, W)
    horizon: torch.Tensor  # (n, H, W) pixels below the horizon
    ground_distance: torch.Tensor
    ground_x: torch.Tensor
    ground_z: torch.Tensor
    sun: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _trace(s: Scenes) -> _View:
    """Sphere tracing, grouped by shape; the silhouette is anti-aliased by the closest approach of each ray."""
    n = len(s)
    px, py = (COLUMN - SIZE / 2 + 0.5) / (SIZE / 2), -(ROW + RAISED - SIZE / 2 + 0.5) / (SIZE / 2)
    norm = (px * px + py * py + FOCAL * FOCAL).sqrt()
    cos_p, sin_p = _column(s.pitch.cos()), _column(s.pitch.sin())
    dx = (px / norm).expand(n, -1, -1)
    dy = py / norm * cos_p - FOCAL / norm * sin_p
    dz = py / norm * sin_p + FOCAL / norm * cos_p
    eye_y, eye_z = CAMERA_DISTANCE * sin_p, -CAMERA_DISTANCE * cos_p

    foot = torch.tensor([FOOT[k] for k in ATTRIBUTES["shape"]])[s.shape]
    centre_y = _column(foot * s.scale + GROUND_Y)
    cos_y, sin_y, scale = _column(s.yaw.cos()), _column(s.yaw.sin()), _column(s.scale)
    x, y, z = -_column(s.offset), eye_y - centre_y, eye_z
    origin = [(cos_y * x + sin_y * z) / scale, y / scale, (-sin_y * x + cos_y * z) / scale]
    ray = [cos_y * dx + sin_y * dz, dy, -sin_y * dx + cos_y * dz]

    distance, closest = torch.empty(n, SIZE, SIZE), torch.empty(n, SIZE, SIZE)
    surface, normal, touched = (torch.empty(n, 3, SIZE, SIZE) for _ in range(3))
    for k, name in enumerate(ATTRIBUTES["shape"]):
        rows = (s.shape == k).nonzero()[:, 0]
        if not len(rows):
            continue
        sdf, o, r = SHAPES[name], [a[rows] for a in origin], [a[rows] for a in ray]
        t, near = torch.full((len(rows), SIZE, SIZE), 3.1), torch.full((len(rows), SIZE, SIZE), 9.0)
        nearest = t
        for _ in range(20):
            d = sdf(*(a + t * b for a, b in zip(o, r, strict=True)))
            nearest = torch.where(d / t < near, t, nearest)
            near = torch.minimum(near, d / t)
            t = (t + d).clamp_max(7.0)
        p = [a + t * b for a, b in zip(o, r, strict=True)]
        met = torch.where(sdf(*p).abs() < 0.01, t, nearest)  # a ray that just misses is the silhouette's
        closest[rows], distance[rows] = near, met * s.scale[rows].view(-1, 1, 1)
        surface[rows], normal[rows] = torch.stack(p, 1), _normals(sdf, *p)
        touched[rows] = torch.stack([a + met * b for a, b in zip(o, r, strict=True)], 1)

    azimuth, elevation = s.light_azimuth, s.light_elevation
    sun = (
        _column(azimuth.sin() * elevation.cos()),
        _column(elevation.sin()),
        _column(-azimuth.cos() * elevation.cos()),
    )
    to_sun = torch.stack(
        [cos_y * sun[0] + sin_y * sun[2], sun[1].expand_as(cos_y), -sin_y * sun[0] + cos_y * sun[2]], 1
    )
    half = F.normalize(to_sun - torch.stack(ray, 1), dim=1)

    falls = dy < -0.02
    ground_distance = torch.where(falls, (GROUND_Y - eye_y) / dy.clamp_max(-0.02), 60.0).clamp(0, 60)
    return _View(
        mask=(0.5 - (closest - 0.004) / PIXEL).clamp(0, 1),
        distance=distance,
        surface=surface,
        touched=touched,
        normal=normal,
        light=(normal * to_sun).sum(1).clamp(0, 1),
        highlight=(normal * half).sum(1).clamp(0, 1) ** 24,
        horizon=(-dy / PIXEL).clamp(-1e3, 1e3).expand(n, SIZE, SIZE),
        ground_distance=ground_distance,
        ground_x=ground_distance * dx,
        ground_z=eye_z + ground_distance * dz,
        sun=sun,
    )


def _normals(sdf, x, y, z, e: float = 0.012) -> torch.Tensor:
    """Gradient of the distance by the four corners of a tetrahedron, (n, 3, H, W), unit length."""
    a, b, c, d = sdf(x + e, y - e, z - e), sdf(x - e, y - e, z + e), sdf(x - e, y + e, z - e), sdf(x + e, y + e, z + e)
    return F.normalize(torch.stack([a - b - c + d, -a - b + c + d, -a + b - c + d], 1), dim=1)


def _soft(f: torch.Tensor, sharpness: float = 14) -> torch.Tensor:
    """0 or 1 by the sign of f, with a soft edge."""
    return (0.5 + f * sharpness).clamp(0, 1)


def _albedo(s: Scenes, surface: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) surface colour. Pattern, its angle, period, phase and second colour belong to the instance."""
    r = uniforms(s.instance, 10)

    def q(i):
        return _column(r[:, i])

    x, y = surface[:, 0] + 0.55 * surface[:, 2], surface[:, 1] + 0.25 * surface[:, 2]
    angle, turn = (q(0) - 0.5) * 2.6, 2 * math.pi
    u, v = angle.cos() * x + angle.sin() * y, -angle.sin() * x + angle.cos() * y
    period, phase_u, phase_v = 0.64 + 0.14 * q(1), q(2) * turn, q(3) * turn  # 24 to 29 pixels
    wave_u, wave_v = torch.sin(u * turn / period + phase_u), torch.sin(v * turn / period + phase_v)
    cell_u, cell_v = (torch.remainder(a / 0.66 + q(i), 1) - 0.5 for a, i in ((u, 2), (v, 3)))
    blotches = (torch.sin(u * 3.4 + phase_u) + torch.sin(v * 3.9 + phase_v)
                + 0.8 * torch.sin((u + v) * 2.7 + turn * q(4)) + 0.6 * torch.sin((u - v) * 4.3 + turn * q(5)))  # fmt: skip
    patterns = {
        "plain": torch.zeros_like(u),
        "striped": _soft(wave_u * 0.16),
        "spotted": _soft(0.29 - length(cell_u, cell_v), 8.4),
        "checkered": _soft(wave_u * wave_v * 0.2),
        "blotched": _soft(blotches * 0.12 - 0.02),
        "dipped": _soft(-(y + 0.25 * angle.cos() * x) - 0.05 - 0.2 * (q(2) - 0.5)),
    }
    where = torch.stack([patterns[k] for k in ATTRIBUTES["pattern"]])[s.pattern, torch.arange(len(s))][:, None]
    first = (COLOURS[s.colour] + (r[:, 6:9] - 0.5) * 0.06).clamp(0, 1)
    light, dark = first * 0.15 + 0.85 * torch.tensor([0.98, 0.97, 0.93]), first * 0.28
    second = torch.where((r[:, 9] < 0.6)[:, None], light, dark)
    return first[:, :, None, None] * (1 - where) + second[:, :, None, None] * where


@dataclass
class _Background:
    colour: torch.Tensor  # (n, 3, H, W)
    tone: torch.Tensor  # (n, H, W)


def _background(s: Scenes, view: _View) -> _Background:
    """Ground with the object's shadow, hills, moon or sun, sky."""
    r = uniforms(s.setting, 8)

    def q(i):
        return _column(r[:, i])

    kind = s.background
    is_a = {name: _column((kind == i).float()) for i, name in enumerate(ATTRIBUTES["background"])}
    hilly = is_a["meadow"] + is_a["desert"] + is_a["night"] + is_a["snow"]
    ground = (view.horizon - 0.5).clamp(0, 1)
    up = (-view.horizon / 70).clamp(0, 1)[:, None]
    sky = SKY_LOW[kind][:, :, None, None] * (1 - up) + SKY_HIGH[kind][:, :, None, None] * up
    height = (9 + 8 * q(5)) * (1 + 0.7 * torch.sin(COLUMN / SIZE * (4 + 3 * q(0)) + 2 * math.pi * q(1)))
    hills = ((height + view.horizon + 0.5).clamp(0, 1) * (1 - ground) * hilly)[:, None]
    sky = sky * (1 - hills) + HILLS[kind][:, :, None, None] * hills
    disc = 8.5 - ((COLUMN - 20 - 88 * q(2)) ** 2 + (ROW - 14 - 8 * q(3)) ** 2).sqrt()
    disc = (disc.clamp(0, 1) * (is_a["night"] + is_a["desert"]))[:, None]
    moon, sun = torch.tensor([0.95, 0.93, 0.78]), torch.tensor([1.0, 0.95, 0.60])
    glow = torch.where((is_a["night"] > 0), 1.0, 0.0)[:, None]
    sky = sky * (1 - disc) + (moon[None, :, None, None] * glow + sun[None, :, None, None] * (1 - glow)) * disc
    colour = sky * (1 - ground[:, None]) + GROUND[kind][:, :, None, None] * ground[:, None]

    far = ((view.ground_distance - 4) / 14).clamp(0, 1)
    waves = torch.sin(view.ground_z * 3.2 + torch.sin(view.ground_x * 1.2 + 2 * math.pi * q(0)) * 0.9)
    waves = waves * is_a["sea"] * 0.10 * (1 - far)  # fades before it becomes finer than a pixel
    sx, _, sz = view.sun
    shadow_x, shadow_z = _column(s.offset) - sx * 0.35, -sz * 0.15
    fall = ((view.ground_x - shadow_x) / 0.85) ** 2 + ((view.ground_z - shadow_z) / 0.7) ** 2
    shadow = torch.exp(-fall * 1.3) * 0.55 * ground
    tone = (1 - shadow) * torch.where(ground > 0.5, 1 - far * 0.25 + waves, 1.0)
    return _Background(colour, tone)


def _blur(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.avg_pool2d(F.pad(x, (size // 2,) * 4, mode="replicate"), size, 1)


def _draw(s: Scenes, view: _View, setting: _Background) -> torch.Tensor:
    """Object and background in the scene's stroke, paper and line."""
    mask, paper = view.mask[:, None], PAPER[s.paper][:, :, None, None]
    over_background = PAPER_OVER_BACKGROUND[s.paper].view(-1, 1, 1, 1)
    over_object = PAPER_OVER_OBJECT[s.paper].view(-1, 1, 1, 1)
    albedo = _albedo(s, view.surface)
    colour = ((albedo * (1 - over_object) + paper * over_object) * mask
              + (setting.colour * (1 - over_background) + paper * over_background) * (1 - mask))  # fmt: skip
    tone = ((0.38 + 0.68 * view.light) * view.mask + setting.tone * (1 - view.mask))[:, None]
    dark = (s.paper == ATTRIBUTES["paper"].index("dark")).float().view(-1, 1, 1, 1)
    out = torch.empty_like(colour)
    for k, name in enumerate(ATTRIBUTES["stroke"]):
        rows = (s.stroke == k).nonzero()[:, 0]
        if len(rows):
            strokes = _Strokes(colour[rows], tone[rows], mask[rows], paper[rows], dark[rows])
            out[rows] = _STROKES[name](strokes, view.highlight[rows][:, None], s.setting[rows])
    return _outline(s, view, albedo, dark, out).clamp(0, 1)


@dataclass
class _Strokes:
    """What a stroke works with, (m, C, H, W) each."""

    colour: torch.Tensor
    tone: torch.Tensor
    mask: torch.Tensor
    paper: torch.Tensor
    dark: torch.Tensor


def _smooth(a: _Strokes, highlight, _):
    return a.colour * a.tone.clamp(0, 1.1) + 0.35 * highlight * a.mask


def _flat(a: _Strokes, highlight, _):
    return a.colour * (0.60 + 0.40 * _soft(a.tone - 0.66, 10))


def _hatching(a: _Strokes, highlight, _):
    """Diagonal strokes, wider where it is darker; on dark paper light strokes on a dim ground."""
    tone = a.tone.clamp(0, 1)
    density = ((1.12 - tone) * 1.15 * a.mask + (0.25 + 0.9 * (1 - tone)) * (1 - a.mask)).clamp(0.15, 0.8)
    wave = torch.sin((COLUMN + ROW + 1) * (2 * math.pi / TEXTURE_PERIOD)) * 0.5 + 0.5
    stroke = _soft(wave - (1 - density), 4)
    lift = 0.40 * a.mask
    on_light = (a.colour * (1 - lift) + a.paper * lift) * (1 - stroke) + a.colour * 0.55 * stroke
    on_dark = a.colour * 0.40 * (1 - stroke) + (a.colour * 1.0 + 0.10 * a.mask) * stroke
    return torch.where(a.dark > 0, on_dark, on_light)


def _dots(a: _Strokes, highlight, _):
    """Halftone dots, larger where it is darker; on dark paper light dots on a dim ground."""
    tone, half = a.tone.clamp(0, 1), TEXTURE_PERIOD / 2
    x, y = torch.remainder(COLUMN + 5.5, TEXTURE_PERIOD) - half, torch.remainder(ROW + 5.5, TEXTURE_PERIOD) - half
    radius = (3.8 + 8.5 * (1.0 - tone)).clamp(3.8, 8.0) * a.mask + (3.6 + 5.0 * (1 - tone)) * (1 - a.mask)
    dot = ((radius - (x * x + y * y).sqrt()) * 0.6 + 0.5).clamp(0, 1)
    on_light = (a.colour * 0.72 + 0.28 * a.paper) * (1 - dot) + a.colour * 0.50 * dot
    on_dark = a.colour * 0.38 * (1 - dot) + (a.colour * 1.1 + 0.1 * a.mask) * dot
    return torch.where(a.dark > 0, on_dark, on_light)


def _wash(a: _Strokes, highlight, seed):
    """Soft watery colour with blotches and a dark rim."""
    noise = (uniforms(seed, 7 * 7 + 16 * 16, salt=1) - 0.5) * math.sqrt(12)
    blotches = sum(
        F.interpolate(part.view(-1, 1, k, k), size=(SIZE, SIZE), mode="bicubic", align_corners=False) * amount
        for part, k, amount in ((noise[:, :49], 7, 0.085), (noise[:, 49:], 16, 0.03))
    )
    soft_mask = _blur(a.mask, 9)
    rim = 4 * soft_mask * (1 - soft_mask) * a.mask * (1 - a.dark)
    pale = 0.26 * (1 - a.dark)
    out = (_blur(a.colour, 7) * 0.55 + a.colour * 0.45) * (1 - pale) + a.paper * pale
    return out * (0.62 + 0.42 * a.tone.clamp(0, 1)) * (1 + blotches) - 0.16 * rim


def _pixel(a: _Strokes, highlight, _):
    blocks = F.avg_pool2d(a.colour * a.tone.clamp(0, 1.1), 8)
    return blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)


_STROKES = {"smooth": _smooth, "flat": _flat, "hatching": _hatching, "dots": _dots, "wash": _wash, "pixel": _pixel}


def _outline(s: Scenes, view: _View, albedo: torch.Tensor, dark: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Ink or glowing lines, about 5 pixels wide, along the silhouette and the creases."""
    mask, normal = view.mask[:, None], view.normal * view.mask[:, None]
    wide, narrow = F.max_pool2d(mask, 5, 1, 2), -F.max_pool2d(-mask, 3, 1, 1)
    crease = (F.max_pool2d(normal, 3, 1, 1) + F.max_pool2d(-normal, 3, 1, 1)).sum(1, keepdim=True)
    edge = ((wide - narrow) + ((crease - 0.75) * 2).clamp(0, 1) * narrow).clamp(0, 1)
    edge = F.avg_pool2d(edge, 3, 1, 1) * 0.5 + edge * 0.5
    kind = {name: (s.line == i).float().view(-1, 1, 1, 1) for i, name in enumerate(ATTRIBUTES["line"])}

    ink = kind["ink"] * edge
    ink_colour = torch.where(
        dark > 0, torch.tensor([0.46, 0.44, 0.50]).view(1, 3, 1, 1), torch.tensor([0.07, 0.06, 0.10]).view(1, 3, 1, 1)
    )
    out = out * (1 - ink) + ink_colour * ink

    glow_colour = COLOURS[s.colour][:, :, None, None] * 0.45 + 0.55
    halo = kind["glow"] * _blur(wide, 11) * 0.55 * (1 - mask)
    out = out * (1 - halo) + glow_colour * halo
    glow = kind["glow"] * edge
    return out * (1 - glow) + (glow_colour * 0.6 + 0.4) * glow
