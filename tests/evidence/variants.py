"""Rules of learning by contrast that the product does not have, to be measured beside those that it has.

Each is the trainer of a word with one thing changed, for whole runs: what some draw beside the step's own generator is
not in their checkpoints. Import this when the pack has been loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from counterpoint.training.gradients import dot, project_out
from counterpoint.training.latents import draw
from counterpoint.training.textual_inversion import TextualInversion

Gradient = list[torch.Tensor]
SHIPPED = ("v4.1", "v4.2", "v5.0", "v5.1")


def shipped(version: str, positive: Gradient, negative: Gradient, anchor: Gradient | None = None) -> Gradient:
    """What the published code of NSYNC computes, whose second and third gradient contain those before them.

    With N = g+ + g- and A = N + ga: v4.1 g+ - proj(g+ on N); v4.2 the same and g+ once more; v5.0 (g+ + N) / 2;
    v5.1 (g+ + N + A) / 3. All tensors are projected as one vector, as there is one in that code.
    """
    both = [g + n for g, n in zip(positive, negative, strict=True)]
    if version == "v5.0":
        return [(g + n) / 2 for g, n in zip(positive, both, strict=True)]
    if version == "v5.1":
        return [(g + n + (n + a)) / 3 for g, n, a in zip(positive, both, anchor, strict=True)]
    left, _ = project_out(positive, both, together=True)
    return left if version == "v4.1" else [u + g for u, g in zip(left, positive, strict=True)]


class Shipped(TextualInversion):
    """The update that NSYNC's published code makes; `method="paper"` is the one that it describes."""

    def __init__(self, *args, version: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.version, self.own = version, torch.Generator().manual_seed(self.settings.seed)

    def combine(self, positive: Gradient, negative: Gradient):
        anchor = self._anchor() if self.version == "v5.1" else None
        return shipped(self.version, positive, negative, anchor), {"cosine": cosine(positive, negative)}

    def _anchor(self) -> Gradient:
        """The gradient on other pictures, with their own captions and a noise of their own."""
        batch = draw(self.latents, self.denoiser, self.settings.batch, self.own)
        return self._gradients(batch, self._pick_captions(batch.rows, self.own))[1]


class Averaged(TextualInversion):
    """`paper` with a running mean of the negative gradient, which is taken where the word is now."""

    def combine(self, positive: Gradient, negative: Gradient):
        return project_out(positive, self._averaged(negative), self.settings.strength)


class Apart(TextualInversion):
    """Noise and noise level of a negative are not those of its picture, as in NSYNC's published code."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = torch.Generator().manual_seed(self.settings.seed)

    def error(self, latents, noise, sigma, captions, groups):
        half = len(noise) // 2
        noise = torch.cat([noise[:half], torch.randn(noise[half:].shape, generator=self.own)])
        sigma = torch.cat([sigma[:half], self.denoiser.sigmas(half, self.own)])
        return super().error(latents, noise, sigma, captions, groups)


class Constant(TextualInversion):
    """The learning rate as it stands from the first step to the last, and Adam's usual second moment."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.optimiser.param_groups:
            group["betas"] = (0.9, 0.999)

    def _schedule(self, i: int) -> float:
        return 1.0


class StepProjected(TextualInversion):
    """`reference point` for the step that Adam makes instead of the gradient that Adam is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        before_and_after(self, self._project)

    def combine(self, positive: Gradient, negative: Gradient):
        self.reference = self._averaged(negative)
        return positive, {"cosine": cosine(positive, self.reference)}

    def _project(self, before: torch.Tensor, now: torch.Tensor, place: int) -> torch.Tensor:
        left, _ = project_out([before - now], [self.reference[place]], self.settings.strength, one_sided=True)
        return before - left[0]


class Confined(TextualInversion):
    """Plain, but what is learned may not leave the start in the `rank` directions in which the gradients on the negatives,
    taken at the start (so with `method="reference point"`), are largest: their first right singular vectors."""

    def __init__(self, *args, rank: int, gradients: int = 64, **kwargs):
        super().__init__(*args, **kwargs)
        own = torch.Generator().manual_seed(self.settings.seed)
        batches = [self._negatives_at_start(own) for _ in range(gradients)]
        self.contrastive = False
        self.directions = [
            torch.linalg.svd(torch.stack(rows).flatten(1), full_matrices=False).Vh[:rank]
            for rows in zip(*batches, strict=True)
        ]
        before_and_after(self, self._confine)

    def _negatives_at_start(self, generator: torch.Generator) -> Gradient:
        batch = draw(self.latents, self.denoiser, self.settings.batch, generator)
        return self._gradients(batch, self._pick_captions(batch.rows, generator))[2]

    def _confine(self, before: torch.Tensor, now: torch.Tensor, place: int) -> torch.Tensor:
        start, rows = list(self.start.values())[place], self.directions[place]
        moved = (now - start).flatten()
        return start + (moved - rows.T @ (rows @ moved)).view_as(now)


class Bootstrapped(TextualInversion):
    """Plain; half-way, pictures that `paint` makes with the word as it is then join those it is learned from."""

    def __init__(self, *args, paint: Callable[[dict], tuple[torch.Tensor, list[list[str]]]], **kwargs):
        super().__init__(*args, **kwargs)
        self.paint = paint

    def step(self, i: int):
        if i == self.settings.steps // 2:
            pictures, captions = self.paint({k: v.detach().clone() for k, v in self.learned.items()})
            self.latents, self.captions = torch.cat([self.latents, pictures.clone()]), self.captions + captions
        return super().step(i)


def before_and_after(
    trainer: TextualInversion, correct: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> None:
    """Correct every step of the optimiser: `correct(before, now, place)` says where tensor number `place` should be."""
    kept: list[torch.Tensor] = []

    def before(*_):
        kept[:] = [leaf.detach().clone() for leaf in trainer.learned.values()]

    @torch.no_grad()
    def after(*_):
        for place, (was, leaf) in enumerate(zip(kept, trainer.learned.values(), strict=True)):
            leaf.copy_(correct(was, leaf.detach().clone(), place))

    trainer.optimiser.register_step_pre_hook(before)
    trainer.optimiser.register_step_post_hook(after)


def cosine(a: Gradient, b: Gradient) -> float:
    return (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().clamp_min(1e-24)).item()
