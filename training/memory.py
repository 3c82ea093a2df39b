"""Estimates said before a long job starts."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(amount: float) -> str:
    """'310 MB', '7.2 GB'."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"


def fit_batch(wanted: int, fixed: float, per_picture: float, free: float) -> int:
    """The largest batch of at most `wanted` pictures that fits into `free` bytes; 0 when not even one does."""
    return max(0, min(wanted, int((free - fixed) // per_picture)))
