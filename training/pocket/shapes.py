"""Signed distances to the eight shapes, in object units (the object is about 1.8 high)."""

import math

import torch

Coordinates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# How far each shape reaches below its centre, so that it can stand on the ground.
FOOT = {"sphere": 0.88, "cube": 0.70, "cone": 0.92, "cylinder": 0.84, "ring": 0.92, "diamond": 1.0, "star": 0.86, "heart": 0.62}  # fmt: skip


def length(*xs: torch.Tensor) -> torch.Tensor:
    return sum(x * x for x in xs).clamp_min(1e-12).sqrt()


def extruded(flat: torch.Tensor, z: torch.Tensor, half: float) -> torch.Tensor:
    """A flat outline of thickness 2 * half; the factor keeps the marching steps short at its sharp corners."""
    return torch.maximum(flat, z.abs() - half) * 0.9


def sphere(x, y, z):
    return length(x, y, z) - 0.88


def cube(x, y, z):
    rounding = 0.06
    ax, ay, az = (c.abs() - (0.70 - rounding) for c in (x, y, z))
    outside = length(ax.clamp_min(0), ay.clamp_min(0), az.clamp_min(0))
    return outside + torch.maximum(ax, torch.maximum(ay, az)).clamp_max(0) - rounding


def cone(x, y, z):
    height, radius = 0.92, 0.82
    side = (length(x, z) * (2 * height) + (y - height) * radius) / math.hypot(2 * height, radius)
    return torch.maximum(side, -y - height)


def cylinder(x, y, z):
    side, cap = length(x, z) - 0.60, y.abs() - 0.84
    return torch.maximum(side, cap).clamp_max(0) + length(side.clamp_min(0), cap.clamp_min(0))


def ring(x, y, z):
    return length(length(x, y) - 0.64, z) - 0.28


def diamond(x, y, z):
    return (x.abs() * 1.15 + y.abs() + z.abs() * 1.15 - 1.0) * 0.53


def star(x, y, z):
    sector = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, y) + sector / 2, sector) - sector / 2).abs()
    radius = length(x, y)
    px, py = radius * angle.sin(), radius * angle.cos()
    tip, notch = 1.05, 0.48
    ex, ey = notch * math.sin(sector / 2), notch * math.cos(sector / 2) - tip
    return extruded((px * -ey + (py - tip) * ex) / math.hypot(ex, ey), z, 0.24)


def heart(x, y, z):
    k = 1 / 1.35
    x, y = x.abs() * 1.02 * k, (y * 1.02 + 0.62) * k
    lobe = length(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    middle = 0.5 * (x + y).clamp_min(0)
    tip = torch.minimum(x * x + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2).clamp_min(1e-12).sqrt()
    return extruded(torch.where(x + y > 1, lobe, tip * torch.sign(x - y)) / k, z, 0.28)


SHAPES = {f.__name__: f for f in (sphere, cube, cone, cylinder, ring, diamond, star, heart)}
