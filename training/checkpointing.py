"""Gradient checkpointing (Chen et al. 2016): what a block computes is computed again for its gradient instead of being kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network is a row of, the smallest such: what its module lists hold that are all of one kind, and what lies
    in their sequences. A layer by itself is none: it would keep its input either way."""
    found: list[nn.Module] = []
    for child in network.children():
        row = isinstance(child, nn.ModuleList) and len({type(member) for member in child}) == 1
        parts = [p for m in child for p in (m.children() if isinstance(m, nn.Sequential) else [m])] if row else []
        for part in parts:
            inside = blocks(part)
            found += inside or ([part] if next(part.children(), None) is not None else [])
        if not row:
            found += blocks(child)
    return found


@contextlib.contextmanager
def checkpointed(*networks: nn.Module, learned_inside: bool = False) -> Iterator[None]:
    """While it lasts their blocks keep nothing but what they are given. `learned_inside`: tensors that a block meets on its way
    (the matrices of a LoRA) want gradients too, even where none of its inputs does."""
    with contextlib.ExitStack() as stack:
        for block in (block for network in networks for block in blocks(network)):
            block.forward = functools.partial(_again, block.forward, learned_inside)
            stack.callback(block.__dict__.pop, "forward")
        yield


def _again(forward: Callable, learned_inside: bool, *given, **named):
    """ComfyUI's blocks add to their inputs in place, so each time they get copies: without them, or with torch's checkpoint that is
    not reentrant, FLUX's gradients are wrong by 4 to 30 % and nothing complains."""
    tensors: list[torch.Tensor] = []
    tree = _taken_out((given, named), tensors)
    if not torch.is_grad_enabled() or not (learned_inside or any(t.requires_grad for t in tensors)):
        return forward(*given, **named)

    def run(tensors: Iterable[torch.Tensor]):
        given, named = _put_back(tree, [t.clone() for t in tensors])
        return forward(*given, **named)

    # The anchor makes autograd come back here for what is learned inside.
    return _Checkpoint.apply(run, torch.empty(0, requires_grad=True), *tensors)


class _Checkpoint(torch.autograd.Function):
    """As torch's reentrant checkpoint, which refuses blocks through which no gradient flows."""

    @staticmethod
    def forward(ctx, run: Callable, anchor: torch.Tensor, *tensors: torch.Tensor):
        ctx.run = run
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return run(tensors)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        tensors = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.run(tensors)
        given = zip(out if isinstance(out, tuple) else (out,), gradients, strict=True)
        flowing = [(o, g) for o, g in given if isinstance(o, torch.Tensor) and o.requires_grad and g is not None]
        if flowing:
            torch.autograd.backward(*zip(*flowing, strict=True))
        return None, None, *(t.grad for t in tensors)


class _Place(int):
    """Where a tensor was taken out."""


def _mapped(tree, leaf: Callable):
    """`tree` with every leaf of its tuples, lists, dicts and dataclasses replaced by `leaf(it)`."""
    if isinstance(tree, (tuple, list)):
        parts = [_mapped(part, leaf) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, dict):
        return {k: _mapped(v, leaf) for k, v in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        parts = {f.name: _mapped(getattr(tree, f.name), leaf) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **parts)
    return leaf(tree)


def _taken_out(tree, tensors: list[torch.Tensor]):
    """The tree with a place for every tensor of real numbers, which are put into `tensors`: only what is handed over one by one
    gets a gradient."""

    def leaf(x):
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            return x
        tensors.append(x)
        return _Place(len(tensors) - 1)

    return _mapped(tree, leaf)


def _put_back(tree, tensors: list[torch.Tensor]):
    return _mapped(tree, lambda x: tensors[x] if isinstance(x, _Place) else x)
