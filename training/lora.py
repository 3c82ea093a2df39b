"""Learning a style as LoRA (Hu et al. 2022), plainly or by contrast: low-rank changes of the model's layers, convolutions too.

Both groups of a batch pass through the network together, and each sees its own copy of the matrices: the rows of a layer's
input are dealt out to the groups, so that one backward gives every group its own gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .contrast import Contrast, Settings, Tensors
from .protocols import Conditioning, Denoiser

DOWN, UP = ".lora_down.weight", ".lora_up.weight"  # as ComfyUI and most trainers name them
PROBE = 3  # rows of the batch that finds the layers; 1 and 2 could be other things


def layers_of_the_batch(network: nn.Module, forward: Callable[[int], object]) -> list[str]:
    """Names of the layers whose input has a row for every picture, found by watching `forward(rows)`.

    Others (a table of places, one guidance for all) see rows that belong to no picture: a group's gradient could not be told.
    """
    seen: dict[str, bool] = {}
    with contextlib.ExitStack() as stack:
        for name, module in network.named_modules():
            if _is_linear(module) or (isinstance(module, nn.Conv2d) and module.groups == 1):

                def watch(_, given, name=name):
                    seen[name] = seen.get(name, True) and given[0].ndim > 1 and len(given[0]) == PROBE

                stack.callback(module.register_forward_pre_hook(watch).remove)
        forward(PROBE)
    return [name for name, whole in seen.items() if whole]


def _is_linear(layer: nn.Module) -> bool:
    """ComfyUI's layers with scaled 8 bit weights are linear too, and no nn.Linear."""
    return hasattr(layer, "in_features") and getattr(getattr(layer, "weight", None), "ndim", 0) == 2


def starting_matrices(network: nn.Module, names: list[str], rank: int, seed: int) -> Tensors:
    """Down (rank, in) at random and up (out, rank) of zeros for each layer: no change at the beginning. Rank is at most what
    the layer has room for. A convolution's have its kernel, (rank, in, h, w), and one of a single place, (out, rank, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name in names:
        layer = network.get_submodule(name)
        out, *kernel = (layer.out_features, layer.in_features) if _is_linear(layer) else layer.weight.shape
        inputs = math.prod(kernel)
        fitting = min(rank, out, inputs)
        down = torch.rand(fitting, *kernel, generator=generator) * 2 - 1
        matrices[name + DOWN] = (down / inputs**0.5).to(layer.weight.device)
        matrices[name + UP] = torch.zeros(out, fitting, *[1] * (len(kernel) - 1), device=layer.weight.device)
    return matrices


def low_rank(layer: nn.Module, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up (down x), as the layer itself reads x."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(F.conv2d(x, down.to(x), None, layer.stride, layer.padding, layer.dilation), up.to(x))
    return F.linear(F.linear(x, down.to(x)), up.to(x))


@contextlib.contextmanager
def applied(network: nn.Module, groups: list[Tensors]) -> Iterator[None]:
    """The layers with up (down x) added to what they give; the rows of x are dealt out to the groups in order."""

    def hook(name: str):
        def add(layer, given, out):
            parts = given[0].chunk(len(groups))
            low = [low_rank(layer, x, g[name + DOWN], g[name + UP]) for x, g in zip(parts, groups, strict=True)]
            return out + torch.cat(low)

        return add

    names = [key.removesuffix(UP) for key in groups[0] if key.endswith(UP)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(network.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield


class StyleLora(Contrast):
    """Captions are plain text and the text encoder is frozen, so what it says of each is computed once.

    Some are left empty (`Settings.empty`): guidance paints the difference between a prompt and none, and a picture without a prompt
    that drifts on its own, or is held where it was, makes that difference too large or takes the style out of it.
    """

    learned_inside = True

    def __init__(self, denoiser: Denoiser, network: nn.Module, encode: Callable[[str], Conditioning], latents: torch.Tensor,
                 captions: list[list[str]], start: Tensors, settings: Settings, negatives: torch.Tensor | None = None,
                 masks: torch.Tensor | None = None):  # fmt: skip
        """`network` is the module inside the denoiser in which the layers lie; `encode(caption)` gives one row."""
        super().__init__(denoiser, latents, captions, start, settings, negatives, masks)
        self.network, self.encode = network, encode
        self.known: dict[str, Conditioning] = {}

    def conditions(self, captions: list[str], groups: list[Tensors]) -> Conditioning:
        for caption in dict.fromkeys(captions):
            if caption not in self.known:
                with torch.no_grad():
                    self.known[caption] = self.encode(caption)
        return Conditioning.stacked([self.known[c] for c in captions])

    def error(self, latents, noise, sigma, captions: list[str], groups: list[Tensors]) -> torch.Tensor:
        cond = self.conditions(captions, groups)

        def error(rows: list[int]) -> torch.Tensor:  # of every group as many, as all have the same captions
            with applied(self.network, groups):
                return self.denoiser.error(latents[rows], noise[rows], sigma[rows], cond.expand(rows))

        return cond.by_length(error)

    def idle(self) -> list[str]:
        """Nothing to tell: in some networks (Qwen-Image) the text of the last block reaches no picture, whatever is learned."""
        return []

    def size(self) -> dict[str, float]:
        """`norm`: Frobenius norm of all changes up @ down together."""
        with torch.no_grad():
            pairs = [
                (up, self.learned[key.removesuffix(UP) + DOWN]) for key, up in self.learned.items() if key.endswith(UP)
            ]
            changes = [(u.T @ u * (d @ d.T)).sum() for u, d in ((up.flatten(1), down.flatten(1)) for up, down in pairs)]
        return {"norm": sum(changes).clamp_min(0).sqrt().item()}
