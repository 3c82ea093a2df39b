"""Gradients through tensors that are changed in place after they were saved."""

import torch

SIZES = 64, 1000, 100_000  # which of them come to lie where another lay is up to the allocator


def wrong(allowed, size: int = 1000) -> int:
    """In how many of 200 backward passes a gradient is not that of the values at the time: what is saved, changed and let go makes room
    for what is saved next."""
    w, v = (torch.full((size,), value, requires_grad=True) for value in (2.0, 5.0))

    def changed_and_gone() -> torch.Tensor:
        a = w * 1
        b = a.square()
        a.add_(1)
        return b

    found = 0
    with allowed():
        for _ in range(200):
            parts = [part for _ in range(5) for part in (changed_and_gone(), (v * 1).square())]
            of_w, of_v = torch.autograd.grad(sum(part.sum() for part in parts), (w, v))
            found += bool((of_w != 5 * 2 * 2).any() or (of_v != 5 * 2 * 5).any())
    return found


def test_no_tensor_is_taken_for_one_that_is_gone(pack):
    assert not any(wrong(pack.training.saved_tensors.mutation_allowed, size) for size in SIZES)


def test_names_of_what_is_gone_are_dropped(pack, monkeypatch):
    saved, seen = pack.training.saved_tensors, []
    forget = saved._OfThoseAlive._forget

    def counted(self, newest):
        forget(self, newest)
        seen.append(sum(map(len, self.kept.sid_to_tid.values())))

    monkeypatch.setattr(saved, "FORGOTTEN_EVERY", 7)
    monkeypatch.setattr(saved._OfThoseAlive, "_forget", counted)
    assert wrong(saved.mutation_allowed) == 0
    assert len(seen) >= 200 and max(seen) <= 20, "10 tensors are saved for one backward pass"


def test_torchs_own_still_mistakes_them():
    """When this fails, torch has mended it, and ours can go."""
    assert any(wrong(torch.autograd.graph.allow_mutation_on_saved_tensors, size) for size in SIZES)
