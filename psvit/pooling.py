"""``GridPool``: the token map that pools a regular grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psvit_kernels import TokenGroups, token_pool

from .constants import made_once
from .layout import Layout
from .token_map import Pool

Kind = Literal["max", "avg", "stride", "conv"]
KINDS = ("max", "avg", "stride", "conv")
#: Kinds that an attention map can follow, because they are linear and say where each token goes.
CARRYING = ("avg", "stride")


class GridPool(Pool):
    """Fewer tokens from a grid of them; prefix tokens pass beside it, so hosts find them in place.

    Args:
        kind: "max"; "avg" (padding left out of the count); "stride" (every ``stride``-th token of
            each row and column is kept); "conv" (depthwise, learned; starts as the average over
            the whole window, padding counted as zeros).
        dims: 2 pools the grid, 1 the row-major sequence of its tokens.
        kernel, stride, padding: of the window, in tokens; "stride" uses the stride alone.
        width: channels, for "conv".

    Raises:
        ValueError: an unknown kind, dims other than 1 or 2, or "conv" without a width.

    Source: PSViT, arXiv 2108.03428, section 3; PiT, arXiv 2103.16302, for the depthwise pool.
    """

    def __init__(
        self,
        kind: Kind = "max",
        *,
        dims: Literal[1, 2] = 2,
        kernel: int = 3,
        stride: int = 2,
        padding: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"pool: got {kind!r}, expected one of {', '.join(KINDS)}")
        if dims not in (1, 2):
            raise ValueError(f"dims: got {dims!r}, expected 1 or 2")
        self.kind: Kind = kind
        self.dims: Literal[1, 2] = dims
        self.stride = stride
        self.kernel, self.padding = (1, 0) if kind == "stride" else (kernel, padding)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kind == "conv":
            if width is None:
                raise ValueError('width: got None, expected the number of channels for "conv"')
            window = (kernel,) * dims
            self.weight = nn.Parameter(torch.full((width, 1, *window), kernel**-dims))
            self.bias = nn.Parameter(torch.zeros(width))

    def reduce(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Pools `(B, N, C)` tokens to `(B, M, C)`, and says what the M tokens are.

        Raises:
            ValueError: a layout that doesn't match x, or a window that doesn't fit its grid.
        """
        pooled, _ = token_pool(
            x,
            self.grid(layout),
            prefix=layout.prefix,
            kind=self.kind,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            weight=self.weight,
            bias=self.bias,
            groups=x.shape[2] if self.kind == "conv" else 1,
            dims=self.dims,
        )
        return pooled, self.reduced(layout)

    def expand(self, y: Tensor, layout: Layout) -> Tensor:
        """The adjoint of ``reduce``: `(B, M, C)` to `(B, N, C)`, N tokens being as ``layout`` says.

        For every x and y, <reduce(x), y> = <x, expand(y)>; with a bias, for reduce without it.
        A maximum isn't linear: its adjoint here is that of the average over the same windows.
        """
        prefix, cells = y[:, : layout.prefix], y[:, layout.prefix :]
        if self.kind == "conv":
            cells = self._expand_conv(cells, layout)
        else:
            cells = self.matrix(layout).to(y).T @ cells
        return torch.cat([prefix, cells], dim=1)

    def upsample(self, y: Tensor, layout: Layout) -> Tensor:
        """Pooled tokens at the places they came from: `(B, M, C)` to `(B, N, C)`.

        Each of the N cells of ``layout`` gets the mean of the pooled tokens whose windows hold it,
        so that constants stay constant; prefix tokens pass. Not the adjoint (``expand``), whose
        sums grow where windows overlap.
        """
        cells = self._shares(layout).to(y) @ y[:, layout.prefix :]
        return torch.cat([y[:, : layout.prefix], cells], dim=1)

    def _shares(self, layout: Layout) -> Tensor:
        """Of each cell how much belongs to each pooled cell: float64, `(N, M)`."""
        axes = []
        step = None if self.kind == "stride" else (self.kernel, self.padding)
        for n in self.grid(layout):
            axis = torch.zeros(n, self._side(n), dtype=torch.float64)
            for i, owners in enumerate(_owners(n, self.stride, step)):
                axis[i, owners] = 1 / len(owners)
            axes.append(axis)
        return functools.reduce(torch.kron, axes)

    def groups(self, layout: Layout, device: torch.device) -> TokenGroups:
        """What an attention map needs to follow the tokens (``AttentionMap.reduce``).

        Its rows become what ``reduce`` makes of tokens, its columns go where ``upsample`` says.
        For "avg" and "stride" only. Made once for each layout and device.
        """
        if self.kind not in CARRYING:
            raise ValueError(f"pool: got {self.kind!r}, expected one of {', '.join(CARRYING)}")
        window = (self.dims, self.kernel, self.stride, self.padding)
        # Where sizes are dynamic, Dynamo takes numbers for constants once they were counted, and
        # knows the shape of what was made of constants, not that of constants.
        grid = tuple(len(list(range(n))) for n in layout.grid)
        made = _groups(self.kind, window, layout.prefix, grid, device)
        return TokenGroups(*(t.unsqueeze(0) for t in made))

    def flops(self, layout: Layout) -> int:
        """Of the products of pooling one image, a multiply-add counted as 2."""
        return 0 if self.weight is None else 2 * self.reduced(layout).cells * self.weight.numel()

    def matrix(self, layout: Layout) -> Tensor:
        """The weights of the average (or choice) that each pooled cell is: float64, `(M, N)`."""
        axes = []
        for n in self.grid(layout):
            axis = torch.zeros(self._side(n), n, dtype=torch.float64)
            for i in range(self._side(n)):
                start = i * self.stride - self.padding
                window = range(max(0, start), min(n, start + self.kernel))
                axis[i, window.start : window.stop] = 1 / len(window)
            axes.append(axis)
        return functools.reduce(torch.kron, axes)

    def reduced(self, layout: Layout) -> Layout:
        """What the tokens are once they were pooled; sizes are kept track of if ``layout`` does."""
        grid = self.grid(layout)
        reduced = tuple(self._side(n) for n in grid)
        sizes = layout.sizes
        if layout.into is not None or isinstance(sizes, Tensor):
            raise ValueError("layout: got merged tokens, expected tokens on a grid")
        if sizes is not None:
            spread: Callable[..., tuple[float, ...]] = _spread
            if torch.compiler.is_compiling():
                spread = _spread.__wrapped__  # tracing runs once: nothing to remember
            step = None if self.kind == "stride" else (self.kernel, self.padding)
            cells = sizes[layout.prefix :]
            sizes = sizes[: layout.prefix] + spread(cells, grid, reduced, self.stride, step)
        return Layout(layout.prefix, reduced, sizes)

    def grid(self, layout: Layout) -> tuple[int, ...]:
        """Of the cells as the pool takes them: (h, w), or (n,) for a pool of the sequence."""
        if len(layout.grid) == self.dims:
            return layout.grid
        if self.dims == 1:
            return (layout.cells,)
        raise ValueError(f"layout: got grid {layout.grid}, expected (h, w) for a pool of dims=2")

    def _side(self, n: int) -> int:
        return (n + 2 * self.padding - self.kernel) // self.stride + 1

    def _expand_conv(self, cells: Tensor, layout: Layout) -> Tensor:
        assert self.weight is not None
        grid = self.grid(layout)
        image = cells.transpose(1, 2).unflatten(2, [self._side(n) for n in grid])
        transposed = F.conv_transpose1d if self.dims == 1 else F.conv_transpose2d
        sides = [self._side(n) for n in grid]
        left_over = [
            n - ((m - 1) * self.stride - 2 * self.padding + self.kernel)
            for n, m in zip(grid, sides, strict=True)
        ]
        image = transposed(
            image, self.weight, None, self.stride, self.padding, left_over, image.shape[1]
        )
        return image.flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        window = "" if self.kind == "stride" else f"kernel={self.kernel}, padding={self.padding}, "
        return f"{self.kind}, dims={self.dims}, {window}stride={self.stride}"


