"""Learning a style as LoRA (Hu et al. 2022), plainly or by contrast: low-rank changes of the model's linear layers.

Both groups of a batch pass through the network together, and each sees its own copy of the matrices: the rows of a layer's
input are dealt out to the groups, so that one backward gives every group its own gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .contrast import Contrast, Settings, Tensors
from .latents import Draw
from .losses import WEIGHTINGS
from .protocols import Conditioning, Denoiser

DOWN, UP = ".lora_down.weight", ".lora_up.weight"  # as ComfyUI and most trainers name them
HELD = 4  # one in so many pictures of a batch is also looked at without a prompt
PROBE = 3  # rows of the batch that finds the layers; 1 and 2 could be other things


def layers_of_the_batch(network: nn.Module, forward: Callable[[int], object]) -> list[str]:
    """Names of the linear layers whose input has a row for every picture, found by watching `forward(rows)`.

    Others (a table of places, one guidance for all) see rows that belong to no picture: a group's gradient could not be told.
    """
    seen: dict[str, bool] = {}
    with contextlib.ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):

                def watch(_, given, name=name):
                    seen[name] = seen.get(name, True) and given[0].ndim > 1 and len(given[0]) == PROBE

                stack.callback(module.register_forward_pre_hook(watch).remove)
        forward(PROBE)
    return [name for name, whole in seen.items() if whole]


def starting_matrices(network: nn.Module, names: list[str], rank: int, seed: int) -> Tensors:
    """Down (rank, in) at random and up (out, rank) of zeros for each layer: no change at the beginning. Rank is at most what
    the layer has room for."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name in names:
        layer = network.get_submodule(name)
        fitting = min(rank, layer.in_features, layer.out_features)
        down = torch.rand(fitting, layer.in_features, generator=generator) * 2 - 1
        matrices[name + DOWN] = (down / layer.in_features**0.5).to(layer.weight.device)
        matrices[name + UP] = torch.zeros(layer.out_features, fitting, device=layer.weight.device)
    return matrices


@contextlib.contextmanager
def applied(network: nn.Module, groups: list[Tensors]) -> Iterator[None]:
    """The layers with up (down x) added to what they give; the rows of x are dealt out to the groups in order."""

    def hook(name: str):
        def add(_, given, out):
            parts = given[0].chunk(len(groups))
            low = [
                F.linear(F.linear(x, g[name + DOWN].to(x)), g[name + UP].to(x))
                for x, g in zip(parts, groups, strict=True)
            ]
            return out + torch.cat(low)

        return add

    names = [key.removesuffix(UP) for key in groups[0] if key.endswith(UP)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(network.get_submodule(name).register_forward_hook(hook(name)).remove)
        yield


class StyleLora(Contrast):
    """Captions are plain text and the text encoder is frozen, so what it says of each is computed once."""

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
        with applied(self.network, groups):
            return super().error(latents, noise, sigma, captions, groups)

    def _losses(self, batch: Draw, captions: list[str], groups: list[Tensors]) -> torch.Tensor:
        """With `hold`, the first group's loss grows by how far the changed model is from the unchanged one on noisy pictures
        without a prompt. Guidance paints the difference between prompt and none: if a LoRA moved both alike, more guidance
        would not strengthen what it learned."""
        losses = super()._losses(batch, captions, groups)
        if not self.settings.hold:
            return losses
        count = max(1, len(batch.rows) // HELD)
        rows = self.latents[batch.rows[:count]], batch.noise[:count], batch.sigma[:count]
        nothing = self.conditions([""] * count, [{}])
        with torch.no_grad():
            before = self.denoiser.error(*rows, nothing)
        with applied(self.network, groups[:1]):
            drift = self.denoiser.error(*rows, nothing) - before
        weights = WEIGHTINGS[self.settings.weighting](self.denoiser.snr(rows[2]))
        held = (drift.float().square().flatten(1).mean(1) * weights).mean()
        return torch.cat([losses[:1] + self.settings.hold * held, losses[1:]])

    def size(self) -> dict[str, float]:
        """`norm`: Frobenius norm of all changes up @ down together."""
        with torch.no_grad():
            changes = [
                (self.learned[key].T @ self.learned[key] * (d @ d.T)).sum()
                for key in self.learned
                if key.endswith(UP)
                for d in [self.learned[key.removesuffix(UP) + DOWN]]
            ]
        return {"norm": sum(changes).clamp_min(0).sqrt().item()}
