"""Attention that writes its map in the same launch: one kernel for short rows, one for any length.

Scores are kept in units of log 2 (the factor log2 e is folded into the scale), because the hardware
has exp2. The log-sum-exp that leaves a kernel is natural.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..maps import row_pitch
from . import configs
from .launch import bucket, launch
from .tiles import LOG2E, decode, encode, padded, precision, tail

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

#: Longest row whose scores are all held in registers.
SHORT = 272


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dense_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not dense_map:
        out, lse = _attend(q, k, v, bias, scale, None, None)
        return out, q.new_empty(0), lse
    storage = q.new_empty(*q.shape[:3], row_pitch(k.shape[2], q.element_size()))
    out, lse = _attend(q, k, v, bias, scale, storage, None)
    return out, storage, lse


def attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = q.new_empty(*q.shape[:3], row_pitch(k.shape[2], 1), dtype=dtype)
    row_scale = q.new_empty(q.shape[:3], dtype=torch.float32)
    out, lse = _attend(q, k, v, bias, scale, codes, row_scale)
    return out, codes, row_scale, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    storage: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel for this length: out (B, M, H, d') and log-sum-exp (B, H, M)."""
    b, h, m, d = q.shape
    n, dv = v.shape[2:]
    out = q.new_empty(b, m, h, dv)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    names = ("bias_stride_b", "bias_stride_h", "bias_stride_m", "bias_stride_n")
    bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": bias,
        "out_ptr": out,
        "map_ptr": storage,
        "row_scale_ptr": row_scale,
        "lse_ptr": lse,
        "scale": scale,
        "heads": h,
        "m": m,
        "n": n,
        **{f"q_stride_{dim}": q.stride(i) for i, dim in enumerate("bhm")},
        **{f"k_stride_{dim}": k.stride(i) for i, dim in enumerate("bhn")},
        **{f"v_stride_{dim}": v.stride(i) for i, dim in enumerate("bhn")},
        **dict(zip(names, bias_strides, strict=True)),
        "D": d,
        "DV": dv,
        "BLOCK_D": padded(d),
        "BLOCK_DV": padded(dv),
        "PRECISION": precision(q.dtype),
    }
    kernel, table = _attention_stream_kernel, configs.attention_stream(q.dtype, max(d, dv))
    if n <= SHORT:
        kernel, table = _attention_short_kernel, configs.attention_short(q.dtype, max(d, dv))
        arguments["WIDTHS"] = widths(n)
    key = (bucket(b * h), bucket(m), bucket(n), d, dv)
    launch(kernel, lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * b * h,), arguments, table, key)
    return out, lse


def widths(n: int) -> tuple[int, ...]:
    """Powers of two, widest first, that cover a row: 197 columns need 128 + 64 + 16, not 256."""
    columns = triton.cdiv(n, 16) * 16
    pieces = tuple(1 << bit for bit in reversed(range(4, 10)) if columns >> bit & 1)
    return pieces if len(pieces) < 4 else (padded(n),)


# --- what both kernels are made of ----------------------------------------------------------


@triton.jit
def _place(m, heads, BLOCK_M: tl.constexpr):
    """Batch, head and rows of this program; neighbours share the keys of a head in the cache."""
    blocks = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), rows