@made_once
def _groups(
    kind: Kind,
    window: tuple[Literal[1, 2], int, int, int],
    prefix: int,
    grid: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The fields of ``TokenGroups``, without their first dimension."""
    dims, kernel, stride, padding = window
    pool = GridPool(kind, dims=dims, kernel=kernel, stride=stride, padding=padding)
    layout, itself = Layout(prefix, grid), torch.eye(prefix, dtype=torch.float64)
    means = torch.block_diag(itself, pool.matrix(layout))
    shares = torch.block_diag(itself, pool._shares(layout).T)
    of_group = (means > 0) | (shares > 0)
    order = of_group.nonzero()[:, 1]
    starts = F.pad(of_group.sum(1).cumsum(0), (1, 0))
    parts = (t[of_group].float() for t in (means, shares))
    return tuple(t.to(device) for t in (order, starts, *parts))


@functools.lru_cache(maxsize=64)
def _spread(
    sizes: tuple[float, ...],
    grid: tuple[int, ...],
    reduced: tuple[int, ...],
    stride: int,
    window: tuple[int, int] | None,
) -> tuple[float, ...]:
    """Each cell's size, spread equally over the windows that hold it, so that the sum stays."""
    axes = [_owners(n, stride, window) for n in grid]
    rows, columns = axes if len(axes) == 2 else ([[0]], axes[0])
    width = reduced[-1]
    out = [0.0] * math.prod(reduced)
    for cell, size in enumerate(sizes):
        down, across = rows[cell // len(columns)], columns[cell % len(columns)]
        for i in down:
            for j in across:
                out[i * width + j] += size / (len(down) * len(across))
    return tuple(out)


def _owners(n: int, stride: int, window: tuple[int, int] | None) -> list[list[int]]:
    """For each of n places of an axis the windows that hold it.

    With ``window`` None every ``stride``-th place is kept, and stands for the ones after it. A
    place that no window reaches belongs to the nearest window before it, so that none is lost.
    """
    if window is None:
        return [[i // stride] for i in range(n)]
    kernel, padding = window
    last = (n + 2 * padding - kernel) // stride
    return [
        [j for j in range(last + 1) if 0 <= i + padding - j * stride < kernel]
        or [min(last, (i + padding) // stride)]
        for i in range(n)
    ]
