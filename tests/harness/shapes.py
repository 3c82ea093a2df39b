"""What torch would allocate, told from shapes: on its meta device a layer of any size takes no memory and no time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Taken(NamedTuple):
    """Bytes of what is made and was not there before; views take nothing."""

    most: int  # alive at once
    largest: int  # of one tensor
    returned: int  # of what is made and still alive at the end


def taken(work: Callable[[], object]) -> Taken:
    with _Made() as made:
        result = work()  # alive until all is counted
    del result
    return Taken(made.most, made.largest, made.alive_at_exit)


class _Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.alive = self.most = self.largest = self.alive_at_exit = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known | given:
                self._add(storage)
        return result

    def __exit__(self, *raised):
        self.alive_at_exit = self.alive
        return super().__exit__(*raised)

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.alive += size
        self.most, self.largest = max(self.most, self.alive), max(self.largest, size)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
