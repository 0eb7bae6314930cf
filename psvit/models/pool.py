"""``StagePool``: the token map between two stages, which may widen the tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from psvit_kernels import token_pool
from psvit_kernels.checks import autocast_dtype

from ..layout import Layout
from ..pooling import GridPool, Kind

StageKind = Literal["conv", "depthwise", "max", "avg", "stride"]
STAGE_KINDS = ("conv", "depthwise", "max", "avg", "stride")


class StagePool(GridPool):
    """Pools and widens the tokens between two stages, then normalises them.

    ``dims=2``: Conv2d(3, stride 2, padding 1) from C to C' channels over the grid: 14 x 14 to
    7 x 7. ``dims=1``: Conv1d(3, stride 1, padding 1) from C to C' and MaxPool1d(3, stride 2,
    padding 1) over the sequence, prefix tokens in it: 197 tokens to 99. Without an activation.

    Args:
        kind: "conv"; "depthwise" (the same with one filter a channel; C' is a multiple of C);
            "max", "avg", "stride": no parameters but the norm's, C' = C.
        width, new_width: C and C'.
        dims: 2 or 1, as above.
        prefix: how many prefix tokens there are.
        inside: whether they are part of the sequence (``dims=1``); else they pass beside the pool,
            through a linear layer where the width changes.
        norm: LayerNorm after the pool, over the prefix tokens too.
        places: the layout before the pool for which a position embedding is added after it (for
            others it is interpolated); None: none is.

    Raises:
        ValueError: an unknown kind, or a width that the kind can't make.

    Source: PSViT, arXiv 2108.03428, section 3; PiT, arXiv 2103.16302, for "depthwise"; HVT, arXiv
    2103.10619, for positions after a pool.
    """

    def __init__(
        self,
        kind: StageKind,
        width: int,
        new_width: int,
        *,
        dims: Literal[1, 2],
        prefix: int = 0,
        inside: bool = False,
        norm: bool = True,
        places: Layout | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_kind(kind)
        _check_widths(kind, width, new_width)
        learned = kind in ("conv", "depthwise")
        windows: Kind = "max" if learned else kind  # type: ignore[assignment]
        super().__init__(windows, dims=dims)
        self.stage_kind = kind
        self.inside = inside
        factory = {"device": device, "dtype": dtype}
        self.conv: nn.Conv1d | nn.Conv2d | None = None
        if learned:
            convolution = nn.Conv1d if dims == 1 else nn.Conv2d
            groups = width if kind == "depthwise" else 1
            self.conv = convolution(
                width, new_width, 3, stride=dims, padding=1, groups=groups, **factory
            )
        widens_beside = prefix and not inside and new_width != width
        self.beside = nn.Linear(width, new_width, **factory) if widens_beside else None
        self.norm = nn.LayerNorm(new_width, eps=1e-6, **factory) if norm else None
        self.pos_embed: nn.Parameter | None = None
        if places is not None:
            self.places = self.reduced(places)
            self.pos_embed = nn.Parameter(torch.empty(1, self.places.tokens, new_width, **factory))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def reduce(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """`(B, N, C)` to `(B, M, C')`, and what the M tokens are."""
        after = self.reduced(layout)
        y = self._reduced_tokens(x, layout)
        if self.pos_embed is not None:
            y = y + resample_abs_pos_embed(
                self.pos_embed,
                new_size=list(_image(after)),
                old_size=list(_image(self.places)),
                num_prefix_tokens=after.prefix,
            )
        return y, after

    def _reduced_tokens(self, x: Tensor, layout: Layout) -> Tensor:
        cells = self._cells(layout)
        first = layout.tokens - cells.cells
        if not first:
            return self._pool(x, cells.grid, self.norm)
        pooled = self._pool(x[:, first:], cells.grid, None)
        prefix = x[:, :first] if self.beside is None else self.beside(x[:, :first])
        pooled = torch.cat([prefix.to(pooled.dtype), pooled], dim=1)
        return pooled if self.norm is None else self.norm(pooled)

    def reduced(self, layout: Layout) -> Layout:
        if not self.inside:
            return super().reduced(layout)
        return Layout(layout.prefix, (self._side(layout.tokens) - layout.prefix,))

    def expand(self, y: Tensor, layout: Layout) -> Tensor:
        """The adjoint of ``reduce`` without biases and norm: `(B, M, C')` to `(B, N, C)`.

        A maximum isn't linear: its adjoint here is that of the average over the same windows.
        """
        cells = self._cells(layout)
        first = layout.tokens - cells.cells
        prefix, y = y[:, :first], y[:, first:]
        if first and self.beside is not None:
            prefix = prefix @ self.beside.weight
        if self.conv is None or self.dims == 1:
            y = self.matrix(cells).to(y).T @ y
        if self.conv is not None:
            y = self._transposed(y, cells.grid)
        return torch.cat([prefix, y], dim=1) if first else y

    def upsample(self, y: Tensor, layout: Layout) -> Tensor:
        cells = self._cells(layout)
        first = layout.tokens - cells.cells
        return torch.cat([y[:, :first], super().upsample(y[:, first:], cells)], dim=1)

    def flops(self, layout: Layout) -> int:
        """Of the products of one image, a multiply-add counted as 2."""
        count = 0
        if self.conv is not None:
            places = self._cells(layout if self.dims == 1 else self.reduced(layout)).cells
            count += 2 * places * self.conv.weight.numel()
        if self.beside is not None:
            count += 2 * layout.prefix * self.beside.weight.numel()
        return count

    def _cells(self, layout: Layout) -> Layout:
        """What is pooled, as a layout without prefix tokens."""
        return Layout(0, (layout.tokens,) if self.inside else self.grid(layout))

    def _pool(self, x: Tensor, grid: tuple[int, ...], norm: nn.LayerNorm | None) -> Tensor:
        after: dict[str, Any] = {}
        if norm is not None:
            after = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
        conv = self.conv
        if conv is None:
            return token_pool(x, grid, kind=self.kind, dims=self.dims, **after)[0]
        dtype = x.dtype
        products = autocast_dtype(x.device.type)
        if products is not None and dtype != torch.float64:
            x = x.to(products)
        weights: dict[str, Any] = {"weight": conv.weight, "bias": conv.bias, "groups": conv.groups}
        if self.dims == 2:
            x, _ = token_pool(x, grid, kind="conv", dims=2, **weights, **after)
        else:
            x, _ = token_pool(x, grid, kind="conv", dims=1, stride=1, **weights)
            x, _ = token_pool(x, grid, kind="max", dims=1, **after)
        return x.to(dtype)  # the residual stream keeps its dtype, as everywhere under autocast

    def _transposed(self, y: Tensor, grid: tuple[int, ...]) -> Tensor:
        assert self.conv is not None
        if self.dims == 1:
            turned = F.conv_transpose1d
            sides, left_over = list(grid), [0]
        else:
            turned = F.conv_transpose2d
            sides = [self._side(n) for n in grid]
            left_over = [n - (2 * m - 1) for n, m in zip(grid, sides, strict=True)]
        image = y.transpose(1, 2).unflatten(2, sides)
        image = turned(image, self.conv.weight, None, self.dims, 1, left_over, self.conv.groups)
        return image.flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.stage_kind}, dims={self.dims}" + ", prefix inside" * self.inside


def _image(layout: Layout) -> tuple[int, int]:
    """The grid; a sequence is a picture of one row."""
    return layout.grid if len(layout.grid) == 2 else (1, layout.cells)  # type: ignore[return-value]


def check_kind(kind: str) -> None:
    """Raises unless it is one of ``STAGE_KINDS``."""
    if kind not in STAGE_KINDS:
        raise ValueError(f"pool: got {kind!r}, expected one of {', '.join(STAGE_KINDS)}")


def _check_widths(kind: str, width: int, new_width: int) -> None:
    if kind == "depthwise" and new_width % width:
        raise ValueError(
            f'widths: got {width} and then {new_width} with pool "depthwise", '
            f"expected a multiple of {width} after it"
        )
    if kind not in ("conv", "depthwise") and new_width != width:
        raise ValueError(
            f'widths: got {width} and then {new_width} with pool "{kind}", which has no '
            f"parameters; expected {width} again, or pool conv"
        )
