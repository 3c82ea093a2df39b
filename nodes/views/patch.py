"""Warping as a patch of ComfyUI's models: of features, on their way into self-attention; or of latents, around the whole model."""

from __future__ import annotations

import logging

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP

from .correspondences import Correspondences, found
from .warp import Step, steps, warped, warped_maps

log = logging.getLogger("counterpoint")
KEY = "counterpoint.feature_warp"
GRID, WHOLE = f"{KEY}.grid", f"{KEY}.whole"  # tokens of this call; latents of the whole picture
OVERRIDE = "optimized_attention_override"
FEATURES, LATENTS = MODES = ("features", "latents")


def with_feature_warp(model, matches: Correspondences, strength: float, start: float, end: float, mode: str = FEATURES):
    """A clone of a MODEL that makes the views of a batch agree between two shares of the sampling, 0..1; the model itself at strength 0.

    Raises ValueError for correspondences that are empty, and for a model in which features cannot be warped.
    """
    if mode not in MODES:
        raise ValueError(f"Feature Warp has no mode {mode!r}: choose {FEATURES} or {LATENTS}.")
    found(matches, "Feature Warp would do nothing. Look at the views with Draw Correspondences")
    network = model.model.diffusion_model
    kind = LatentWarp if mode == LATENTS else _kind(network)
    if kind is None:
        raise ValueError(
            f"Feature Warp cannot warp the features of {type(model.model).__name__} with {type(network).__name__}: use SD 1.5, SD 2, SDXL, "
            f"SD 3, FLUX, Qwen-Image or Pocket, or the mode {LATENTS}, for which any model of pictures will do."
        )
    if strength == 0:
        return model
    sampling, clone = model.get_model_object("model_sampling"), model.clone()
    warp = kind(matches, strength, sampling.percent_to_sigma(start), sampling.percent_to_sigma(end))
    warp.install(clone, network)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, warp.look)
    return clone


def _kind(network: torch.nn.Module) -> type[FeatureWarp] | None:
    if any(isinstance(part, SpatialVideoTransformer) for part in network.modules()):  # rows are the frames of a film
        return None
    return next((kind for known, kind in KINDS.items() if isinstance(network, known)), None)


