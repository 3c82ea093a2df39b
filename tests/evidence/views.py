"""Claim: views of one object whose shape is known agree better, point by point, when they are painted with Feature Warp.

    python dev.py evidence views --screen       which start and which end of the warp, 5 or 10 sets
    python dev.py evidence views                the ways that matter, 30 fresh sets

A set is three views of one object of Pocket's world, each from a camera and in a place of its own, under one light. Each is painted
over its clay: the view as it is rendered, the object grey. So its shape stands where the geometry says, and its colours do not come
from the start; the prompts name the pattern's kind and the shape, and leave out the colour ("a photo of a spotted heart at sea").
A condition is how much is painted over (KSampler's denoise). The warp gets its correspondences from depth and cameras, as in the
saved graph 11; what is measured uses others, from the painter's own surface coordinates. All arms start from the same noises. Five
sets are one run.

colour apart       distance of the colours (5 x 5 pixels of the object) of two views where they show the same point, mean over points
                   and over the three pairs of views, 0..1
texture alike      correlation of the grey at those points, what is wider than 25 pixels taken away; 1 is the same pattern
identity           cosine of the instance probe between two pictures of a set, mean over the pairs
object followed    share of pictures whose shape and pattern are those asked for (judge)
place followed     share whose place is the one asked for
outside apart      distance to the rendered view beside the object, 0..1: what moved or was painted anew there

`rendered, one object` are the painter's own pictures, through the VAE: as good as it gets. In `rendered, other objects` each view has
a colour and an instance of its own: what two objects with nothing but shape and kind of pattern in common come to.
"""

from __future__ import annotations

import itertools
import statistics

from evidence.learn_style import Laboratory
from harness.claim import Claim, Plan, command, models_hash

SETS, VIEWS, STEPS = 5, 3, 20
FINE, COARSE, INSIDE = 5, 25, 2  # pixels: smoothed over; a pattern's period; left out along the silhouette
TOLERANCE = 0.015  # of the object's size, which is a little more than a pixel
RENDERED = {"rendered, one object": False, "rendered, other objects": True}
# Whether Shared Attention (with the masks of the views) is on, and what Feature Warp is given.
ARMS = {
    "unshared": (False, None),
    "shared": (True, None),
    "features, end 0.2": (False, {"mode": "features", "end": 0.2}),
    "features, end 1.0": (False, {"mode": "features", "end": 1.0}),
    "latents, end 0.2": (False, {"mode": "latents", "end": 0.2}),
    "latents, end 1.0": (False, {"mode": "latents", "end": 1.0}),
    "shared, features, end 1.0": (True, {"mode": "features", "end": 1.0}),
    "shared, latents, end 1.0": (True, {"mode": "latents", "end": 1.0}),
    "features, end 0.4": (False, {"mode": "features", "end": 0.4}),
    "features, end 0.6": (False, {"mode": "features", "end": 0.6}),
    "latents, end 0.4": (False, {"mode": "latents", "end": 0.4}),
    "latents, end 0.6": (False, {"mode": "latents", "end": 0.6}),
    "latents, end 0.6, strength 0.5": (False, {"mode": "latents", "end": 0.6, "strength": 0.5}),
    "shared, features, end 0.6": (True, {"mode": "features", "end": 0.6}),
    "shared, latents, end 0.6": (True, {"mode": "latents", "end": 0.6}),
    "shared, latents, end 0.4": (True, {"mode": "latents", "end": 0.4}),
}
CONFIRMED = (*RENDERED, *list(ARMS)[:8])
CONDITION = "denoise-0.9"
MEASURES = ("colour apart", "texture alike", "identity", "object followed", "place followed", "outside apart")
README = (
    "colour apart",
    "texture alike",
    "identity",
    "object followed",
    "place followed",
    "outside apart",
)  # what its table shows
CLAIM = Claim(
    name="views",
    about=__doc__,
    screen=Plan(("denoise-0.8", CONDITION), (*RENDERED, *ARMS), (0, 1)),
    confirm=Plan((CONDITION,), CONFIRMED, tuple(range(11, 17))),
    measures=MEASURES,
    baseline="unshared",
    seconds=25,
    digits=3,
)


