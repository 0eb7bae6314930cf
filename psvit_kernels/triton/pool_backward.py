"""Gradients of ``token_pool``, each gathered by the program that writes it: no atomics.

Bytes, with x of X bytes and a result of Y, and what reaches memory at least:

| pool                  | launches          | reads and writes        | at least |
|-----------------------|-------------------|-------------------------|----------|
| avg, stride           | dx                | X + Y                   | X + Y    |
| max                   | winners, dx       | 2 X + Y + W + (W)       | 2 X + Y  |
| depthwise             | dx, dweight       | 2 X + Y + (Y)           | 2 X + Y  |
| avg, stride, and norm | norm, dx          | 2 X + 2 Y + (Y)         | 2 X + Y  |
| max, and norm         | norm, dx          | 2 X + 2 Y + W + (Y + W) | 2 X + Y  |
| depthwise, and norm   | norm, dx, dweight | 3 X + 2 Y + (2 Y)       | 2 X + Y  |

W is one byte per element of Y; brackets: just written or read, so mostly in the L2 cache. A
residual is another X wherever x is read; sums of parameters are a few percent of Y.
LayerNorm's backward needs all channels of the pooled token, which is computed again; dx needs
all windows of a token. Doing both at once would compute the rows of a block's halo twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid import pooled_grid
from . import configs, convolution
from .launch import bucket, launch
from .pool import (
    geometry,
    normalized,
    pool_tile,
    rows_of,
    strides,
    taps,
    taps_first,
    tile_arguments,
)

#: Warps that share LayerNorm's sums over tokens, and the slices of the sums of dweight: fixed, so
#: that the order of additions, and with it every bit, depends on the shapes alone.
WARPS = 2048
SLICES = 128

Window = tuple[list[int], list[int], list[int]]


def token_pool_backward(
    grad_out: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    window = (kernel, stride, padding)
    if weight is not None and not convolution.depthwise(x, weight, groups):
        return convolution.backward(
            grad_out, x, residual, grid, prefix, window, weight, bias, groups,
            norm_weight, norm_bias, norm_eps,
        )  # fmt: skip
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    weight = taps_first(weight, x)
    pooled = tile_arguments(x, residual, grid, prefix, kind, window, weight, bias)
    # Separate tensors, here and below: results of an operation may not share memory.
    dweight, dbias, dnorm_weight, dnorm_bias = (x.new_empty(0) for _ in range(4))
    winner = None
    if kind == "max":
        dtype = torch.uint8 if math.prod(kernel) <= 256 else torch.int32
        winner = grad_out.new_empty(grad_out.shape, dtype=dtype)
    if norm_weight is not None:
        grad_out, sums = _through_norm(grad_out, pooled, winner, norm_weight, norm_eps)
        dnorm_weight = sums[:, 0].sum(0).to(norm_weight.dtype)
        if norm_bias is not None:
            dnorm_bias = sums[:, 1].sum(0).to(norm_bias.dtype)
    elif winner is not None:
        _find_winners(x, pooled, winner)
    dx = _gather(grad_out, x, winner, weight, grid, prefix, window)
    if weight is not None:
        sums = _weigh(grad_out, x, residual, grid, prefix, window)
        dweight = sums[:, :-1].sum(0).t().contiguous().view(weight.shape).to(weight.dtype)
        if bias is not None:
            dbias = sums[:, -1].sum(0).to(bias.dtype)
    return dx, dweight, dbias, dnorm_weight, dnorm_bias


def _through_norm(
    grad_out: Tensor,
    pooled: dict[str, object],
    winner: Tensor | None,
    norm_weight: Tensor,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the pooled tokens, and each program's share of those of LayerNorm's weight
    and bias, (programs, 2, C)."""
    b, tokens, c = grad_out.shape
    dpooled = grad_out.new_empty(grad_out.shape)
    table = configs.pool_norm_backward(c)
    blocks = triton.cdiv(b * tokens, table[0].kwargs["BLOCK_T"])
    steps = triton.cdiv(blocks, WARPS // table[0].num_warps)
    programs = triton.cdiv(blocks, max(1, steps))
    sums = grad_out.new_empty(programs, 2, c, dtype=torch.float32)
    arguments = {
        "grad_ptr": grad_out,
        "winner_ptr": winner,
        "norm_weight_ptr": norm_weight.contiguous(),
        "dpooled_ptr": dpooled,
        "sums_ptr": sums,
        "norm_eps": norm_eps,
        "steps": steps,
        **pooled,
        **strides("grad", grad_out),
    }
    launch(_pool_backward_norm_kernel, lambda meta: (programs,), arguments, table, c)
    return dpooled, sums


def _find_winners(x: Tensor, pooled: dict[str, object], winner: Tensor) -> None:
    b, tokens, c = winner.shape
    launch(
        _pool_backward_winner_kernel,
        lambda meta: (triton.cdiv(b * tokens, meta["BLOCK_T"]) * triton.cdiv(c, meta["BLOCK_C"]),),
        {"winner_ptr": winner, **pooled},
        configs.pool(x.dtype),
        (bucket(b * tokens), c, pooled["KERNEL"], pooled["STRIDE"]),
    )


def _gather(
    grad: Tensor,
    x: Tensor,
    winner: Tensor | None,
    weight: Tensor | None,
    grid: list[int],
    prefix: int,
    window: Window,
) -> Tensor:
    """dx: each token's sum over the windows that hold it."""
    b, _, c = x.shape
    dx = x.new_empty(x.shape)
    cells = [triton.cdiv(n, s) for n, s in zip(grid, window[1], strict=True)]
    rows = prefix + math.prod(cells)
    arguments = {
        "grad_ptr": grad,
        "winner_ptr": winner,
        "dx_ptr": dx,
        "batch": b,
        "rows": rows,
        "cells_w": cells[1],
        "new_h": pooled_grid(grid, *window)[0],
        **strides("grad", grad),
        **geometry(grid, prefix, window, c),
        **taps(weight),
    }
    launch(
        _pool_backward_kernel,
        lambda meta: (triton.cdiv(b * rows, meta["BLOCK_T"]) * triton.cdiv(c, meta["BLOCK_C"]),),
        arguments,
        configs.pool(x.dtype),
        (bucket(b * rows), c, *map(tuple, window), winner is None, weight is None),
    )
    return dx


def _weigh(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    window: Window,
) -> Tensor:
    """Each slice's share of the gradients of a depthwise weight and, last, of the bias: (slices,
    taps + 1, C)."""
    b, _, c = x.shape
    windows = grad.shape[1] - prefix
    rows = math.prod(window[0]) + 1
    block_k = min(16, triton.next_power_of_2(rows))
    table = configs.pool_weight(x.dtype)
    block_t = table[0].kwargs["BLOCK_T"]
    blocks = triton.cdiv(triton.cdiv(b * windows, block_t), SLICES)  # of windows, to a slice
    slices = triton.cdiv(b * windows, block_t * max(1, blocks))
    sums = x.new_empty(slices, rows, c, dtype=torch.float32)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "grad_ptr": grad,
        "sums_ptr": sums,
        "batch": b,
        "windows": windows,
        "blocks": blocks,
        **strides("x", x),
        **strides("residual", residual),
        **strides("grad", grad),
        **geometry(grid, prefix, window, c),
        "BLOCK_K": block_k,
    }
    launch(
        _pool_backward_weight_kernel,
        lambda meta: (triton.cdiv(c, meta["BLOCK_C"]) * triton.cdiv(rows, block_k), slices),
        arguments,
        table,
        (bucket(b * windows), c, *map(tuple, window)),
    )
    return sums


