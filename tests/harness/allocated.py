"""What torch's allocator saw."""

from collections.abc import Callable

import torch


def peak(work: Callable[[], object]) -> int:
    """Most bytes alive at once of all that `work` allocates, from the allocator's own record."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most
