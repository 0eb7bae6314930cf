"""``apply_attention``, forward: O = P V, where reading P decides the time.

A program makes BLOCK_M rows of O of one head and walks the columns of P once. Kilobytes of one head
at d = 64, V and O in bfloat16: "moved" is P, V and O once; "read from L2" has V once for each block
of 128 rows, which is why blocks have many rows.

=======  ======  ============  ======  ============
tokens   map in bfloat16       map in 8 bits
-------  --------------------  --------------------
         moved   read from L2  moved   read from L2
=======  ======  ============  ======  ============
197         129           129      91            91
577         822          1043     489           711
1025       2378          3296    1328          2247
=======  ======  ============  ======  ============

The speed of all this has not been measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..donors import donors
from . import configs
from .launch import bucket, launch
from .tiles import (
    LOG2E,
    decode,
    keep,
    load_map,
    load_rows,
    load_tile,
    padded,
    place,
    precision,
    tail,
)

# --- what both kernels do ---------------------------------------------------------------------


@triton.jit
def donor_of(donors_ptr, head):
    """The head of the map that a head of V uses."""
    donor = head
    if donors_ptr is not None:
        donor = tl.load(donors_ptr + head).to(tl.int64)
    return donor


@triton.jit
def _add(
    acc, sums, p, v, seed_ptr, head, rows, columns, n, dropout,
    CORRECTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of P times its rows of V, and their sums where the correction needs them."""
    if seed_ptr is not None:
        p *= keep(tl.load(seed_ptr), rows, columns, n, head, dropout)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if CORRECTED:
        sums += tl.sum(v.to(tl.float32), 0)
    return acc, sums