@triton.jit
def _pool_backward_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, grad_ptr, norm_weight_ptr, dpooled_ptr, winner_ptr,
    sums_ptr, norm_eps, steps, batch, tokens, prefix, h, w, new_w, c,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n, grad_stride_b, grad_stride_n,
    weight_stride_c, weight_stride_y, weight_stride_x,
    KIND: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pools again, and takes the gradient back through LayerNorm; a program takes consecutive
    blocks of tokens and adds up their share of the gradients of LayerNorm's weight and bias."""
    channels = tl.arange(0, BLOCK_C)
    in_row = (channels < c)[None, :]
    norm_weight = tl.load(norm_weight_ptr + channels, mask=channels < c, other=0.0).to(tl.float32)
    dnorm_weight = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    dnorm_bias = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for step in range(steps):
        image, token, row = rows_of(tl.program_id(0) * steps + step, tokens, BLOCK_T)
        value, winner = pool_tile(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, image, token, channels, batch,
            prefix, h, w, new_w, c, x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
            weight_stride_c, weight_stride_y, weight_stride_x, KIND, KERNEL, STRIDE, PADDING,
        )  # fmt: skip
        value, rstd = normalized(value, in_row, c, norm_eps)  # (BLOCK_T, BLOCK_C)
        mask = (image < batch)[:, None] & in_row
        grad_rows = grad_ptr + image * grad_stride_b + token.to(tl.int64) * grad_stride_n
        grad = tl.load(grad_rows[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        dnorm_weight += grad * value
        dnorm_bias += grad
        grad *= norm_weight[None, :]
        along = tl.sum(grad * value, 1) / c
        grad = (grad - (tl.sum(grad, 1) / c)[:, None] - value * along[:, None]) * rstd[:, None]
        offsets = (row * c)[:, None] + channels[None, :]
        tl.store(dpooled_ptr + offsets, grad.to(dpooled_ptr.dtype.element_ty), mask=mask)
        if winner_ptr is not None:
            tl.store(winner_ptr + offsets, winner.to(winner_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0) * 2 * c
    tl.store(sums_ptr + channels, tl.sum(dnorm_weight, 0), mask=channels < c)
    tl.store(sums_ptr + c + channels, tl.sum(dnorm_bias, 0), mask=channels < c)


@triton.jit
def _pool_backward_winner_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, winner_ptr, batch, tokens, prefix, h, w, new_w, c,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
    weight_stride_c, weight_stride_y, weight_stride_x,
    KIND: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which tap of each window is the maximum."""
    blocks = tl.cdiv(c, BLOCK_C)
    image, token, row = rows_of(tl.program_id(0) // blocks, tokens, BLOCK_T)
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    _, winner = pool_tile(
        x_ptr, residual_ptr, weight_ptr, bias_ptr, image, token, channels, batch,
        prefix, h, w, new_w, c, x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
        weight_stride_c, weight_stride_y, weight_stride_x, KIND, KERNEL, STRIDE, PADDING,
    )  # fmt: skip
    pointers = winner_ptr + (row * c)[:, None] + channels[None, :]
    mask = (image < batch)[:, None] & (channels < c)[None, :]
    tl.store(pointers, winner.to(winner_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_backward_kernel(
    grad_ptr, winner_ptr, weight_ptr, dx_ptr, batch, rows, prefix, h, w, new_h, new_w, cells_w, c,
    grad_stride_b, grad_stride_n, weight_stride_c, weight_stride_y, weight_stride_x,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx by cells of STRIDE x STRIDE tokens, prefix tokens before them. Tokens at the same place of
    their cells meet the same taps of the windows that hold them: no lane looks at taps in vain."""
    blocks = tl.cdiv(c, BLOCK_C)
    image, row, _ = rows_of(tl.program_id(0) // blocks, rows, BLOCK_T)
    channels = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = (channels < c)[None, :]
    grad_rows = grad_ptr + image * grad_stride_b
    new_tokens = (prefix + new_h * new_w).to(tl.int64)
    dx_rows = dx_ptr + image * (prefix + h * w).to(tl.int64) * c

    passes = ((row < prefix) & (image < batch))[:, None] & in_row
    source = (row.to(tl.int64) * grad_stride_n)[:, None] + channels[None, :]
    passed = tl.load(grad_rows[:, None] + source, mask=passes, other=0.0)
    target = (row.to(tl.int64) * c)[:, None] + channels[None, :]
    tl.store(dx_rows[:, None] + target, passed, mask=passes)

    cell = row - prefix
    in_cells = (cell >= 0) & (image < batch)
    cell_y, cell_x = cell // cells_w, cell % cells_w
    REACH_Y: tl.constexpr = (KERNEL[0] + STRIDE[0] - 1) // STRIDE[0]  # windows that hold a token
    REACH_X: tl.constexpr = (KERNEL[1] + STRIDE[1] - 1) // STRIDE[1]
    for place in tl.range(0, STRIDE[0] * STRIDE[1]):
        place_y, place_x = place // STRIDE[1], place % STRIDE[1]
        y, x = cell_y * STRIDE[0] + place_y, cell_x * STRIDE[1] + place_x
        dx = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for back in tl.range(0, REACH_Y * REACH_X, loop_unroll_factor=min(REACH_Y * REACH_X, 16)):
            # The first window first, as PyTorch adds them.
            back_y, back_x = REACH_Y - 1 - back // REACH_X, REACH_X - 1 - back % REACH_X
            tap_y = (place_y + PADDING[0]) % STRIDE[0] + back_y * STRIDE[0]
            tap_x = (place_x + PADDING[1]) % STRIDE[1] + back_x * STRIDE[1]
            new_y = cell_y + (place_y + PADDING[0]) // STRIDE[0] - back_y  # (BLOCK_T,)
            new_x = cell_x + (place_x + PADDING[1]) // STRIDE[1] - back_x
            top, left = y - tap_y, x - tap_x
            exists = (new_y >= 0) & (new_y < new_h) & (new_x >= 0) & (new_x < new_w) & in_cells
            exists &= (y < top + KERNEL[0]) & (x < left + KERNEL[1])
            mask = exists[:, None] & in_row
            window = (prefix + new_y * new_w + new_x).to(tl.int64)
            source = (window * grad_stride_n)[:, None] + channels[None, :]
            grad = tl.load(grad_rows[:, None] + source, mask=mask, other=0.0).to(tl.float32)
            if winner_ptr is not None:
                winners = winner_ptr + ((image * new_tokens + window) * c)[:, None]
                won = tl.load(winners + channels[None, :], mask=mask, other=0)
                dx += tl.where(won == tap_y * KERNEL[1] + tap_x, grad, 0.0)
            elif weight_ptr is not None:
                offset = tap_y * weight_stride_y + tap_x * weight_stride_x
                end = tl.where((tap_y < KERNEL[0]) & (tap_x < KERNEL[1]), c, 0)
                pointers = weight_ptr + offset + channels * weight_stride_c
                factor = tl.load(pointers, mask=channels < end, other=0.0).to(tl.float32)
                dx += grad * factor[None, :]
            else:
                counted_y = tl.minimum(top + KERNEL[0], h) - tl.maximum(top, 0)
                counted_x = tl.minimum(left + KERNEL[1], w) - tl.maximum(left, 0)
                share = 1 / tl.maximum(counted_y * counted_x, 1).to(tl.float32)
                dx += grad * share[:, None]
        target = ((prefix + y * w + x).to(tl.int64) * c)[:, None] + channels[None, :]
        mask = ((y < h) & (x < w) & in_cells)[:, None] & in_row
        tl.store(dx_rows[:, None] + target, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_backward_weight_kernel(
    x_ptr, residual_ptr, grad_ptr, sums_ptr, batch, windows, blocks, prefix, h, w, new_w, c,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n, grad_stride_b, grad_stride_n,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of x times gradient over a slice of the windows, BLOCK_K taps of BLOCK_T windows at a
    time, so that nothing is added across threads before the end. The tap after the last is the
    bias."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    channel_blocks = tl.cdiv(c, BLOCK_C)
    channels = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = tl.program_id(0) // channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_row = channels < c
    total = tl.zeros((BLOCK_T, BLOCK_K, BLOCK_C), tl.float32)
    for block in range(tl.program_id(1) * blocks, (tl.program_id(1) + 1) * blocks):
        image, window, _ = rows_of(block, windows, BLOCK_T)
        y = (window // new_w * STRIDE[0] - PADDING[0])[:, None] + (taps // KERNEL[1])[None, :]
        x = (window % new_w * STRIDE[1] - PADDING[1])[:, None] + (taps % KERNEL[1])[None, :]
        in_grid = (y >= 0) & (y < h) & (x >= 0) & (x < w) & (image < batch)[:, None]
        mask = (in_grid & (taps < TAPS)[None, :])[:, :, None] & in_row[None, None, :]
        token = (prefix + y * w + x).to(tl.int64)  # (BLOCK_T, BLOCK_K)
        rows = x_ptr + image[:, None] * x_stride_b + token * x_stride_n
        value = tl.load(rows[:, :, None] + channels[None, None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)  # (BLOCK_T, BLOCK_K, BLOCK_C)
        if residual_ptr is not None:
            rows = residual_ptr + image[:, None] * residual_stride_b + token * residual_stride_n
            pointers = rows[:, :, None] + channels[None, None, :]
            value += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        value = tl.where((taps == TAPS)[None, :, None], 1.0, value)
        grad_rows = (
            grad_ptr + image * grad_stride_b + (prefix + window).to(tl.int64) * grad_stride_n
        )
        mask = (image < batch)[:, None] & in_row[None, :]
        grad = tl.load(grad_rows[:, None] + channels[None, :], mask=mask, other=0.0)
        total += value * grad.to(tl.float32)[:, None, :]
    row = tl.program_id(1) * (TAPS + 1) + taps
    pointers = sums_ptr + (row.to(tl.int64) * c)[:, None] + channels[None, :]
    tl.store(pointers, tl.sum(total, 0), mask=(taps <= TAPS)[:, None] & in_row[None, :])
