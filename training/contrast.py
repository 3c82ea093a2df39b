"""Learning by contrast with negatives, whatever is learned: the vectors of a word, or the matrices of a LoRA.

A negative is a picture of the same content in a generic style. The gradient of the denoising loss on a negative says what
the pair has in common; what is removed from the positive's gradient is not learned.

`plain`            no negatives
`paper`            NSYNC (arXiv 2511.01517): g+ - proj(g+ on g-), both gradients at the current state, every step
`reference point`  ours: the negative gradient is taken at the starting point, averaged over steps, and removed only where
                   it points the same way; at the current point it would soon ask to undo the style itself
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .gradients import dot, project_out
from .latents import Draw, draw
from .loop import Diverged
from .losses import WEIGHTINGS
from .memory import OVER_REMEMBERED, remembered
from .protocols import Denoiser

METHODS = ("plain", "paper", "reference point")
Tensors = dict[str, torch.Tensor]


@dataclass
class Settings:
    """Everything that decides the result beside the pictures, the captions and the start."""

    method: str = "reference point"
    strength: float = 1.0  # 0..1, share of the common direction that is removed; 0 is plain, bit for bit
    steps: int = 200
    batch: int = 8  # positives per step; as many negatives join them in the same pass
    learning_rate: float | dict[str, float] = (
        0.02  # one for all encoders, or each its own: their vectors differ in scale
    )
    keep_norm: bool = False  # of a word: rescale each vector to its starting length after every step
    together: bool = False  # project over all tensors at once, not over each by itself
    hold: float = 0.0  # of a LoRA: weight of staying where it was without a prompt
    weighting: str = "low frequencies"
    average: float = 0.9  # of the negative gradient over steps, `reference point` only
    seed: int = 0

    def learning_rates(self, encoders: Iterable[str]) -> dict[str, float]:
        rate = self.learning_rate
        return {k: rate[k] if isinstance(rate, dict) else rate for k in encoders}


class Contrast:
    """A trainer for the loop. Latents (n, C, H, W); negatives[i] is the pair of picture i. What is learned are `start`'s
    tensors; a kind of training says in `conditions` and `error` how they reach the model, and in `size` how far they have come."""

    def __init__(self, denoiser: Denoiser, latents: torch.Tensor, captions: list[list[str]], start: Tensors,
                 settings: Settings, negatives: torch.Tensor | None = None):  # fmt: skip
        """`captions[i]` are the ways of captioning picture i; each draw takes one of them."""
        self.denoiser, self.settings = denoiser, settings
        self.latents, self.negatives, self.captions = latents, negatives, captions
        self.start = {k: v.detach().clone() for k, v in start.items()}
        self.learned = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
        rates = settings.learning_rates(self.learned)
        groups = [{"params": [self.learned[k]], "lr": rate, "most": rate} for k, rate in rates.items()]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.average = {k: torch.zeros_like(v) for k, v in self.start.items()}
        self.averaged = 0
        self.contrastive = settings.method != "plain" and settings.strength > 0
        if self.contrastive and negatives is None:
            raise ValueError(f"The method {settings.method!r} contrasts with negatives, and there are none.")

    def conditions(self, captions: list[str], groups: list[Tensors]):
        """What the model is told of the captions, once for each group."""
        raise NotImplementedError

    def error(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, captions: list[str], groups: list[Tensors]
              ) -> torch.Tensor:  # fmt: skip
        """The denoiser's error of rows that are stacked group by group, each group with leaves of its own."""
        return self.denoiser.error(latents, noise, sigma, self.conditions(captions, groups))

    def size(self) -> dict[str, float]:
        """How large what was learned is."""
        raise NotImplementedError

    def step(self, i: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + i)
        batch = draw(self.latents, self.denoiser, self.settings.batch, generator)
        loss, positive, negative = self._gradients(batch, self._pick_captions(batch.rows, generator))
        said = {"loss": loss}
        if self.contrastive:
            average = self._reference(negative) if self.settings.method == "reference point" else None
            negative = average or negative
            one_sided = self.settings.method == "reference point"
            positive, contrast = project_out(
                positive, negative, self.settings.strength, one_sided, self.settings.together
            )
            said |= contrast
        size = dot(positive, positive).sqrt().item()
        if not (math.isfinite(loss) and math.isfinite(size)):
            raise Diverged(f"The loss of step {i + 1} is not a number")
        if self.contrastive and average:
            self.average, self.averaged = dict(zip(self.average, average, strict=True)), self.averaged + 1
        for leaf, gradient in zip(self.learned.values(), positive, strict=True):
            leaf.grad = gradient.to(leaf)
        for group in self.optimiser.param_groups:
            group["lr"] = group["most"] * self._schedule(i)
        self.optimiser.step()
        self.after_step()
        return {**said, "gradient": size, **self.size()}

    def after_step(self) -> None:
        """What is done to the tensors once they have moved."""

    def _pick_captions(self, rows: list[int], generator: torch.Generator) -> list[str]:
        picks = torch.rand(len(rows), generator=generator).tolist()
        return [ways[int(p * len(ways))] for ways, p in zip((self.captions[r] for r in rows), picks, strict=True)]

    def memory_per_picture(self) -> float:
        """Bytes that each picture of a batch, with its negative, adds to a step: from forward passes of 2 and of 1."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        counts = []
        for n in (2, 1):
            batch = draw(self.latents, self.denoiser, n, generator)
            captions = [self.captions[0][0]] * n
            counts.append(remembered(lambda b=batch, c=captions: self._losses(b, c, self._groups())))
        return (counts[0] - counts[1]) * OVER_REMEMBERED

    def _gradients(self, batch: Draw, captions: list[str]) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
        """Gradients of both groups from one forward and one backward: each group has leaves of its own."""
        groups = self._groups()
        losses = self._losses(batch, captions, groups)
        gradients = torch.autograd.grad(losses.sum(), [leaf for group in groups for leaf in group.values()])
        count = len(groups[0])
        return losses[0].item(), list(gradients[:count]), list(gradients[count:])

    def _groups(self) -> list[Tensors]:
        """Leaves where the positives see what is learned, and where the negatives do."""
        places = [self.learned]
        if self.contrastive:
            places.append(self.start if self.settings.method == "reference point" else self.learned)
        return [{k: v.detach().clone().requires_grad_() for k, v in place.items()} for place in places]

    def _losses(self, batch: Draw, captions: list[str], groups: list[Tensors]) -> torch.Tensor:
        """(groups) the weighted loss of the positives, and of the negatives under the same noise."""
        pictures = [self.latents[batch.rows]] + ([self.negatives[batch.rows]] if self.contrastive else [])
        latents, noise, sigma = (
            torch.cat(pictures),
            torch.cat([batch.noise] * len(groups)),
            torch.cat([batch.sigma] * len(groups)),
        )
        error = self.error(latents, noise, sigma, captions, groups)
        weights = WEIGHTINGS[self.settings.weighting](self.denoiser.snr(sigma))
        return (error.float().square().flatten(1).mean(1) * weights).view(len(groups), -1).mean(1)

    def _reference(self, negative: list[torch.Tensor]) -> list[torch.Tensor]:
        """The running mean of the negative gradient with this step's; its length does not matter to a projection."""
        keep = self.settings.average
        return [m * keep + g.to(m) * (1 - keep) for m, g in zip(self.average.values(), negative, strict=True)]

    def _schedule(self, i: int) -> float:
        """Share of the learning rate: ten steps of warm-up, then a line down to a tenth."""
        return min(1, (i + 1) / 10) * (1 - 0.9 * i / self.settings.steps)

    def state_dict(self) -> dict:
        return {
            "learned": dict(self.learned),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "averaged": self.averaged,
        }

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for k, v in state["learned"].items():
                self.learned[k].copy_(v)
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = {k: v.to(self.average[k]) for k, v in state["average"].items()}
        self.averaged = state["averaged"]