@triton.jit
def _store(
    acc, sums, out_ptr, v_ptr, v_stride_n, correction_ptr, batch, head, rows, heads, m, n,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes rows of O; corrected, alpha (P V) + beta V + gamma mean(V), from the sums of V."""
    if correction_ptr is not None:
        alpha = tl.load(correction_ptr + head * 3).to(tl.float32)
        beta = tl.load(correction_ptr + head * 3 + 1).to(tl.float32)
        gamma = tl.load(correction_ptr + head * 3 + 2).to(tl.float32)
        own = load_rows(v_ptr, v_stride_n, rows, m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
        acc = alpha * acc + beta * own.to(tl.float32) + (gamma * (sums / n))[None, :]
    dims = tl.arange(0, BLOCK_D)
    offsets = ((batch * m + rows) * heads + head)[:, None] * D + dims[None, :]
    mask = (rows < m)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- stored maps ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["m", "n", "heads", "units"])
def _apply_stored_kernel(
    out_ptr, map_ptr, row_scale_ptr, v_ptr, donors_ptr, correction_ptr, seed_ptr,
    m, n, heads, units, dropout,
    map_stride_b, map_stride_h, map_stride_m,
    row_scale_stride_b, row_scale_stride_h, row_scale_stride_m,
    v_stride_b, v_stride_h, v_stride_n,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """No tail apart from the loop: masks fetch nothing, and all loads are ahead of their use."""
    batch, head, start_m = place(m, heads, BLOCK_M)
    donor = donor_of(donors_ptr, head)
    rows = start_m + tl.arange(0, BLOCK_M)
    map_ptr += (batch * map_stride_b + donor * map_stride_h) * UNIT
    v_ptr += batch * v_stride_b + head * v_stride_h
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        stored = load_map(map_ptr, map_stride_m, units, rows, columns, m, UNIT, True)
        v = load_rows(v_ptr, v_stride_n, columns, n, D, BLOCK_D, True)  # (BLOCK_N, BLOCK_D)
        p = decode(stored, v.dtype)  # (BLOCK_M, BLOCK_N)
        acc, sums = _add(
            acc, sums, p, v, seed_ptr, batch * heads + head, rows, columns, n, dropout,
            correction_ptr is not None, PRECISION,
        )  # fmt: skip
    if row_scale_ptr is not None:
        row_scale_ptr += batch * row_scale_stride_b + donor * row_scale_stride_h
        row_scale = tl.load(row_scale_ptr + rows * row_scale_stride_m, mask=rows < m, other=0.0)
        acc *= row_scale[:, None]
    _store(
        acc, sums, out_ptr, v_ptr, v_stride_n, correction_ptr, batch, head, rows, heads, m, n,
        D, BLOCK_D,
    )  # fmt: skip


def apply_dense(
    map_storage: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    return _apply_stored(map_storage, None, v, head_index, correction, dropout, seed)


def apply_quantized(
    codes: Tensor,
    row_scale: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    return _apply_stored(codes, row_scale, v, head_index, correction, dropout, seed)


def _apply_stored(
    storage: Tensor,
    row_scale: Tensor | None,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    b, h, n, d = v.shape
    m = storage.shape[2]
    out = v.new_empty(b, m, h, d)
    launch(
        _apply_stored_kernel,
        lambda meta: (b * h * triton.cdiv(m, meta["BLOCK_M"]),),
        {"out_ptr": out, "m": m, "n": n, "heads": h}
        | map_arguments(storage, row_scale)
        | value_arguments(v)
        | reuse_arguments(head_index, dropout, seed, v.device)
        | {"correction_ptr": None if correction is None else correction.contiguous()},
        configs.apply_stored(v.dtype, storage.element_size(), seed is not None),
        (bucket(b * h), bucket(m), bucket(n), d),
    )
    return out


def map_arguments(storage: Tensor, row_scale: Tensor | None) -> dict[str, Any]:
    """A map of batch 1 serves every sequence: stride 0."""
    unit = _unit(storage)
    scale_strides = (0, 0, 0) if row_scale is None else strides(row_scale)
    return {
        "map_ptr": storage,
        "row_scale_ptr": row_scale,
        "UNIT": unit,
        "units": storage.shape[3] // unit,
        **{f"map_stride_{x}": s // unit for x, s in zip("bhm", strides(storage)[:3], strict=True)},
        **{f"row_scale_stride_{x}": s for x, s in zip("bhm", scale_strides, strict=True)},
    }


def strides(t: Tensor) -> list[int]:
    """Of a dimension of size 1, 0: PyTorch's there may be anything."""
    return [s if size > 1 else 0 for size, s in zip(t.shape, t.stride(), strict=True)]


def _unit(storage: Tensor) -> int:
    """Elements of which everything is a multiple: 16 bytes of a map as ``attention`` stores it."""
    unit = 16 // storage.element_size()
    places = (storage.storage_offset(), storage.shape[3], *strides(storage)[:3])
    aligned = all(x % unit == 0 for x in places) and storage.data_ptr() % 16 == 0
    return unit if aligned else 1


def value_arguments(v: Tensor) -> dict[str, Any]:
    d = v.shape[3]
    return {
        "v_ptr": v,
        **{f"v_stride_{x}": s for x, s in zip("bhn", v.stride()[:3], strict=True)},
        "D": d,
        "BLOCK_D": padded(d),
        "PRECISION": precision(v.dtype),
    }


def reuse_arguments(
    head_index: list[int] | None, dropout: float, seed: Tensor | None, device: torch.device
) -> dict[str, Any]:
    return {
        "donors_ptr": None if head_index is None else donors(tuple(head_index), device),
        "dropout": dropout,
        "seed_ptr": seed,
    }


# --- factored maps ----------------------------------------------------------------------------


@triton.heuristics({"TAIL": lambda arguments: tail(arguments["n"], arguments["BLOCK_N"])})
@triton.jit
def _apply_factored_kernel(
    out_ptr, q_ptr, k_ptr, lse_ptr, bias_ptr, v_ptr, donors_ptr, correction_ptr, seed_ptr,
    m, n, heads, scale, dropout,
    q_stride_b, q_stride_h, q_stride_m,
    k_stride_b, k_stride_h, k_stride_n,
    lse_stride_b, lse_stride_h, lse_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    v_stride_b, v_stride_h, v_stride_n,
    QK: tl.constexpr, BLOCK_QK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """P = exp(scale Q K^T + bias - lse) a tile at a time: no maximum, no sum, nothing rescaled."""
    batch, head, start_m = place(m, heads, BLOCK_M)
    donor = donor_of(donors_ptr, head)
    rows = start_m + tl.arange(0, BLOCK_M)
    q_ptr += batch * q_stride_b + donor * q_stride_h
    k_ptr += batch * k_stride_b + donor * k_stride_h
    lse_ptr += batch * lse_stride_b + donor * lse_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + donor * bias_stride_h
    q = load_rows(q_ptr, q_stride_m, rows, m, QK, BLOCK_QK, True)  # (BLOCK_M, BLOCK_QK)
    lse = tl.load(lse_ptr + rows * lse_stride_m, mask=rows < m, other=0.0) * LOG2E  # (BLOCK_M,)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    full = n // BLOCK_N * BLOCK_N
    # The loop over the tail is there once at most; full tiles have no mask of columns.
    for last in tl.static_range(2 if TAIL else 1):
        for start in range(full if last else 0, n if last else full, BLOCK_N):
            columns = start + tl.arange(0, TAIL if last else BLOCK_N)
            k = load_rows(k_ptr, k_stride_n, columns, n, QK, BLOCK_QK, last)  # (width, BLOCK_QK)
            v = load_rows(v_ptr, v_stride_n, columns, n, D, BLOCK_D, last)  # (width, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) - lse[:, None]
            if bias_ptr is not None:
                bias = load_tile(bias_ptr, bias_stride_m, bias_stride_n, rows, columns, m, n, last)
                s += bias * LOG2E
            p = tl.exp2(s)  # (BLOCK_M, width)
            if last:
                p = tl.where((columns < n)[None, :], p, 0.0)
            acc, sums = _add(
                acc, sums, p, v, seed_ptr, batch * heads + head, rows, columns, n, dropout,
                correction_ptr is not None, PRECISION,
            )  # fmt: skip
    _store(
        acc, sums, out_ptr, v_ptr, v_stride_n, correction_ptr, batch, head, rows, heads, m, n,
        D, BLOCK_D,
    )  # fmt: skip


def apply_factored(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    b, h, n, d = v.shape
    m = q.shape[2]
    out = v.new_empty(b, m, h, d)
    launch(
        _apply_factored_kernel,
        lambda meta: (b * h * triton.cdiv(m, meta["BLOCK_M"]),),
        {"out_ptr": out, "m": m, "n": n, "heads": h}
        | factor_arguments(q, k, lse, bias, scale)
        | value_arguments(v)
        | reuse_arguments(head_index, dropout, seed, v.device)
        | {"correction_ptr": None if correction is None else correction.contiguous()},
        configs.apply_factored(v.dtype, max(d, q.shape[3]), seed is not None),
        (bucket(b * h), bucket(m), bucket(n), d, q.shape[3]),
    )
    return out


def factor_arguments(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float
) -> dict[str, Any]:
    bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
    return {
        "q_ptr": q,
        "k_ptr": k,
        "lse_ptr": lse,
        "bias_ptr": bias,
        "scale": scale,
        **{f"q_stride_{x}": s for x, s in zip("bhm", q.stride()[:3], strict=True)},
        **{f"k_stride_{x}": s for x, s in zip("bhn", k.stride()[:3], strict=True)},
        **{f"lse_stride_{x}": s for x, s in zip("bhm", lse.stride(), strict=True)},
        **{f"bias_stride_{x}": s for x, s in zip("bhmn", bias_strides, strict=True)},
        "QK": q.shape[3],
        "BLOCK_QK": padded(q.shape[3]),
    }
