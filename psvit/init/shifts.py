"""Shift filters: attention maps that look at one neighbour, the same for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Offset = tuple[int, int]
Offsets = Literal["fixed", "random"] | Sequence[Offset]

#: Of a 3 x 3 filter: the token itself, its sides, its corners.
NEAREST: tuple[Offset, ...] = (
    (0, 0),
    *((-1, 0), (0, 1), (0, -1), (1, 0)),
    *((-1, -1), (-1, 1), (1, -1), (1, 1)),
)


def shift_filter(grid: tuple[int, int], offset: Offset) -> Tensor:
    """The map that looks from (y, x) at (y + dy, x + dx): `(N, N)` float64, zeros and ones.

    A token whose target is outside of the grid has a row of zeros: nothing wraps around.

    Source: arXiv 2505.19985, section 4 (impulse filters).
    """
    (h, w), (dy, dx) = grid, offset
    if abs(dy) >= h or abs(dx) >= w:
        return torch.zeros(h * w, h * w, dtype=torch.float64)
    vertical = torch.diag(torch.ones(h - abs(dy), dtype=torch.float64), dy)
    horizontal = torch.diag(torch.ones(w - abs(dx), dtype=torch.float64), dx)
    return torch.kron(vertical, horizontal)


def taps(kernel_size: int) -> list[Offset]:
    """The offsets of a filter, nearest first; for 3 x 3 in the order of ``NEAREST``."""
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    every = [(dy, dx) for dy in reach for dx in reach]
    first = [offset for offset in NEAREST if offset in every]
    rest = [offset for offset in every if offset not in first]
    return first + sorted(rest, key=lambda o: (o[0] ** 2 + o[1] ** 2, o))


def head_offsets(
    offsets: Offsets, kernel_size: int, heads: int, generator: torch.Generator | None
) -> tuple[Offset, ...]:
    """One offset a head; a list that is shorter than the heads starts again."""
    if offsets == "random":
        device = None if generator is None else generator.device
        drawn = torch.randint(kernel_size**2, (heads,), generator=generator, device=device)
        every = taps(kernel_size)
        return tuple(every[i] for i in drawn.tolist())
    listed = taps(kernel_size) if isinstance(offsets, str) else offsets
    return tuple((listed[i % len(listed)][0], listed[i % len(listed)][1]) for i in range(heads))


def check_offsets(offsets: Offsets, kernel_size: int, grid: tuple[int, int]) -> None:
    """Raises ValueError if a filter is none, or if it reaches beyond the whole grid."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number from 1 up")
    if isinstance(offsets, str):
        if offsets not in ("fixed", "random"):
            raise ValueError(
                f'offsets: got "{offsets}", expected "fixed", "random" or a list of (dy, dx)'
            )
        if kernel_size // 2 >= min(grid):
            raise ValueError(
                f"kernel_size: got {kernel_size}, expected at most {2 * min(grid) - 1} for a grid "
                f"of {grid[0]} x {grid[1]}"
            )
        return
    if not offsets:
        raise ValueError("offsets: got an empty list, expected at least one (dy, dx)")
    for dy, dx in offsets:
        if abs(dy) >= grid[0] or abs(dx) >= grid[1]:
            raise ValueError(
                f"offsets: got ({dy}, {dx}), which leaves a grid of {grid[0]} x {grid[1]} from "
                f"every token"
            )
