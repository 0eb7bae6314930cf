"""``token_pool``: windows of tokens straight from (B, N, C), in one launch with all around them.

A program holds rows of the result, (BLOCK_T, BLOCK_C): BLOCK_T tokens, counted through all images,
prefix tokens among them, and BLOCK_C channels; all channels where LayerNorm follows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..grid import pooled_grid
from . import configs, convolution
from .launch import bucket, launch

#: The kernels' kinds: a stride is the average of a window of one token.
KINDS = {"max": "max", "avg": "avg", "stride": "avg", "conv": "conv"}

#: From so many tokens on, a copy of a depthwise weight pays: see ``taps_first``.
MANY = 4096

#: Windows of up to so many tokens are unrolled, so that all their loads are in flight together;
#: with a residual, which has its own, rows of a window, or registers would not suffice.
UNROLL: tl.constexpr = tl.constexpr(16)


def token_pool(
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    window = (kernel, stride, padding)
    if weight is not None and not convolution.depthwise(x, weight, groups):
        out = convolution.convolve(x, residual, grid, prefix, window, weight, bias, groups)
        return convolution.normalize(out, norm_weight, norm_bias, norm_eps)
    b, _, c = x.shape
    weight = taps_first(weight, x)
    h, w = pooled_grid(grid, *window)
    out = x.new_empty(b, prefix + h * w, c)
    rows = b * out.shape[1]
    arguments = {
        "out_ptr": out,
        **tile_arguments(x, residual, grid, prefix, kind, window, weight, bias),
        "norm_weight_ptr": None if norm_weight is None else norm_weight.contiguous(),
        "norm_bias_ptr": None if norm_bias is None else norm_bias.contiguous(),
        "norm_eps": norm_eps,
    }
    table = configs.pool_norm(x.dtype, c, rows)
    if norm_weight is None:
        table = configs.pool(x.dtype)
        arguments["STEPS"] = 1
    launch(
        _pool_kernel,
        lambda meta: (
            triton.cdiv(rows, meta["BLOCK_T"] * meta["STEPS"]) * triton.cdiv(c, meta["BLOCK_C"]),
        ),
        arguments,
        table,
        (bucket(rows), c, *map(tuple, window), kind),
    )
    return out


def tile_arguments(
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    kind: str,
    window: tuple[list[int], list[int], list[int]],
    weight: Tensor | None,
    bias: Tensor | None,
) -> dict[str, object]:
    """What every kernel that pools is given."""
    h, w = pooled_grid(grid, *window)
    return {
        "x_ptr": x,
        "residual_ptr": residual,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "batch": x.shape[0],
        "tokens": prefix + h * w,
        **strides("x", x),
        **strides("residual", residual),
        "KIND": KINDS[kind],
        **geometry(grid, prefix, window, x.shape[2]),
        **taps(weight),
    }


def geometry(
    grid: list[int], prefix: int, window: tuple[list[int], list[int], list[int]], channels: int
) -> dict[str, object]:
    kernel, stride, padding = map(tuple, window)
    return {
        "prefix": prefix,
        "h": grid[0],
        "w": grid[1],
        "new_w": pooled_grid(grid, *window)[1],
        "c": channels,
        "KERNEL": kernel,
        "STRIDE": stride,
        "PADDING": padding,
    }


def strides(name: str, t: Tensor | None) -> dict[str, int]:
    """Of the batch and of the tokens."""
    stride_b, stride_n = (0, 0) if t is None else t.stride()[:2]
    return {f"{name}_stride_b": stride_b, f"{name}_stride_n": stride_n}


def taps_first(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A depthwise weight whose neighbouring channels are neighbours in memory, as those of x are.

    As it usually lies, all taps of a channel together, every program collects it in many small
    reads. One more launch, so only where there are many tokens, and weights that already lie like
    this are not copied.
    """
    if weight is None or weight.stride(0) == 1 or x.shape[0] * x.shape[1] < MANY:
        return weight
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def taps(weight: Tensor | None) -> dict[str, object]:
    """A depthwise weight, (C, 1, kernel, kernel), and its strides."""
    stride_c, _, stride_y, stride_x = (0, 0, 0, 0) if weight is None else weight.stride()
    return {
        "weight_ptr": weight,
        "weight_stride_c": stride_c,
        "weight_stride_y": stride_y,
        "weight_stride_x": stride_x,
    }


@triton.jit
def rows_of(block, tokens, BLOCK_T: tl.constexpr):
    """Image and token of each row of a block, and the row itself; it counts through all images."""
    first = tl.cast(block, tl.int64) * BLOCK_T
    image = first // tokens
    token = (first - image * tokens).to(tl.int32) + tl.arange(0, BLOCK_T)
    return image + token // tokens, token % tokens, first + tl.arange(0, BLOCK_T)