@triton.jit
def _rows(ptr, rows, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, zero outside: what a product would else meet there may be NaN."""
    dims = tl.arange(0, BLOCK_D)
    mask = (dims < D)[None, :]
    if MASKED:
        mask = mask & (rows < count)[:, None]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _scores(
    q, k, factor, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scale Q K^T + bias, in units of log 2; -inf beyond the last column."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # (BLOCK_M, width)
    if bias_ptr is not None:
        mask = (rows < m)[:, None]
        if MASKED:
            mask = mask & (columns < n)[None, :]
        offsets = rows.to(tl.int64)[:, None] * bias_stride_m
        offsets += columns.to(tl.int64)[None, :] * bias_stride_n
        s += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        s = tl.where((columns < n)[None, :], s, float("-inf"))
    return s


@triton.jit
def _store_map(map_ptr, p, rows, columns, m, n, pitch, MASKED: tl.constexpr):
    if MASKED:
        # Not left to exp(-inf) = 0: a row of NaN would be NaN in its padding, too.
        p = tl.where((columns < n)[None, :], p, tl.zeros_like(p))
    mask = (rows < m)[:, None] & (columns < pitch)[None, :]
    tl.store(map_ptr + rows.to(tl.int64)[:, None] * pitch + columns[None, :], p, mask=mask)


@triton.jit
def _emit(
    e, acc, total, normalizer, v, map_ptr, row_scale_ptr, rows, columns, m, n, pitch,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes one tile of the map from e = exp(s - max) and adds its share to the output.

    ``total`` adds up what the codes of each row stand for; ``normalizer`` is 1 / sum(e) for a dense
    map, whose probabilities the output reuses, and else not needed before the end.
    """
    if row_scale_ptr is not None:
        # Contracted to a fused multiply-add, s - max may be a little above zero.
        codes = encode(tl.minimum(e, 1.0), map_ptr.dtype.element_ty)
        total += tl.sum(decode(codes, tl.float32), 1)
        _store_map(map_ptr, codes, rows, columns, m, n, pitch, MASKED)
        p = e.to(v.dtype)
    elif map_ptr is not None:
        p = (e * normalizer[:, None]).to(v.dtype)  # (BLOCK_M, width)
        _store_map(map_ptr, p, rows, columns, m, n, pitch, MASKED)
    else:
        p = e.to(v.dtype)
    return tl.dot(p, v, acc, input_precision=PRECISION), total


@triton.jit
def _finish(
    acc, row_max, row_sum, total, out_ptr, map_ptr, row_scale_ptr, lse_ptr, batch, head, heads,
    rows, m, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes the output, the log-sum-exp and, for codes, the scale of each row."""
    inside = rows < m
    statistics = (batch * heads + head) * m + rows
    tl.store(lse_ptr + statistics, (row_max + tl.log2(row_sum)) * LN2, mask=inside)
    if row_scale_ptr is not None:
        # No code stands for NaN: the row's scale carries it.
        row_scale = tl.where(row_sum > 0, 1 / total, float("nan"))
        tl.store(row_scale_ptr + statistics, row_scale, mask=inside)
    if map_ptr is None or row_scale_ptr is not None:
        acc = acc / row_sum[:, None]  # (BLOCK_M, BLOCK_DV)
    dims = tl.arange(0, BLOCK_DV)
    offsets = ((batch * m + rows) * heads + head)[:, None] * DV + dims[None, :]
    mask = inside[:, None] & (dims < DV)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _map_rows(map_ptr, batch, head, heads, m, n):
    """The map of this head, and its pitch in a form that tells the compiler: whole 16 bytes."""
    unit: tl.constexpr = 128 // map_ptr.dtype.element_ty.primitive_bitwidth
    pitch = tl.cdiv(n, unit) * unit
    return map_ptr + (batch * heads + head) * m * pitch, pitch


# --- rows that fit in registers -------------------------------------------------------------


@triton.jit
def _attention_short_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, map_ptr, row_scale_ptr, lse_ptr,
    scale, heads, m, n,
    q_stride_b, q_stride_h, q_stride_m,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WIDTHS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All scores of a block of rows at once, as tiles of WIDTHS columns: an exact softmax."""
    batch, head, rows = _place(m, heads, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    pitch = 0
    if map_ptr is not None:
        map_ptr, pitch = _map_rows(map_ptr, batch, head, heads, m, n)
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = _rows(q_ptr, rows, m, q_stride_m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)

    LAST: tl.constexpr = len(WIDTHS) - 1
    scores = ()
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = start + tl.arange(0, WIDTHS[i])
        k = _rows(k_ptr, columns, n, k_stride_n, D, BLOCK_D, i == LAST)  # (width, BLOCK_D)
        s = _scores(
            q, k, scale * LOG2E, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
            i == LAST, PRECISION,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(s, 1))
        scores = scores + (s,)
        start += WIDTHS[i]

    weights = ()
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        e = tl.exp2(scores[i] - row_max[:, None])  # (BLOCK_M, width)
        row_sum += tl.sum(e, 1)
        weights = weights + (e,)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = start + tl.arange(0, WIDTHS[i])
        v = _rows(v_ptr, columns, n, v_stride_n, DV, BLOCK_DV, i == LAST)  # (width, BLOCK_DV)
        acc, total = _emit(
            weights[i], acc, total, 1 / row_sum, v, map_ptr, row_scale_ptr, rows, columns, m, n,
            pitch, i == LAST, PRECISION,
        )  # fmt: skip
        start += WIDTHS[i]
    _finish(
        acc, row_max, row_sum, total, out_ptr, map_ptr, row_scale_ptr, lse_ptr, batch, head, heads,
        rows, m, DV, BLOCK_DV,
    )  # fmt: skip


# --- rows of any length ---------------------------------------------------------------------


@triton.jit
def _online(s, row_max, row_sum):
    """Takes a tile into the row's maximum and sum: e = exp(s - max), and what earlier e shrink by.

    The maximum of a row that is -inf so far counts as 0: (-inf) - (-inf) would be NaN, and a row
    that stays so ends as 0 / 0 = NaN, as it should.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - finite_max)  # (BLOCK_M,)
    e = tl.exp2(s - finite_max[:, None])  # (BLOCK_M, width)
    return e, shrink, new_max, row_sum * shrink + tl.sum(e, 1)


@triton.heuristics({"TAIL": lambda arguments: tail(arguments["n"], arguments["BLOCK_N"])})
@triton.jit
def _attention_stream_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, map_ptr, row_scale_ptr, lse_ptr,
    scale, heads, m, n,
    q_stride_b, q_stride_h, q_stride_m,
    k_stride_b, k_stride_h, k_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Without a map, one sweep over the keys; with one, a sweep for each row's maximum and sum,
    and a second that computes the scores again and knows their probabilities at once."""
    batch, head, rows = _place(m, heads, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    pitch = 0
    if map_ptr is not None:
        map_ptr, pitch = _map_rows(map_ptr, batch, head, heads, m, n)
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = _rows(q_ptr, rows, m, q_stride_m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    # The loop over the tail is there once at most; it has no mask to share with the full tiles.
    for last in tl.static_range(2 if TAIL else 1):
        width: tl.constexpr = TAIL if last else BLOCK_N
        for start in range(full if last else 0, n if last else full, width):
            columns = start + tl.arange(0, width)
            k = _rows(k_ptr, columns, n, k_stride_n, D, BLOCK_D, last)  # (width, BLOCK_D)
            s = _scores(
                q, k, scale * LOG2E, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
                last, PRECISION,
            )  # fmt: skip
            e, shrink, row_max, row_sum = _online(s, row_max, row_sum)
            if map_ptr is None:
                v = _rows(v_ptr, columns, n, v_stride_n, DV, BLOCK_DV, last)  # (width, BLOCK_DV)
                acc = acc * shrink[:, None]
                acc = tl.dot(e.to(v.dtype), v, acc, input_precision=PRECISION)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)

    if map_ptr is not None:
        for last in tl.static_range(2 if TAIL else 1):
            width: tl.constexpr = TAIL if last else BLOCK_N
            for start in range(full if last else 0, n if last else full, width):
                columns = start + tl.arange(0, width)
                k = _rows(k_ptr, columns, n, k_stride_n, D, BLOCK_D, last)  # (width, BLOCK_D)
                s = _scores(
                    q, k, scale * LOG2E, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m,
                    n, last, PRECISION,
                )  # fmt: skip
                v = _rows(v_ptr, columns, n, v_stride_n, DV, BLOCK_DV, last)  # (width, BLOCK_DV)
                acc, total = _emit(
                    tl.exp2(s - row_max[:, None]), acc, total, 1 / row_sum, v, map_ptr,
                    row_scale_ptr, rows, columns, m, n, pitch, last, PRECISION,
                )  # fmt: skip
    _finish(
        acc, row_max, row_sum, total, out_ptr, map_ptr, row_scale_ptr, lse_ptr, batch, head, heads,
        rows, m, DV, BLOCK_DV,
    )  # fmt: skip
