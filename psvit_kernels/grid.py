"""Sizes of pooled grids."""

from __future__ import annotations

from collections.abc import Sequence


def pooled_grid(
    grid: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Each side of the grid that a window leaves: (n + 2 padding - kernel) // stride + 1."""
    sides = zip(grid, kernel, stride, padding, strict=True)
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in sides]