@triton.jit
def load_sum(x_rows, residual_rows, channels, mask, other):
    """(BLOCK_T, BLOCK_C): rows of x, or of x + residual, in float32."""
    value = tl.load(x_rows[:, None] + channels[None, :], mask=mask, other=other).to(tl.float32)
    if residual_rows is not None:
        pointers = residual_rows[:, None] + channels[None, :]
        value += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def pool_tile(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, image, token, channels, batch,
    prefix, h, w, new_w, c, x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
    weight_stride_c, weight_stride_y, weight_stride_x,
    KIND: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Rows of the result before LayerNorm, in float32, zero outside; and for a maximum
    the tap (position in the window) that won, as PyTorch chooses: the first of equal ones,
    or the last NaN."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    in_row = (channels < c)[None, :]
    cell = token - prefix
    top = cell // new_w * STRIDE[0] - PADDING[0]  # (BLOCK_T,)
    left = cell % new_w * STRIDE[1] - PADDING[1]
    passes = (cell < 0) & (image < batch)
    pools = (cell >= 0) & (image < batch)
    # The first token of the window, which padding may put before the grid; or the one that passes.
    first = tl.where(passes, token, prefix + top * w + left).to(tl.int64)
    x_rows = x_ptr + image * x_stride_b + first * x_stride_n
    residual_rows = None
    if residual_ptr is not None:
        residual_rows = residual_ptr + image * residual_stride_b + first * residual_stride_n

    value = tl.full((token.shape[0], channels.shape[0]), 0.0, tl.float32)
    if KIND == "max":
        value += float("-inf")
    # Before any comparison, the first token of the window that is in the grid has won.
    first_tap = tl.maximum(-top, 0) * KERNEL[1] + tl.maximum(-left, 0)
    winner = tl.zeros_like(value).to(tl.int32) + first_tap[:, None]
    TOGETHER: tl.constexpr = min(TAPS if residual_ptr is None else KERNEL[1], UNROLL)
    for tap in tl.range(0, TAPS, loop_unroll_factor=TOGETHER):
        y, x = top + tap // KERNEL[1], left + tap % KERNEL[1]
        in_grid = (y >= 0) & (y < h) & (x >= 0) & (x < w) & pools
        ahead = tl.cast(tap // KERNEL[1] * w + tap % KERNEL[1], tl.int64)
        tap_residual_rows = None
        if residual_ptr is not None:
            tap_residual_rows = residual_rows + ahead * residual_stride_n
        taken = load_sum(
            x_rows + ahead * x_stride_n, tap_residual_rows, channels,
            in_grid[:, None] & in_row, float("-inf") if KIND == "max" else 0.0,
        )  # fmt: skip
        if KIND == "max":
            winner = tl.where((taken > value) | (taken != taken), tap, winner)
            value = tl.maximum(value, taken, propagate_nan=tl.PropagateNan.ALL)
        elif KIND == "conv":
            offset = tap // KERNEL[1] * weight_stride_y + tap % KERNEL[1] * weight_stride_x
            pointers = weight_ptr + offset + channels * weight_stride_c
            factor = tl.load(pointers, mask=channels < c, other=0.0).to(tl.float32)
            value += taken * factor[None, :]
        else:
            value += taken

    if KIND == "avg":
        # Padding isn't counted.
        rows = tl.minimum(top + KERNEL[0], h) - tl.maximum(top, 0)
        columns = tl.minimum(left + KERNEL[1], w) - tl.maximum(left, 0)
        value *= (1 / tl.maximum(rows * columns, 1).to(tl.float32))[:, None]
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channels, mask=channels < c, other=0.0).to(tl.float32)[None, :]
    passed = load_sum(x_rows, residual_rows, channels, passes[:, None] & in_row, 0.0)
    value = tl.where(passes[:, None], passed, value)
    return tl.where(in_row & (image < batch)[:, None], value, 0.0), winner


@triton.jit
def normalized(value, in_row, c, eps):
    """Each row of ``value`` less its mean, over its standard deviation; and 1 / that, (BLOCK_T,).

    Two sums: the mean of squares less the square of the mean would cancel.
    """
    mean = tl.sum(value, 1) / c
    centered = tl.where(in_row, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / c + eps)
    return centered * rstd[:, None], rstd


@triton.jit
def _pool_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr,
    norm_eps, batch, tokens, prefix, h, w, new_w, c,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
    weight_stride_c, weight_stride_y, weight_stride_x,
    KIND: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Reads each token once from memory, as the windows of a program overlap in the L1 cache and
    those of its neighbours in the L2 cache; writes each result once."""
    blocks = tl.cdiv(c, BLOCK_C)
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = channels < c
    for step in range(STEPS):
        image, token, row = rows_of(tl.program_id(0) // blocks * STEPS + step, tokens, BLOCK_T)
        value, _ = pool_tile(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, image, token, channels, batch,
            prefix, h, w, new_w, c, x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
            weight_stride_c, weight_stride_y, weight_stride_x, KIND, KERNEL, STRIDE, PADDING,
        )  # fmt: skip
        if norm_weight_ptr is not None:
            value, _ = normalized(value, in_row[None, :], c, norm_eps)
            factor = tl.load(norm_weight_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
            value *= factor[None, :]
            if norm_bias_ptr is not None:
                bias = tl.load(norm_bias_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
                value += bias[None, :]
        pointers = out_ptr + (row * c)[:, None] + channels[None, :]
        mask = (image < batch)[:, None] & in_row[None, :]
        tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=mask)
