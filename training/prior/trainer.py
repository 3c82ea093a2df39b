"""Learning a prior from pairs: how the picture of a caption looks to a CLIP."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..loop import Diverged
from . import measures
from .network import PriorNetwork
from .pairs import Pairs, Texts
from .prior import Prior, Sampling, sampled
from .process import LEVELS, WEIGHTS, Start, noised, schedule
from .starts import StartDistribution

WARM_UP = 100  # steps
LOOKED_AT = 256  # held-out captions, 4 embeddings each
EACH = 4


@dataclass
class Settings:
    """Everything that decides the result beside the pairs and the start distribution."""

    schedule: str = "cosine"
    weight: str = "uniform"
    steps: int = 2000
    batch: int = 64  # captions per step
    draws: int = 4  # noises for each caption; they share the reading of it, which is most of the work
    learning_rate: float = 4e-3
    last: float = (
        5.0  # times as fast the last layer learns, which begins at zero and has to answer numbers of variance 1
    )
    empty: float = 0.1  # share of captions that are left empty, for guidance
    average: float = 0.999  # of the weights over steps; what is kept is the average
    seed: int = 0


def apart(count: int) -> tuple[list[int], list[int]]:
    """Rows to learn from, and rows held out for the measures: a tenth, at most 256; none of fewer than 40. The same whatever is learned
    from them, so that a start distribution that was fitted before has not seen them either."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = min(256, count // 10) if count >= 40 else 0
    return order[held:], order[:held]


class PriorTrainer:
    """A trainer for the loop."""

    def __init__(self, pairs: Pairs, network: PriorNetwork, start: StartDistribution, settings: Settings,
                 device: torch.device | str = "cpu", look_every: int = 0):  # fmt: skip
        """`look_every` so many steps it says how it does on captions that are held out; 0 is never."""
        self.look_every = look_every
        self.pairs, self.settings, self.device = pairs, settings, device
        self.network = network.to(device).train()
        self.prior = Prior(network, start, settings.schedule, text=pairs.text, image=pairs.image, space=pairs.space)
        if len(start.norm.mean) != network.shape.dim:
            raise ValueError(
                f"The start distribution is for embeddings of {len(start.norm.mean)} numbers and these pairs have {network.shape.dim}: fit it "
                "to the same pairs."
            )
        self.rows, self.held = apart(len(pairs))
        if len(self.rows) < settings.batch:
            raise ValueError(
                f"There are {len(self.rows)} pairs to learn from and a step takes {settings.batch}: choose a batch of at most "
                f"{len(self.rows)}, or give more pictures."
            )
        self.units = start.norm.to(device)
        last = list(network.proj_to_clip_embeddings.parameters())
        others = [weight for weight in network.parameters() if all(weight is not each for each in last)]
        rate = settings.learning_rate
        groups = [{"params": others, "most": rate}, {"params": last, "most": rate * settings.last}]
        self.optimiser = torch.optim.AdamW(groups, rate, (0.9, 0.99), weight_decay=0.01)
        self.average = {k: v.detach().clone() for k, v in network.named_parameters()}

    def step(self, i: int) -> dict[str, float]:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + i)
        loss = self.loss(generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        if not math.isfinite(loss.item() + gradient.item()):
            raise Diverged(f"The loss was not a number at step {i + 1}")
        for group in self.optimiser.param_groups:
            group["lr"] = group["most"] * self._share(i)
        self.optimiser.step()
        self._follow(min(settings.average, (1 + i) / (10 + i)))
        looks = self.look_every and (i + 1) % self.look_every == 0
        return {"loss": loss.item(), "gradient": gradient.item(), **(self.look() if looks else {})}

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of x0, in units of the embeddings' own spread, over a batch and its draws."""
        texts, x0, eps, levels, start = self.drawn(generator)
        level = schedule(self.settings.schedule).rows(levels, x0)
        prefix = self.network.read(texts.states, texts.pooled, texts.mask)
        shown = self.units.shown(noised(x0, eps, level, start), level, start)
        missed = self.network(shown, levels, prefix) - self.units.whitened(x0)
        return (missed.square() * WEIGHTS[self.settings.weight](level)).mean()

    def drawn(self, generator: torch.Generator) -> tuple[Texts, torch.Tensor, torch.Tensor, torch.Tensor, Start]:
        """A batch: b texts, and for each draw of each its true embedding (n, d), noise (n, d), level (n) and start."""
        settings, pairs = self.settings, self.pairs
        picked = torch.randint(len(self.rows), (settings.batch,), generator=generator).tolist()
        rows = [self.rows[p] for p in picked]
        texts = self.left_empty(pairs.texts(rows), generator).to(self.device)
        count = settings.batch * settings.draws
        spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        levels = (spread * LEVELS).long().clamp_max(LEVELS - 1).to(self.device)
        eps = torch.randn(count, self.prior.dim, generator=generator).to(self.device)
        x0 = pairs.images[rows].repeat_interleave(settings.draws, 0).to(self.device)
        start = self.prior.start.start(pairs.pooled[rows]).repeated(settings.draws).to(self.device)
        return texts, x0, eps, levels, start

    def left_empty(self, texts: Texts, generator: torch.Generator) -> Texts:
        """Some of them as the empty caption."""
        empty = torch.rand(len(texts.pooled), generator=generator) < self.settings.empty
        nothing = self.pairs.nothing.rows([0] * len(texts.pooled))

        def chosen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.where(empty.view(-1, *[1] * (a.ndim - 1)), b, a)

        return Texts(*(chosen(a, b) for a, b in zip(texts, nothing, strict=True)))

    def look(self) -> dict[str, float]:
        """How it does on captions that it does not learn from: all figures together, as none alone says it. Nothing of fewer than 40 pairs."""
        rows = self.held[:LOOKED_AT]
        if not rows:
            return {}
        with self.averaged() as prior, torch.no_grad():
            made = sampled(prior, self.pairs.texts(rows), None, list(range(EACH)), Sampling(guidance=1.0))
        return measures.figures(made, self.pairs.images[rows], self.pairs.images)

    def _share(self, i: int) -> float:
        """Share of the learning rate: a warm-up, then a cosine down to a hundredth."""
        done = i / self.settings.steps
        return min(1.0, (i + 1) / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        for name, weight in self.network.named_parameters():
            self.average[name].lerp_(weight, 1 - keep)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Prior]:
        """While it lasts, the network has the average of its weights."""
        now = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self._put(self.average)
        try:
            yield self.prior
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.network.named_parameters():
            weight.copy_(weights[name])

    def finished(self) -> Prior:
        """With the average of the weights, on the CPU, apart from the training."""
        network = copy.deepcopy(self.network).cpu().requires_grad_(False).eval()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.copy_(self.average[name])
        return replace(self.prior, network=network, facts={})

    def state_dict(self) -> dict:
        weights = {k: v.detach() for k, v in self.network.named_parameters()}
        return {"weights": weights, "average": self.average, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._put(state["weights"])
        self.average = {k: v.to(self.average[k]) for k, v in state["average"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
