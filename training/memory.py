"""Estimates said before a long job starts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

OVER_REMEMBERED = (
    1.3  # peak of a step over what autograd keeps: the largest activations and their gradients come on top
)


class Kept(NamedTuple):
    """Bytes that autograd keeps for a backward pass."""

    fast: float  # of all that is needed
    lean: float  # with checkpointed blocks, at the worst moment: their inputs, and the largest of them


def remembered(forward: Callable[[], torch.Tensor], blocks: Iterable[nn.Module] = ()) -> Kept:
    """What is kept of what `forward` computes, weights included; `blocks` are those that could be checkpointed."""
    kept: dict[int, int] = {}
    inputs, insides, began = [], [], []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr() or storage._cdata] = storage.nbytes()  # tensors without data have no address
        return t.detach()  # t itself, where it is what a step gives, would keep that step alive for ever

    def enter(_, given, named):
        inputs.append(sum(x.nbytes for x in (*given, *named.values()) if isinstance(x, torch.Tensor)))
        began.append(sum(kept.values()))

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            leave = block.register_forward_hook(lambda *_: insides.append(sum(kept.values()) - began.pop()))
            stack.callback(leave.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        result = forward()  # alive until all is counted: no two storages share an address
    del result
    whole = sum(kept.values())
    return Kept(whole, whole - sum(insides) + sum(inputs) + max(insides, default=0))


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """'310 MB', '7.2 GB'."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"
