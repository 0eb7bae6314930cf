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
from . import capability, configs
from .launch import bucket, launch
from .tiles import LOG2E, encode, load_rows, load_tile, padded, place, precision, tail

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
    plain = bias is None and row_scale is None
    key = (bucket(b * h), bucket(m), bucket(n), d, dv)
    kernel = _attention_stream_kernel
    table = configs.attention_stream(q.dtype, max(d, dv), bias is not None)
    if fits_registers(n, max(d, dv), q.dtype, plain):
        arguments["WIDTHS"] = pieces = widths(n, 128 if plain else 64)
        kernel = _attention_short_kernel
        table = configs.attention_short(capability(q.device), sum(pieces))
        key = (bucket(b * h), bucket(m), pieces, d, dv)
    launch(kernel, lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * b * h,), arguments, table, key)
    return out, lse


def fits_registers(n: int, d: int, dtype: torch.dtype, plain: bool) -> bool:
    """Whether the short kernel compiles without spills: 272 columns, or 208 with a bias or codes,
    144 with wide heads. Products of float32 have no tensor cores: they take all registers there
    are."""
    most = 336 if plain and d <= 64 else 272
    return dtype != torch.float32 and sum(widths(n, 128)) + max(64, padded(d)) <= most


def widths(n: int, widest: int) -> tuple[int, ...]:
    """Powers of two, widest first, that cover a row: 197 columns need 128 + 64 + 16, not 256."""
    columns = triton.cdiv(n, 16) * 16
    rest = columns % widest
    smaller = tuple(1 << bit for bit in reversed(range(4, 10)) if rest >> bit & 1)
    return (widest,) * (columns // widest) + smaller


# --- what both kernels are made of ----------------------------------------------------------


@triton.jit
def _scores(
    q, k, scale, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scale Q K^T + bias, in units of log 2; -inf beyond the last column."""
    if bias_ptr is None:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)  # (BLOCK_M, width)
    else:
        # Loaded before the product: of two layouts for the statistics of a row, the compiler takes
        # that of the later, and the product's is the one that costs nothing.
        bias = load_tile(bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        s *= LOG2E
    if MASKED:
        s = tl.where((columns < n)[None, :], s, float("-inf"))
    return s


@triton.jit
def _exponentials(s, row_max, row_scale_ptr):
    """e = exp(s - max), and its square root where a code is made of it, else the same."""
    if row_scale_ptr is None:
        e = tl.exp2(s - row_max[:, None])  # (BLOCK_M, width)
        root = e
    else:
        root = tl.exp2(s * 0.5 - (row_max * 0.5)[:, None])
        e = root * root
    return e, root


@triton.jit
def _map_rows(map_ptr, batch, head, heads, rows, m, n):
    """Where these rows of the map start. The compiler sees that it is at whole 16 bytes."""
    unit: tl.constexpr = 128 // map_ptr.dtype.element_ty.primitive_bitwidth
    row = (batch * heads + head) * m + rows
    return map_ptr + row[:, None] * (tl.cdiv(n, unit) * unit)  # (BLOCK_M, 1)


@triton.jit
def _store_map(pointers, p, rows, columns, m, n, MASKED: tl.constexpr):
    mask = (rows < m)[:, None]
    if MASKED:
        unit: tl.constexpr = 128 // p.dtype.primitive_bitwidth
        mask = mask & (columns < tl.cdiv(n, unit) * unit)[None, :]
        # Not left to exp(-inf) = 0: a row of NaN would be NaN in its padding, too.
        p = tl.where((columns < n)[None, :], p, tl.zeros_like(p))
    tl.store(pointers + columns[None, :], p, mask=mask)


@triton.jit
def _emit(
    e, root, acc, total, normalizer, v, map_rows, map_ptr, row_scale_ptr, rows, columns, m, n,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes one tile of the map, if any, and adds the tile's share to the output.

    ``total`` adds up what the codes of each row stand for; ``normalizer`` is 1 / sum(e), which a
    dense map needs: the output takes its probabilities, and else is divided at the end.
    """
    p = e.to(v.dtype)  # (BLOCK_M, width)
    if row_scale_ptr is not None:
        codes, stands_for = encode(root, map_ptr.dtype.element_ty)
        total += tl.sum(stands_for, 1)
        _store_map(map_rows, codes, rows, columns, m, n, MASKED)
    elif map_ptr is not None:
        p = (e * normalizer[:, None]).to(v.dtype)
        _store_map(map_rows, p, rows, columns, m, n, MASKED)
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


# --- rows that fit in registers -------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "m", "n"])
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
    batch, head, start_m = place(m, heads, BLOCK_M)
    rows = start_m + tl.arange(0, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    map_rows = map_ptr
    if map_ptr is not None:
        map_rows = _map_rows(map_ptr, batch, head, heads, rows, m, n)
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, q_stride_m, rows, m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)

    # Everything is fetched before anything is used: one wait for memory, not one for each tile.
    LAST: tl.constexpr = len(WIDTHS) - 1
    keys = ()
    values = ()
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = start + tl.arange(0, WIDTHS[i])
        k = load_rows(k_ptr, k_stride_n, columns, n, D, BLOCK_D, i == LAST)  # (width, BLOCK_D)
        v = load_rows(v_ptr, v_stride_n, columns, n, DV, BLOCK_DV, i == LAST)  # (width, BLOCK_DV)
        keys += (k,)
        values += (v,)
        start += WIDTHS[i]

    scores = ()
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = start + tl.arange(0, WIDTHS[i])
        s = _scores(
            q, keys[i], scale, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
            i == LAST, PRECISION,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(s, 1))
        scores += (s,)
        start += WIDTHS[i]

    # A dense map needs the sum of a row before its first element, and all e are kept. Else they are
    # made where they are used, and fewer registers are in use at a time.
    DENSE: tl.constexpr = map_ptr is not None and row_scale_ptr is None
    weights = ()
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if DENSE:
        for i in tl.static_range(len(WIDTHS)):
            e = tl.exp2(scores[i] - row_max[:, None])  # (BLOCK_M, width)
            row_sum += tl.sum(e, 1)
            weights += (e,)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    start = 0
    for i in tl.static_range(len(WIDTHS)):
        columns = start + tl.arange(0, WIDTHS[i])
        if DENSE:
            e = weights[i]
            root = e
        else:
            e, root = _exponentials(scores[i], row_max, row_scale_ptr)
            row_sum += tl.sum(e, 1)
        acc, total = _emit(
            e, root, acc, total, 1 / row_sum, values[i], map_rows, map_ptr, row_scale_ptr,
            rows, columns, m, n, i == LAST, PRECISION,
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
@triton.jit(do_not_specialize=["heads", "m", "n"])
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
    batch, head, start_m = place(m, heads, BLOCK_M)
    rows = start_m + tl.arange(0, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    map_rows = map_ptr
    if map_ptr is not None:
        map_rows = _map_rows(map_ptr, batch, head, heads, rows, m, n)
    q_ptr += batch * q_stride_b + head * q_stride_h
    q = load_rows(q_ptr, q_stride_m, rows, m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    # The loop over the tail is there once at most; it has no mask to share with the full tiles.
    for last in tl.static_range(2 if TAIL else 1):
        for start in range(full if last else 0, n if last else full, BLOCK_N):
            columns = start + tl.arange(0, TAIL if last else BLOCK_N)
            k = load_rows(k_ptr, k_stride_n, columns, n, D, BLOCK_D, last)  # (width, BLOCK_D)
            s = _scores(
                q, k, scale, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n,
                last, PRECISION,
            )  # fmt: skip
            e, shrink, row_max, row_sum = _online(s, row_max, row_sum)
            if map_ptr is None:
                v = load_rows(v_ptr, v_stride_n, columns, n, DV, BLOCK_DV, last)
                acc = acc * shrink[:, None]
                acc = tl.dot(e.to(v.dtype), v, acc, input_precision=PRECISION)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)

    if map_ptr is not None:
        for last in tl.static_range(2 if TAIL else 1):
            for start in range(full if last else 0, n if last else full, BLOCK_N):
                columns = start + tl.arange(0, TAIL if last else BLOCK_N)
                k = load_rows(k_ptr, k_stride_n, columns, n, D, BLOCK_D, last)  # (width, BLOCK_D)
                s = _scores(
                    q, k, scale, bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m,
                    n, last, PRECISION,
                )  # fmt: skip
                v = load_rows(v_ptr, v_stride_n, columns, n, DV, BLOCK_DV, last)
                e, root = _exponentials(s, row_max, row_scale_ptr)
                acc, total = _emit(
                    e, root, acc, total, 1 / row_sum, v, map_rows, map_ptr, row_scale_ptr, rows,
                    columns, m, n, last, PRECISION,
                )  # fmt: skip
    _finish(
        acc, row_max, row_sum, total, out_ptr, map_ptr, row_scale_ptr, lse_ptr, batch, head, heads,
        rows, m, DV, BLOCK_DV,
    )  # fmt: skip
