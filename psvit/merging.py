"""How many tokens each layer of a model merges, and how many that leaves."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from .schedule import Schedule


def merge_counts(merge: int | Sequence[int], schedule: Schedule) -> tuple[int, ...]:
    """Pairs to merge in each layer.

    One number goes to every layer where tokens may be merged: after the last pool, which needs a
    grid.

    Raises:
        ValueError: a negative number, another number of layers, or tokens that are merged where
            they may not be; the message names the layer, counted from 1.
        TypeError: not integers.
    """
    first = schedule.pools[-1] if schedule.pools else 0
    if isinstance(merge, numbers.Integral):
        each = int(merge)
        counts = [each if i >= first else 0 for i in range(schedule.depth)]
    else:
        counts = _integers(merge)
    if len(counts) != schedule.depth:
        raise ValueError(f"merge: got {len(counts)} numbers, expected {schedule.depth} as layers")
    for i, r in enumerate(counts):
        if r < 0:
            raise ValueError(f"merge: got {r} in layer {i + 1}, expected 0 or more")
        if r and i < first:
            raise ValueError(
                f"merge: got {r} in layer {i + 1}, expected 0 before the pool in front of layer "
                f"{first + 1}: merged tokens have no grid"
            )
    return tuple(counts)


def tokens_left(tokens: int, prefix: int, counts: Sequence[int]) -> list[int]:
    """How many tokens each layer's MLP gets: at most half of those after the prefix can go."""
    found = []
    for r in counts:
        tokens -= min(r, (tokens - prefix) // 2)
        found.append(tokens)
    return found


def _integers(merge: object) -> list[int]:
    if not isinstance(merge, Sequence) or not all(isinstance(r, numbers.Integral) for r in merge):
        raise TypeError(f"merge: got {merge!r}, expected an integer or one for each layer")
    return [int(r) for r in merge]
