"""Estimates said before a long job starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

OVER_REMEMBERED = (
    1.3  # peak of a step over what autograd keeps: the largest activations and their gradients come on top
)


def remembered(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `forward` computes, weights included."""
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # alive until all is counted: no two storages share an address
    del result
    return sum(kept.values())


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """'310 MB', '7.2 GB'."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"