def main(argv: list[str]) -> int:
    return command(CLAIM, argv, open_laboratory)


def open_laboratory():
    laboratory = Views.open()
    return models_hash(), laboratory.record


class Views(Laboratory):
    """Sets of views, painted together."""

    def record(self, condition: str, arm: str, seed: int) -> dict:
        import torch

        denoise = float(condition.rpartition("-")[2])
        with torch.inference_mode():
            each = [self.of_set(denoise, arm, seed * SETS + number) for number in range(SETS)]
        means = {k: round(statistics.mean(one[k] for one in each), 4) for k in MEASURES}
        return {"measures": means, "sets": [{k: round(v, 4) for k, v in one.items()} for one in each]}

    def of_set(self, denoise: float, arm: str, number: int) -> dict[str, float]:
        import torch

        scenes = self.scenes(number)
        view, pictures = self.paint(scenes), self.pictures_of(scenes, denoise, arm, number)
        inside = view.mask > 0.5
        matches = self.same_points(view.coordinates.movedim(1, -1), inside)
        seen, vectors = self.judge.see(pictures), self.nodes.pocket_models.load_instance_probe()[0].see(pictures)
        asked = torch.stack([seen[k] == getattr(scenes, k) for k in ("shape", "pattern")]).all(0)
        colour, texture = agreement(pictures, inside, matches)
        pairs = itertools.combinations(range(VIEWS), 2)
        return {
            "colour apart": colour,
            "texture alike": texture,
            "identity": statistics.mean(float(vectors[a] @ vectors[b]) for a, b in pairs),
            "object followed": asked.float().mean().item(),
            "place followed": (seen["background"] == scenes.background).float().mean().item(),
            "outside apart": (pictures - view.image).abs().movedim(1, -1)[view.mask == 0].mean().item(),
            "points": len(matches) / 2,
        }

    def scenes(self, number: int):
        """One object (any pattern but plain) under one light, from three cameras, in three places; photos."""
        import torch

        world, generator = self.world, torch.Generator().manual_seed(9000 + number)
        patterned = [i for i, name in enumerate(world.ATTRIBUTES["pattern"]) if name != "plain"]
        pattern = patterned[int(torch.randint(0, len(patterned), (), generator=generator))]
        drawn = {k: int(torch.randint(0, 8, (), generator=generator)) for k in ("shape", "colour")}
        one = world.sample_scenes(1, 8000 + number)
        same = {k: getattr(one, k) for k in ("instance", "light_azimuth", "light_elevation")}
        medium = dict(zip(world.FACTORS, world.MEDIUMS["photo"], strict=True))
        scenes = world.sample_scenes(VIEWS, 7000 + number, pattern=pattern, **drawn, **same, **medium)
        scenes.background[:] = torch.randperm(6, generator=generator)[:VIEWS]
        return scenes

    def same_points(self, coordinates, inside):
        """Where two views show one point, off the silhouette, by what the painter says of the surface."""
        import torch.nn.functional as F

        off = 1 - F.max_pool2d(1 - inside[:, None].float(), 2 * INSIDE + 1, 1, INSIDE)[:, 0]
        return self.nodes.views.correspondences.from_coordinates(coordinates, off > 0, TOLERANCE)

    def pictures_of(self, scenes, denoise: float, arm: str, number: int):
        """(views, 3, 128, 128) in 0..1."""
        if arm in RENDERED:
            latents = self.vae.encode(self.rendered(scenes, RENDERED[arm], number).movedim(1, -1))
        else:
            latents = self.painted(scenes, denoise, arm, number)
        return self.vae.decode(latents).movedim(-1, 1).clone()

    def rendered(self, scenes, others: bool, number: int):
        if others:
            more = self.world.sample_scenes(VIEWS, 6000 + number)
            scenes = type(scenes)(**{**vars(scenes), "colour": more.colour, "instance": more.instance})
        return self.paint(scenes).image

    def clay(self, scenes):
        """Pictures (views, 3, 128, 128) of the scenes with the object in grey, as light falls on it."""
        plain = type(scenes)(**{**vars(scenes), "pattern": scenes.pattern * 0})
        view = self.paint(plain)
        mask, grey = view.mask[:, None], view.image.mean(1, keepdim=True)
        middle = (grey * mask).sum((1, 2, 3), keepdim=True) / mask.sum((1, 2, 3), keepdim=True)
        return (view.image * (1 - mask) + grey * (0.5 / middle) * mask).clamp(0, 1)

    def painted(self, scenes, denoise: float, arm: str, number: int):
        import comfy.sample
        import torch

        subject = " ".join(self.grammar.words(k, int(getattr(scenes, k)[0])) for k in ("pattern", "shape"))
        places = [self.grammar.words("background", int(place)) for place in scenes.background]
        prompts = [f"a photo of {self.grammar.article(subject)} {place}" for place in places]
        encoded = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(p)) for p in (*prompts, "")]
        noise = torch.randn(VIEWS, 4, 16, 16, generator=torch.Generator().manual_seed(10_000 + number))
        return comfy.sample.sample(
            self.patched(scenes, arm), noise, STEPS, self.cfg, "euler", "normal", self.nodes.generate.together(encoded[:-1]),
            encoded[-1], self.vae.encode(self.clay(scenes).movedim(1, -1)), denoise=denoise, disable_pbar=True, seed=number,
        )  # fmt: skip

    def patched(self, scenes, arm: str):
        shared, warp = ARMS[arm]
        model, attention = self.model, self.nodes.attention
        if shared:
            model = attention.patch.with_shared_attention(model, self.paint(scenes).mask, attention.patch.How())
        if warp:
            given = {"strength": 1.0, "start": 0.0, **warp}
            model = self.nodes.views.patch.with_feature_warp(model, self.correspondences(scenes), **given)
        return model

    def correspondences(self, scenes):
        """Those that the saved graph 11 gives to Feature Warp."""
        pocket, views, view = self.nodes.pocket, self.nodes.views, self.paint(scenes)
        near, far = pocket.NEAREST, pocket.FARTHEST
        grey = 1 - ((view.depth - near) / (far - near)).clamp(0, 1)
        depth, cameras = views.sources.distances(grey, pocket.cameras(scenes), along_rays=True)
        return views.correspondences.from_depth(depth, cameras, view.mask > 0.5, views.node.TOLERANCE)


