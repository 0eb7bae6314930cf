"""What the tokens of a sequence are: prefix tokens, then a grid, and what each one stands for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """What the N = prefix + cells tokens of a sequence are.

    Args:
        prefix: leading tokens that are no patches: class, distillation, registers.
        grid: (h, w), or (n,) once tokens were pooled as a sequence; row-major after the prefix.
        sizes: for each of the N tokens the number of input tokens it stands for, or None where
            nobody asked.
    """

    prefix: int
    grid: tuple[int, ...]
    sizes: tuple[float, ...] | None = None

    @property
    def cells(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.prefix + self.cells

    def with_sizes(self) -> Layout:
        """The same layout, every token standing for itself."""
        ones = (1.0,) * (self.prefix + math.prod(self.grid))
        return Layout(self.prefix, self.grid, ones)


_biases: dict[tuple, Tensor] = {}


def size_bias(layout: Layout, like: Tensor) -> Tensor | None:
    """The log of each token's size, `(N,)`, to add to the scores of its key; None if all are 1.

    With it a token that stands for s tokens draws as much attention as s equal tokens would.
    Made once for each layout, dtype and device: no copy from host to device, no synchronisation.

    Source: Token Merging, arXiv 2210.09461, section 3 (proportional attention).
    """
    if layout.sizes is None or all(size == 1.0 for size in layout.sizes):
        return None
    if torch.compiler.is_compiling():  # a constant of the graph, which must not leave it
        return _log(layout.sizes, like)
    key = (layout.sizes, like.dtype, like.device)
    if key not in _biases:
        with torch.inference_mode(False):  # one made in inference mode would be no good elsewhere
            _biases[key] = _log(layout.sizes, like)
    return _biases[key]


def _log(sizes: tuple[float, ...], like: Tensor) -> Tensor:
    logs = [math.log(size) for size in sizes]
    return torch.tensor(logs, dtype=like.dtype, device=like.device)


class GridSource(threading.local):
    """The grid of the image that a host is at, as its patch embedding saw it, thread by thread.

    A stack gets tokens, and 64 of them may be 8 x 8 or 4 x 16 patches. So a forward hook on the
    host's patch embedding (``RecordGrid``) tells this object, which is no module, and the stack
    asks it.
    """

    now: tuple[int, int] | None = None

    def of(self, cells: int) -> tuple[int, int]:
        """The grid of so many patch tokens.

        Raises:
            ValueError: another number of patches than the embedding made, or, where no embedding
                ran, a number that isn't a square.
        """
        if self.now is not None:
            h, w = self.now
            if h * w != cells:
                raise ValueError(
                    f"grid: got {cells} patch tokens where the patch embedding made {h} x {w}; "
                    f"pooling needs all of them, in order"
                )
            return self.now
        side = math.isqrt(cells)
        if side * side != cells:
            raise ValueError(
                f"grid: got {cells} patch tokens, which is no square, and no patch embedding ran "
                f"that could tell their grid; call the whole model"
            )
        return side, side

    def __reduce__(self) -> tuple:
        return GridSource, ()  # a copied or loaded model has seen no image yet


class RecordGrid:
    """A forward hook that tells a ``GridSource`` which grid of patches was made.

    Args:
        source: what to tell.
        measure: (h, w) of the patches, from the module, its arguments and its output.
    """

    def __init__(
        self,
        source: GridSource,
        measure: Callable[[nn.Module, tuple, Tensor], tuple[int, int]],
    ) -> None:
        self.source = source
        self.measure = measure

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.source.now = self.measure(module, args, output)


def image_grid(module: nn.Module, args: tuple, output: Tensor) -> tuple[int, int]:
    """The grid that a convolution made: its output is `(B, C, h, w)`."""
    h, w = output.shape[-2:]
    return h, w
