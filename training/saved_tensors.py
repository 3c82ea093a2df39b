"""ComfyUI's blocks add in place to what autograd has saved; gradients stay those of the values that were saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from weakref import WeakValueDictionary

import torch


@contextlib.contextmanager
def mutation_allowed() -> Iterator[None]:
    """torch.autograd.graph.allow_mutation_on_saved_tensors, without its mistaken identity.

    torch tells a saved tensor by its Python id, address and version. When one is changed in place it keeps a copy and lets the tensor
    itself go, but not its name; another tensor that comes to lie at the same address with the same id then gets the old one's values in
    backward, mostly without an error. Here a name is forgotten with the tensor that bore it.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as kept:
        kept.tid_to_weakhandle = _OfThoseAlive(kept.original)
        yield


class _OfThoseAlive(WeakValueDictionary):
    """Handles by name; those whose tensor was let go are not found."""

    def __init__(self, original: MutableMapping):
        super().__init__()
        self.original = original

    def __contains__(self, name) -> bool:
        handle = self.get(name)
        return handle is not None and handle in self.original
