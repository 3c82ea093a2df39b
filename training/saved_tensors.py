"""ComfyUI's blocks add in place to what autograd has saved; gradients stay those of the values that were saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch

FORGOTTEN_EVERY = 10_000  # saved tensors


@contextlib.contextmanager
def mutation_allowed() -> Iterator[None]:
    """torch.autograd.graph.allow_mutation_on_saved_tensors, without its mistaken identities, and for as long as one likes.

    torch tells a saved tensor by its Python id, address and version. When one is changed in place it keeps a copy and lets the tensor
    itself go, but not its name; another tensor that comes to lie at the same address with the same id then gets the old one's values in
    backward, mostly without an error. Here a name is forgotten with the tensor that bore it. And torch keeps the names of an address
    until the context ends, which in a long training takes ever more memory and time; here those of tensors that are gone are dropped.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as kept:
        kept.tid_to_weakhandle = _OfThoseAlive(kept)
        yield


class _OfThoseAlive(WeakValueDictionary):
    """Handles by name (torch's `tid`); those whose tensor was let go are not found."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.saved = kept, 0

    def __contains__(self, name) -> bool:
        handle = self.get(name)
        return handle is not None and handle in self.kept.original

    def __setitem__(self, name, handle) -> None:
        super().__setitem__(name, handle)
        self.saved += 1
        if self.saved % FORGOTTEN_EVERY == 0:
            self._forget(name)

    def _forget(self, newest) -> None:
        """All but the newest, whose tensor torch only keeps after it has named it."""
        names_at = self.kept.sid_to_tid  # by address and version
        for place, names in list(names_at.items()):
            names_at[place] = {name for name in names if name in self or name == newest}
            if not names_at[place]:
                del names_at[place]
