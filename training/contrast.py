"""Learning by contrast with negatives, whatever is learned: the vectors of a word, or the matrices of a LoRA.

A negative is a picture of the same content in a generic style. The gradient of the denoising loss on a negative says what
the pair has in common; what is removed from the positive's gradient is not learned.

`plain`            no negatives
`paper`            NSYNC (arXiv 2511.01517): g+ - proj(g+ on g-), both gradients at the current state, every step
`reference point`  ours: the negative gradient is taken at the starting point, averaged over steps, and removed only where
                   it points the same way; at the current point it would soon ask to undo the style itself

What one variant does differently is said in `combine` (of the two gradients) and `move` (of what is learned).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .gradients import dot, project_out, signal_to_noise
from .latents import Draw, draw
from .loop import Diverged
from .losses import WEIGHTINGS
from .memory import OVER_REMEMBERED, Kept, remembered
from .protocols import Conditioning, Denoiser

METHODS = ("plain", "paper", "reference point")
PATIENCE = 10  # steps in a row without a finite gradient before it is called diverged
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
    empty: float = 0.0  # of a LoRA: share of captions that are left empty
    weighting: str = "low frequencies"
    average: float = 0.9  # of the negative gradient over steps, `reference point` only
    seed: int = 0

    def learning_rates(self, names: Iterable[str]) -> dict[str, float]:
        """By tensor; one of `dog/clip_l` is learned at the rate of clip_l."""
        rate = self.learning_rate
        return {k: rate[k.rpartition("/")[2]] if isinstance(rate, dict) else rate for k in names}


class Contrast:
    """A trainer for the loop. Latents (n, C, H, W); negatives[i] is the pair of picture i. What is learned are `start`'s
    tensors; a kind of training says in `conditions` and `error` how they reach the model, and in `size` how far they have come."""

    learned_inside = False  # what is learned acts inside the network, not on what it is told
    watch_every = 0  # steps between looks at each picture's own gradient; 0 never looks

    def __init__(self, denoiser: Denoiser, latents: torch.Tensor, captions: list[list[str]], start: Tensors,
                 settings: Settings, negatives: torch.Tensor | None = None, masks: torch.Tensor | None = None):  # fmt: skip
        """`captions[i]` are the ways of captioning picture i; each draw takes one of them, or "". They are texts, or whatever else
        `conditions` understands. Where `masks` (n, 1, H, W), 0..1, are 0,
        the pictures teach nothing; negatives are looked at whole."""
        self.denoiser, self.settings = denoiser, settings
        self.latents, self.negatives, self.captions, self.masks = latents, negatives, captions, masks
        self.start = {k: v.detach().clone() for k, v in start.items()}
        self.learned = {k: v.detach().clone().requires_grad_() for k, v in start.items()}
        rates = settings.learning_rates(self.learned)
        groups = [{"params": [self.learned[k]], "lr": rate, "most": rate} for k, rate in rates.items()]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.average = {k: torch.zeros_like(v) for k, v in self.start.items()}
        self.averaged = 0
        self.skipped, self.in_a_row = 0, 0  # steps whose gradient was not finite
        self.contrastive = settings.method != "plain" and settings.strength > 0
        if self.contrastive and negatives is None:
            raise ValueError(f"The method {settings.method!r} contrasts with negatives, and there are none.")

    def conditions(self, captions: list[str], groups: list[Tensors]) -> Conditioning:
        """What the model is told of the captions; each group has an equal share of them, in order."""
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
        captions = self._pick_captions(batch.rows, generator)
        apart = bool(self.watch_every) and i % self.watch_every == 0 and len(batch.rows) > 1
        loss, positive, negative, said = self._gradients(batch, captions, apart)
        said["loss"] = loss
        if all(g.isfinite().all() for g in [*positive, *negative]) and math.isfinite(loss):
            update = positive
            if self.contrastive:
                update, contrast = self.combine(positive, negative)
                said |= contrast
            said["gradient"] = dot(update, update).sqrt().item()
            self.move(update, self._schedule(i))
            self.in_a_row = 0
        else:
            self._skip(i)
        return {**said, **self.size(), "skipped": self.skipped}

    def idle(self) -> list[str]:
        """Names of tensors that never moved: nothing that was read depends on them."""
        return [k for k, v in self.learned.items() if v.equal(self.start[k])]

    def combine(self, positive: list[torch.Tensor], negative: list[torch.Tensor]
                ) -> tuple[list[torch.Tensor], dict[str, float]]:  # fmt: skip
        """What is left of the pictures' gradient, and what was done to it."""
        reference = self.settings.method == "reference point"
        if reference:
            negative = self._averaged(negative)
        return project_out(positive, negative, self.settings.strength, reference, self.settings.together)

    def move(self, gradients: list[torch.Tensor], share: float) -> None:
        """One step of Adam at a share of the learning rate."""
        for leaf, gradient in zip(self.learned.values(), gradients, strict=True):
            leaf.grad = gradient.to(leaf)
        for group in self.optimiser.param_groups:
            group["lr"] = group["most"] * share
        self.optimiser.step()

    def _skip(self, i: int) -> None:
        """Nothing moves. One bad picture or noise may come in any run; many in a row are a training that has diverged."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == PATIENCE:
            raise Diverged(f"The loss was not a number for {PATIENCE} steps in a row, the last of them step {i + 1}")

    def _pick_captions(self, rows: list[int], generator: torch.Generator) -> list[str]:
        """One number for each picture: below `empty` none of its ways, and the rest of the line shared out among them."""
        picks, empty = torch.rand(len(rows), generator=generator).tolist(), self.settings.empty
        ways = (self.captions[r] for r in rows)
        return [
            "" if p < empty else w[int((p - empty) / (1 - empty) * len(w))] for w, p in zip(ways, picks, strict=True)
        ]

    def memory_per_picture(self, blocks: Iterable[nn.Module] = ()) -> Kept:
        """Bytes that each picture of a batch, with its negative, adds to a step: from forward passes of 2 and of 1."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        counts, blocks = [], list(blocks)
        for n in (2, 1):
            batch = draw(self.latents, self.denoiser, n, generator)
            captions, parts = [self.captions[0][0]] * n, n if self.watch_every else 1
            counts.append(remembered(lambda b=batch, c=captions, p=parts: self._losses(b, c, self._groups(p)), blocks))
        return Kept(*((two - one) * OVER_REMEMBERED for two, one in zip(*counts, strict=True)))

    def _gradients(self, batch: Draw, captions: list[str], apart: bool = False
                   ) -> tuple[float, list[torch.Tensor], list[torch.Tensor], dict[str, float]]:  # fmt: skip
        """Loss and gradients of the pictures and of the negatives from one forward and one backward. With `apart` every picture has
        leaves of its own, and how much of a step is signal is said too."""
        groups = self._groups(len(batch.rows) if apart else 1)
        losses = self._losses(batch, captions, groups)
        losses.sum().backward()  # not `grad`, which checkpointed blocks do not allow; nothing else requires a gradient
        # What no caption of this batch says has no gradient.
        rows = [[torch.zeros_like(v) if v.grad is None else v.grad for v in group.values()] for group in groups]
        half = len(rows) // (2 if self.contrastive else 1)
        said = {"signal": signal_to_noise(rows[:half])} if apart else {}
        positive, negative = (
            [sum(gs) / half for gs in zip(*part, strict=True)] if apart else [g for gs in part for g in gs]
            for part in (rows[:half], rows[half:])
        )
        return losses[:half].mean().item(), positive, negative, said

    def _groups(self, parts: int) -> list[Tensors]:
        """Leaves where the pictures see what is learned, `parts` times, and where the negatives do."""
        places = [self.learned] * parts
        if self.contrastive:
            places += [self.start if self.settings.method == "reference point" else self.learned] * parts
        return [{k: v.detach().clone().requires_grad_() for k, v in place.items()} for place in places]

    def _losses(self, batch: Draw, captions: list[str], groups: list[Tensors]) -> torch.Tensor:
        """(groups) the weighted loss of the pictures, and of the negatives under the same noise."""
        pictures = [self.latents[batch.rows]] + ([self.negatives[batch.rows]] if self.contrastive else [])
        kinds = len(pictures)
        latents, noise, sigma = torch.cat(pictures), torch.cat([batch.noise] * kinds), torch.cat([batch.sigma] * kinds)
        error = self.error(latents, noise, sigma, captions * kinds, groups).float().square()
        if self.masks is not None:
            error = error * self._shares(batch.rows, kinds)
        weights = WEIGHTINGS[self.settings.weighting](self.denoiser.snr(sigma))
        return (error.flatten(1).mean(1) * weights).view(len(groups), -1).mean(1)

    def _shares(self, rows: list[int], kinds: int) -> torch.Tensor:
        """(B, 1, H, W) masks with a mean of 1, so that a small mask does not mean a small loss."""
        masks = self.masks[rows]
        shares = masks / masks.flatten(1).mean(1).view(-1, 1, 1, 1)
        return torch.cat([shares, torch.ones_like(shares)][:kinds])

    def _averaged(self, negative: list[torch.Tensor]) -> list[torch.Tensor]:
        """The running mean of the negative gradient with this step's; its length does not matter to a projection."""
        keep = self.settings.average
        mean = [m * keep + g.to(m) * (1 - keep) for m, g in zip(self.average.values(), negative, strict=True)]
        self.average, self.averaged = dict(zip(self.average, mean, strict=True)), self.averaged + 1
        return mean

    def _schedule(self, i: int) -> float:
        """Share of the learning rate: ten steps of warm-up, then a line down to a tenth."""
        return min(1, (i + 1) / 10) * (1 - 0.9 * i / self.settings.steps)

    def state_dict(self) -> dict:
        return {
            "learned": dict(self.learned),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "averaged": self.averaged,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for k, v in state["learned"].items():
                self.learned[k].copy_(v)
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = {k: v.to(self.average[k]) for k, v in state["average"].items()}
        self.averaged, self.skipped, self.in_a_row = state["averaged"], state["skipped"], state["in_a_row"]
