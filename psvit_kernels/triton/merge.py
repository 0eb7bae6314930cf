"""``match_tokens``: a program an image. ``merge_tokens``: rows of the result, gathered, no atomics.

A match is found in float32 whatever the dtype of the metric, so that it is the reference's but for
scores that differ by a rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epilogue import merge_gradient
from . import configs
from .launch import bucket, launch
from .pool import load_sum, normalized, rows_of, strides
from .tiles import padded

# --- match_tokens ---------------------------------------------------------------------------


def match_tokens(
    metric: Tensor, r: int, prefix: int, penalty: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, d = metric.shape
    into, order, starts = (
        metric.new_empty(b, size, dtype=torch.int64) for size in (n, n, n - r + 1)
    )
    if not r:  # everything stays in its place
        for table in (into, order, starts):
            table.copy_(torch.arange(table.shape[1], device=metric.device))
        return into, order, starts
    first_even, first_odd = prefix + prefix % 2, prefix + (prefix + 1) % 2
    evens, odds = ((n - first + 1) // 2 for first in (first_even, first_odd))
    stride_b, stride_h, stride_n, _ = metric.stride()
    arguments = {
        "metric_ptr": metric,
        "penalty_ptr": None if penalty is None else penalty.contiguous(),
        "best_ptr": metric.new_empty(b, evens, dtype=torch.float32),
        "partner_ptr": metric.new_empty(b, evens, dtype=torch.int32),
        "into_ptr": into,
        "order_ptr": order,
        "starts_ptr": starts,
        "heads": h,
        "n": n,
        "d": d,
        "r": r,
        "prefix": prefix,
        "first_even": first_even,
        "first_odd": first_odd,
        "evens": evens,
        "odds": odds,
        "stride_b": stride_b,
        "stride_h": stride_h,
        "stride_n": stride_n,
        "EVENS": padded(evens),
        "ODDS": padded(odds),
        "DEPTH": padded(d),
        # Comparisons of every token with some: 8 a thread.
        "SOME": max(1, 2048 // padded(evens + 1)),
    }
    launch(
        _match_kernel,
        lambda meta: (b,),
        arguments,
        configs.match(padded(d)),
        (bucket(n), padded(d)),
    )
    return into, order, starts


@triton.jit
def _unit_rows(
    base, first, index, count, heads, d, stride_h, stride_n, DEPTH: tl.constexpr
):  # fmt: skip
    """Of every second token from ``first`` on the mean over the heads, its length made 1."""
    channels = tl.arange(0, DEPTH)
    mask = (index < count)[:, None] & (channels < d)[None, :]
    rows = base + (first + 2 * index).to(tl.int64) * stride_n
    total = tl.zeros((index.shape[0], DEPTH), tl.float32)
    for head in range(heads):
        pointers = (rows + tl.cast(head, tl.int64) * stride_h)[:, None] + channels[None, :]
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    total = total / heads
    length = tl.sqrt(tl.sum(total * total, 1))
    return total / tl.maximum(length, 1e-12)[:, None]


@triton.jit
def _match_kernel(
    metric_ptr, penalty_ptr, best_ptr, partner_ptr, into_ptr, order_ptr, starts_ptr,
    heads, n, d, r, prefix, first_even, first_odd, evens, odds, stride_b, stride_h, stride_n,
    EVENS: tl.constexpr, ODDS: tl.constexpr, DEPTH: tl.constexpr, SOME: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Best partners, the r best pairs, and the tables.

    Vectors go through memory between the steps, as a program can't index its registers.
    """
    image = tl.program_id(0).to(tl.int64)
    base = metric_ptr + image * stride_b
    best_ptr += image * evens
    partner_ptr += image * evens
    into_ptr += image * n
    order_ptr += image * n
    starts_ptr += image * (n - r + 1)

    for e in range(0, evens, BLOCK):
        even = e + tl.arange(0, BLOCK)
        a = _unit_rows(base, first_even, even, evens, heads, d, stride_h, stride_n, DEPTH)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        partner = tl.zeros((BLOCK,), tl.int32)
        for o in range(0, odds, BLOCK):
            odd = o + tl.arange(0, BLOCK)
            b = _unit_rows(base, first_odd, odd, odds, heads, d, stride_h, stride_n, DEPTH)
            scores = tl.dot(a, tl.trans(b), input_precision="ieee")  # (BLOCK, BLOCK)
            fits = (scores == scores) & (odd < odds)[None, :]
            scores = tl.where(fits, scores, float("-inf"))
            top = tl.max(scores, 1)
            first = tl.min(tl.where(scores == top[:, None], odd[None, :], odds), 1)
            partner = tl.where(top > best, first, partner)
            best = tl.maximum(best, top)
        if penalty_ptr is not None:
            penalties = penalty_ptr + image * n + first_even + 2 * even
            best -= tl.load(penalties, mask=even < evens, other=0.0).to(tl.float32)
            best = tl.where(best == best, best, float("-inf"))
        tl.store(best_ptr + even, best, mask=even < evens)
        tl.store(partner_ptr + even, partner, mask=even < evens)
    tl.debug_barrier()

    # Which even tokens join their partner: those that fewer than r others come before.
    even = tl.arange(0, EVENS)
    is_even = even < evens
    best = tl.load(best_ptr + even, mask=is_even, other=float("-inf"))
    before = tl.zeros((EVENS,), tl.int32)
    for e in range(0, evens, SOME):
        other = e + tl.arange(0, SOME)
        score = tl.load(best_ptr + other, mask=other < evens, other=float("-inf"))[None, :]
        earlier = (score == best[:, None]) & (other[None, :] < even[:, None])
        counts = (other < evens)[None, :] & ((score > best[:, None]) | earlier)
        before += tl.sum(counts.to(tl.int32), 1)
    joins = is_even & (before < r)
    stays = is_even & (before >= r)
    partner = tl.load(partner_ptr + even, mask=is_even, other=0)
    # From here on, -1 says that a token stays.
    tl.debug_barrier()
    tl.store(partner_ptr + even, tl.where(joins, partner, -1), mask=is_even)
    tl.debug_barrier()

    # Tokens that nothing joins.
    alone = prefix + evens - r  # the merged token of the first odd one
    position = first_even + 2 * even
    place = prefix + tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(
        into_ptr + position, tl.where(joins, alone + partner, place).to(tl.int64), mask=is_even
    )
    tl.store(order_ptr + place, position.to(tl.int64), mask=stays)
    for p in range(0, alone, BLOCK):
        m = p + tl.arange(0, BLOCK)
        tl.store(starts_ptr + m, m.to(tl.int64), mask=m < alone)
        tl.store(into_ptr + m, m.to(tl.int64), mask=m < prefix)
        tl.store(order_ptr + m, m.to(tl.int64), mask=m < prefix)

    # Odd tokens, and how many join each.
    odd = tl.arange(0, ODDS)
    is_odd = odd < odds
    joined = tl.zeros((ODDS,), tl.int32)
    ahead = tl.zeros((ODDS,), tl.int32)  # those at lower positions
    for e in range(0, evens, SOME):
        other = e + tl.arange(0, SOME)
        mine = tl.load(partner_ptr + other, mask=other < evens, other=-1)[None, :] == odd[:, None]
        lower = (first_even + 2 * other)[None, :] < (first_odd + 2 * odd)[:, None]
        joined += tl.sum(mine.to(tl.int32), 1)
        ahead += tl.sum((mine & lower).to(tl.int32), 1)
    group = tl.where(is_odd, joined + 1, 0)
    start = alone + tl.cumsum(group, 0) - group
    at = first_odd + 2 * odd
    tl.store(into_ptr + at, (alone + odd).to(tl.int64), mask=is_odd)
    tl.store(starts_ptr + alone + odd, start.to(tl.int64), mask=is_odd)
    tl.store(starts_ptr + alone + odds, tl.cast(n, tl.int64))
    tl.store(order_ptr + start + ahead, at.to(tl.int64), mask=is_odd)
    tl.debug_barrier()

    # Even tokens that join: after those of the same group at lower positions.
    ahead = (first_odd + 2 * partner < position).to(tl.int32)
    for e in range(0, evens, SOME):
        other = e + tl.arange(0, SOME)
        key = tl.load(partner_ptr + other, mask=other < evens, other=-1)[None, :]
        same = (key == partner[:, None]) & (other[None, :] < even[:, None])
        ahead += tl.sum(same.to(tl.int32), 1)
    start = tl.load(starts_ptr + alone + partner, mask=joins, other=0)
    tl.store(order_ptr + start + ahead, position.to(tl.int64), mask=joins)