def agreement(pictures, inside, matches) -> tuple[float, float]:
    """Mean distance of colours, and mean correlation of what is finer than a pattern, at the corresponding points of pictures (n, 3, H, W)
    whose object is `inside` (n, H, W) bool."""
    import torch

    inside = inside[:, None].float()
    colours, grey = smoothed(pictures, inside, FINE), pictures.mean(1, keepdim=True)
    fine = smoothed(grey, inside, FINE) - smoothed(grey, inside, COARSE)
    apart, alike = [], []
    for (a, b), points in matches.points.items():
        if a < b and len(points[0]) > 1:
            here, there = (shown(colours[n], p) for n, p in zip((a, b), points, strict=True))
            apart.append(float((here - there).abs().mean()))
            both = torch.cat([shown(fine[n], p) for n, p in zip((a, b), points, strict=True)])
            alike.append(float(torch.corrcoef(both)[0, 1]))
    return statistics.mean(apart), statistics.mean(alike)


def smoothed(x, inside, size: int):
    """(n, c, H, W) averaged over size x size pixels, of the object alone."""
    import torch.nn.functional as F

    def mean(y):
        return F.avg_pool2d(y, size, 1, size // 2)

    return mean(x * inside) / mean(inside).clamp_min(1e-6)


def shown(x, at):
    """(c, H, W) at points (m, 2) -> (c, m)."""
    height, width = x.shape[1:]
    return x[:, (at[:, 1] * height).long(), (at[:, 0] * width).long()]
