"""What the tokens of a sequence are: prefix tokens, then a grid, and what each one stands for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .constants import made_once


class Layout(NamedTuple):
    """What the tokens of a sequence are: those of a grid, or M that these became part of.

    Args:
        prefix: leading tokens that are no patches: class, distillation, registers.
        grid: (h, w), or (n,) once tokens were pooled as a sequence; row-major after the prefix.
        sizes: for each token the number of input tokens it stands for, or None where nobody
            asked. The same for all images, or `(B, M)`,
            float32 (float64 for float64).
        into: for each of the N = prefix + cells tokens of the grid the one of M that it is a part
            of; int64 `(B, N)`. None: M is N, and each is itself.
    """

    prefix: int
    grid: tuple[int, ...]
    sizes: tuple[float, ...] | Tensor | None = None
    into: Tensor | None = None

    @property
    def cells(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """M."""
        if isinstance(self.sizes, Tensor):
            return self.sizes.shape[1]
        return self.prefix + self.cells

    def with_sizes(self) -> Layout:
        """The same layout, every token standing for itself."""
        ones = (1.0,) * (self.prefix + math.prod(self.grid))
        return Layout(self.prefix, self.grid, ones)

    def counted(self, x: Tensor) -> Tensor:
        """The sizes for tokens `(B, M, C)` as a tensor, `(B, M)`; 1 where nobody asked."""
        if isinstance(self.sizes, Tensor):
            return self.sizes
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.sizes is None:
            return torch.ones(x.shape[:2], dtype=dtype, device=x.device)
        return _tensor(self.sizes, dtype, x.device).repeat(len(x), 1)

    def merged(self, into: Tensor, sizes: Tensor) -> Layout:
        """Once its M tokens became others.

        Args:
            into: for each of M tokens the one it becomes a part of, `(B, M)`.
            sizes: of those.
        """
        into = into if self.into is None else into.gather(1, self.into)
        return Layout(self.prefix, self.grid, sizes, into)

    def on_grid(self, y: Tensor) -> Tensor:
        """What belongs to patches that became part of others, at every cell of the grid.

        `(B, M - prefix, C)` to `(B, cells, C)`: a copy for each cell.
        """
        if self.into is None:
            return y
        into = self.into[:, self.prefix :, None] - self.prefix
        return y.gather(1, into.expand(-1, -1, y.shape[2]))


@made_once
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@made_once
def _logs(sizes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([math.log(size) for size in sizes], dtype=dtype, device=device)


def size_bias(layout: Layout, like: Tensor) -> Tensor | None:
    """The log of each token's size, to add to the scores of its key, so that it draws as much
    attention as that many equal tokens would: `(N,)`, None if all are 1; or `(B, 1, 1, M)`.

    What is the same for all images is made once for each layout, dtype and device.

    Source: Token Merging, arXiv 2210.09461, section 3 (proportional attention).
    """
    sizes = layout.sizes
    if isinstance(sizes, Tensor):
        return sizes.log().to(like.dtype)[:, None, None, :]
    if sizes is None or all(size == 1.0 for size in sizes):
        return None
    return _logs(sizes, like.dtype, like.device)


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