class Warp:
    """What both kinds know: when they act, and what goes where on each grid. A batch holds one set of views after the other."""

    def __init__(self, matches: Correspondences, strength: float, most: float, least: float):
        """Acts from noise level `most` down to `least`, which is left out."""
        self.matches, self.strength, self.most, self.least = matches, strength, most, least
        self._plans: dict[tuple, list[Step]] = {}

    def active(self, sigma: torch.Tensor) -> bool:
        return self.least < float(sigma.flatten()[0]) <= self.most

    def look(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Around one whole sampling."""
        if not any(self.active(sigma) for sigma in sigmas[:-1]):
            log.warning(
                "Feature Warp does nothing here: `start` and `end` count from pure noise, and this sampling, which begins later where a "
                "picture is painted over (denoise), has no step between them. Raise `end`."
            )
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def plan(self, height: int, width: int, device: torch.device) -> list[Step]:
        key = height, width, device
        if key not in self._plans:
            plan = steps(self.matches, height, width)
            self._plans[key] = [Step(v, to.to(device), s, origins.to(device)) for v, to, s, origins in plan]
        return self._plans[key]

    def sets(self, x: torch.Tensor, prompts: int = 1) -> tuple[torch.Tensor, ...]:
        """Rows of each set of views; each prompt of a batch, with and without guidance, has them all."""
        count, odd = divmod(len(x), prompts)
        if odd or count % self.matches.views or not count:
            raise ValueError(
                f"Feature Warp knows {self.matches.views} views, and {len(x) if odd else count} pictures are painted together: make the "
                "batch as many, or a multiple, and let nothing cut it into pieces."
            )
        return x.split(self.matches.views)


class FeatureWarp(Warp):
    """Tokens on their way into self-attention, before anything else attends to them."""

    def install(self, clone, network) -> None:
        self.patch = getattr(network, "patch_size", 1)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.tell_whole)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.tell_grid)

    def tell_whole(self, executor, x, timestep, model_options=None, seed=None):
        options = model_options or {}
        told = {**options.get("transformer_options", {}), WHOLE: x.shape[-2:]}
        return executor(x, timestep, {**options, "transformer_options": told}, seed)

    def tell_grid(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds
    ):
        options = transformer_options or {}
        if options.get(WHOLE, x.shape[-2:]) != x.shape[-2:]:
            raise ValueError(
                "Feature Warp cannot be combined with prompts for an area of the picture: take one or the other."
            )
        told = self.told({**options, GRID: tuple(-(-side // self.patch) for side in x.shape[-2:])})
        return executor(x, t, c_concat, c_crossattn, control, told, **conds)

    def told(self, options: dict) -> dict:
        return options

    def tokens(
        self, x: torch.Tensor, grid: tuple[int, int], options: dict, axis: int = 1, first: int | None = None
    ) -> torch.Tensor:
        """Rows with image tokens along `axis`, from number `first` on, and words or references around them; None where there are none."""
        begin, count = first or 0, grid[0] * grid[1]
        rest = x.shape[axis] - begin - count
        if rest < 0 or (first is None and rest):
            raise ValueError(
                f"Feature Warp found {x.shape[axis] - begin} tokens where the picture has {count}: another patch rearranges them (HyperTile "
                "for one). Take it out of the graph."
            )
        plan = self.plan(*grid, x.device)
        before, own, after = x.split([begin, count, rest], axis)
        own = [warped(views, plan, self.strength, axis) for views in self.sets(own, len(options["cond_or_uncond"]))]
        return torch.cat([before, torch.cat(own), after], axis)


class UNetWarp(FeatureWarp):
    """Before the projections of each layer of self-attention."""

    def install(self, clone, network) -> None:
        super().install(clone, network)
        self.patch = 1
        clone.set_model_attn1_patch(self)

    def __call__(self, n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, options: dict):
        if not self.active(options["sigmas"]):
            return n, context, value
        grid = tuple(options["activations_shape"][-2:])
        own = self.tokens(n, grid, options)
        return own, *(
            own if x is n else self.tokens(x, grid, options) if x.shape == n.shape else x for x in (context, value)
        )


class RotaryWarp(FeatureWarp):
    """Queries, keys and values of FLUX and Qwen-Image, before they have positions: the same as before the projections, which look at
    each token by itself, where all of a token is taken over."""

    def install(self, clone, network) -> None:
        super().install(clone, network)
        clone.set_model_attn1_patch(self)

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None) -> dict:
        if not self.active(extra_options["sigmas"]):
            return {}
        words = extra_options["img_slice"][0]
        return {
            name: self.tokens(x, extra_options[GRID], extra_options, 2, words)
            for name, x in zip("qkv", (q, k, v), strict=True)
        }


class MMDiTWarp(FeatureWarp):
    """Queries, keys and values of SD 3, which have no positions of their own. Whoever stands in the place of attention comes after it,
    in whichever order the patches were made."""

    def told(self, options: dict) -> dict:
        return {**options, OVERRIDE: Outermost(self, options.get(OVERRIDE))}


class Outermost:
    def __init__(self, warp: MMDiTWarp, before):
        self.warp, self.before = warp, before

    def __call__(self, function, q, k, v, heads, *args, **more) -> torch.Tensor:
        options = more["transformer_options"]
        if self.warp.active(options["sigmas"]):
            grid, axis = options[GRID], 2 if more.get("skip_reshape") else 1
            words = q.shape[axis] - grid[0] * grid[1]
            q, k, v = (self.warp.tokens(x, grid, options, axis, words) for x in (q, k, v))
        if self.before is not None:
            return self.before(function, q, k, v, heads, *args, **more)
        return function(q, k, v, heads, *args, **more)


class LatentWarp(Warp):
    """Noise at the start, and what the model makes of it at each step: for Euler the same as warping the noisy latents at each step, as
    the reference does, since a warp is linear and done twice is done once.

    At full strength the model is shown warped latents too, which matters where a sampler adds noise on its way.
    """

    def install(self, clone, network) -> None:
        self.kind = type(clone.model).__name__
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.begin)
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self.predict)

    def begin(
        self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):  # fmt: skip
        if self.active(sigmas):
            noise = self.latents(noise, noise=True)
            if latent_image is not None and denoise_mask is None:  # what a mask keeps stays as it is
                latent_image = self.latents(latent_image)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    def predict(self, executor, x, timestep, model_options=None, seed=None):
        if not self.active(timestep):
            return executor(x, timestep, model_options or {}, seed)
        if self.strength == 1:
            x = self.latents(x)
        return self.latents(executor(x, timestep, model_options or {}, seed))

    def latents(self, x: torch.Tensor, noise: bool = False) -> torch.Tensor:
        if x.ndim < 4 or any(side != 1 for side in x.shape[2:-2]):
            raise ValueError(f"Feature Warp needs latents of pictures, and those of {self.kind} are {tuple(x.shape)}.")
        plan = self.plan(*x.shape[-2:], x.device)
        return torch.cat([warped_maps(views, plan, self.strength, noise) for views in self.sets(x)])


KINDS = {UNetModel: UNetWarp, MMDiT: MMDiTWarp, Flux: RotaryWarp, QwenImageTransformer2DModel: RotaryWarp}
