"""How every Pocket network is fitted: AdamW, warm-up and cosine, gradients averaged over processes, an EMA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.distributed
from torch import nn

from ..loop import Diverged

# (generator, share of the steps done 0..1) -> loss, what else to report
Loss = Callable[[torch.Generator, float], tuple[torch.Tensor, dict[str, float]]]


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def in_shares(compute: Callable[[torch.Tensor], torch.Tensor], items: torch.Tensor) -> torch.Tensor:
    """compute(items) along the first axis, each process doing its share; the number of items must divide evenly."""
    if processes() == 1:
        return compute(items)
    mine = compute(items[rank() :: processes()]).contiguous()
    parts = [torch.empty_like(mine) for _ in range(processes())]
    torch.distributed.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """ComfyUI's layers leave their weights uninitialised; this is torch's own default, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(m.weight[0].numel())
                for p in (m.weight, m.bias):
                    if p is not None:
                        p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) * bound)
            elif isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
                m.weight.fill_(1)
                m.bias.zero_()
            elif isinstance(m, nn.Embedding):
                m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * 0.05)
    return module


class Fit:
    """A trainer for the loop. `loss` draws its own batch, so step i is the same however often we resume."""

    def __init__(self, module: nn.Module, loss: Loss, *, steps: int, lr: float, betas=(0.9, 0.99), weight_decay=0.01,
                 warmup: int = 200, decay: float = 0.6, floor: float = 0.02, ema: float = 0.998, seed: int = 0,
                 around=contextlib.nullcontext):  # fmt: skip
        self.module, self.loss, self.steps, self.lr, self.warmup, self.seed = module, loss, steps, lr, warmup, seed
        self.decay, self.floor, self.ema_decay = decay, floor, ema
        self.around = around  # context of forward and backward
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self.ema = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def learning_rate(self, i: int) -> float:
        """Linear warm-up, constant, cosine to `floor` over the last `decay` of the steps."""
        done = max(0.0, (i / self.steps - (1 - self.decay)) / self.decay)
        return (
            self.lr
            * min(1, (i + 1) / self.warmup)
            * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1, done))))
        )

    def step(self, i: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + i) * processes() + rank())
        self.optimiser.zero_grad(set_to_none=True)
        with self.around():
            loss, scalars = self.loss(generator, i / self.steps)
            loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not torch.isfinite(norm):
            raise Diverged(f"The gradient of step {i + 1} is not a number.")
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(i)
        self.optimiser.step()
        self._average_weights(i)
        return {"loss": loss.item(), "norm": norm.item(), **scalars}

    def _average_gradients(self) -> None:
        if processes() == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        torch.distributed.all_reduce(flat)
        flat /= processes()
        for g, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            g.copy_(mean)

    @torch.no_grad()
    def _average_weights(self, i: int) -> None:
        decay = min(self.ema_decay, (i + 1) / (i + 10))
        for k, v in self.module.state_dict().items():
            if v.is_floating_point():
                self.ema[k].lerp_(v, 1 - decay)
            else:
                self.ema[k].copy_(v)

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict(), "ema": self.ema, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.ema = {k: v.clone() for k, v in state["ema"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
