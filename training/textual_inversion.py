"""Learning a word (textual inversion, Gal et al. 2022), plainly or by contrast: what is learned are vectors in captions."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .contrast import METHODS, Contrast, Settings
from .protocols import Conditioning, Denoiser, TextEncoder, Vectors

__all__ = ["METHODS", "Settings", "TextualInversion"]


class TextualInversion(Contrast):
    """Captions (n) have `{token}` where the vectors stand."""

    watch_every = 50

    def __init__(self, denoiser: Denoiser, encoder: TextEncoder, latents: torch.Tensor, captions: list[list[str]],
                 start: Vectors, settings: Settings, negatives: torch.Tensor | None = None, masks: torch.Tensor | None = None,
                 usual: dict[str, float] | None = None):  # fmt: skip
        """`usual` is the median length of an encoder's own words, by the names in `start`."""
        self.encoder, self.usual = encoder, usual or {}
        super().__init__(denoiser, latents, captions, start, settings, negatives, masks)

    @property
    def vectors(self) -> Vectors:
        return self.learned

    def conditions(self, captions: list[str], groups: list[Vectors]) -> Conditioning:
        share = len(captions) // len(groups)
        return self.encoder.encode(captions, [leaves for leaves in groups for _ in range(share)])

    def size(self) -> dict[str, float]:
        """`norm`: length of the vectors relative to their start; `usual`: to the median of the encoder's own words. Means over
        vectors and encoders."""
        lengths = {k: v.detach().norm(dim=1) for k, v in self.vectors.items()}
        return {
            "norm": _mean(v / self.start[k].norm(dim=1).clamp_min(1e-12) for k, v in lengths.items()),
            **({"usual": _mean(lengths[k] / usual for k, usual in self.usual.items())} if self.usual else {}),
        }

    def move(self, gradients: list[torch.Tensor], share: float) -> None:
        super().move(gradients, share)
        if self.settings.keep_norm:
            with torch.no_grad():
                for k, v in self.vectors.items():
                    v.mul_(self.start[k].norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _mean(ratios: Iterable[torch.Tensor]) -> float:
    means = [each.mean() for each in ratios]
    return (sum(means) / len(means)).item()
