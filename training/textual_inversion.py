"""Learning a word (textual inversion, Gal et al. 2022), plainly or by contrast: what is learned are vectors in captions."""

from __future__ import annotations

import torch

from .contrast import METHODS, Contrast, Settings
from .protocols import Conditioning, Denoiser, TextEncoder, Vectors

__all__ = ["METHODS", "Settings", "TextualInversion"]


class TextualInversion(Contrast):
    """Captions (n) have `{token}` where the vectors stand."""

    def __init__(self, denoiser: Denoiser, encoder: TextEncoder, latents: torch.Tensor, captions: list[list[str]],
                 start: Vectors, settings: Settings, negatives: torch.Tensor | None = None):  # fmt: skip
        self.encoder = encoder
        super().__init__(denoiser, latents, captions, start, settings, negatives)

    @property
    def vectors(self) -> Vectors:
        return self.learned

    def conditions(self, captions: list[str], groups: list[Vectors]) -> Conditioning:
        return self.encoder.encode(captions * len(groups), [leaves for leaves in groups for _ in captions])

    def size(self) -> dict[str, float]:
        """`norm`: length of the vectors relative to their start, mean over vectors and encoders."""
        ratios = [
            (v.detach().norm(dim=1) / self.start[k].norm(dim=1).clamp_min(1e-12)).mean()
            for k, v in self.vectors.items()
        ]
        return {"norm": (sum(ratios) / len(ratios)).item()}

    @torch.no_grad()
    def after_step(self) -> None:
        if self.settings.keep_norm:
            for k, v in self.vectors.items():
                v.mul_(self.start[k].norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True).clamp_min(1e-12))