# --- merge_tokens ---------------------------------------------------------------------------


def merge_tokens(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = x.shape
    m = starts.shape[1] - 1
    out, sizes = x.new_empty(b, m, c), x.new_empty(b, m, dtype=torch.float32)
    normed = x.new_empty(0) if norm_weight is None else torch.empty_like(out)
    rows = b * m
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "order_ptr": order.contiguous(),
        "starts_ptr": starts.contiguous(),
        "weights_ptr": None if weights is None else weights.contiguous(),
        "norm_weight_ptr": None if norm_weight is None else norm_weight.contiguous(),
        "norm_bias_ptr": None if norm_bias is None else norm_bias.contiguous(),
        "out_ptr": out,
        "sizes_ptr": sizes,
        "normed_ptr": None if norm_weight is None else normed,
        "norm_eps": norm_eps,
        "batch": b,
        "n": n,
        "m": m,
        "c": c,
        **strides("x", x),
        **strides("residual", residual),
    }
    launch(
        _merge_kernel,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]),),
        arguments,
        configs.merge(c),
        (bucket(rows), c, norm_weight is None),
    )
    return out, sizes, normed


@triton.jit
def _weights_at(weights_ptr, row, mask):
    if weights_ptr is None:
        found = mask.to(tl.float32)
    else:
        found = tl.load(weights_ptr + row, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def _merge_kernel(
    x_ptr, residual_ptr, order_ptr, starts_ptr, weights_ptr, norm_weight_ptr, norm_bias_ptr,
    out_ptr, sizes_ptr, normed_ptr, norm_eps, batch, n, m, c,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reads each token once, whole, and writes each result once."""
    image, token, row = rows_of(tl.program_id(0), m, BLOCK_T)
    is_row = image < batch
    channels = tl.arange(0, BLOCK_C)
    in_row = channels < c
    bounds = starts_ptr + image * (m + 1) + token
    start = tl.load(bounds, mask=is_row, other=0)
    count = tl.load(bounds + 1, mask=is_row, other=0) - start
    parts = tl.max(count, 0)
    order_ptr += image * n + start
    size = tl.zeros((BLOCK_T,), tl.float32)
    for part in range(parts):
        mask = part < count
        position = tl.load(order_ptr + part, mask=mask, other=0)
        size += _weights_at(weights_ptr, image * n + position, mask)
    value = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for part in range(parts):
        mask = part < count
        position = tl.load(order_ptr + part, mask=mask, other=0)
        share = _weights_at(weights_ptr, image * n + position, mask) / size
        residual_rows = None
        if residual_ptr is not None:
            residual_rows = residual_ptr + image * residual_stride_b + position * residual_stride_n
        taken = load_sum(
            x_ptr + image * x_stride_b + position * x_stride_n, residual_rows, channels,
            mask[:, None] & in_row[None, :], 0.0,
        )  # fmt: skip
        value += tl.where(mask[:, None], taken * share[:, None], 0.0)
    tl.store(sizes_ptr + row, size, mask=is_row)
    pointers = (row * c)[:, None] + channels[None, :]
    inside = is_row[:, None] & in_row[None, :]
    tl.store(out_ptr + pointers, value.to(out_ptr.dtype.element_ty), mask=inside)
    if norm_weight_ptr is not None:
        value, _ = normalized(value, in_row[None, :], c, norm_eps)
        factor = tl.load(norm_weight_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
        value *= factor[None, :]
        if norm_bias_ptr is not None:
            bias = tl.load(norm_bias_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
            value += bias[None, :]
        tl.store(normed_ptr + pointers, value.to(normed_ptr.dtype.element_ty), mask=inside)


def merge_tokens_backward(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    sizes: Tensor,
    grad_tokens: Tensor | None,
    grad_sizes: Tensor | None,
    grad_normed: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, c = x.shape
    g, *dnorm = merge_gradient(
        merge_tokens, x, residual, (into, order, starts), weights, norm_weight, norm_bias,
        norm_eps, grad_tokens, grad_normed,
    )  # fmt: skip
    dx = x.new_empty(b, n, c)
    rows = b * n
    arguments = {
        "grad_ptr": g,
        "into_ptr": into.contiguous(),
        "weights_ptr": None if weights is None else weights.contiguous(),
        "sizes_ptr": sizes.contiguous(),
        "dx_ptr": dx,
        "batch": b,
        "n": n,
        "m": g.shape[1],
        "c": c,
        **strides("grad", g),
    }
    launch(
        _merge_backward_kernel,
        lambda meta: (triton.cdiv(rows, meta["BLOCK_T"]),),
        arguments,
        configs.merge(c),
        (bucket(rows), c),
    )
    return dx, x.new_empty(0), *dnorm


@triton.jit
def _merge_backward_kernel(
    grad_ptr, into_ptr, weights_ptr, sizes_ptr, dx_ptr, batch, n, m, c,
    grad_stride_b, grad_stride_n, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, _, row = rows_of(tl.program_id(0), n, BLOCK_T)
    is_row = image < batch
    channels = tl.arange(0, BLOCK_C)
    in_row = channels < c
    into = tl.load(into_ptr + row, mask=is_row, other=-1)
    kept = into >= 0
    size = tl.load(sizes_ptr + image * m + into, mask=kept, other=1.0)
    share = _weights_at(weights_ptr, row, kept) / size
    rows = grad_ptr + image * grad_stride_b + into * grad_stride_n
    mask = kept[:, None] & in_row[None, :]
    g = tl.load(rows[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    value = (g * share[:, None]).to(dx_ptr.dtype.element_ty)
    inside = is_row[:, None] & in_row[None, :]
    tl.store(dx_ptr + (row * c)[:, None] + channels[None, :], value, mask=inside)
