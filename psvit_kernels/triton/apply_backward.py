"""``apply_attention``, backward: dV = P^T dO at once, and what the donor of the map needs.

An application that is linked to its donor leaves dQ and dK to the donor's backward: here, the
gradient of the log-sum-exp is all. Otherwise the gradient of a stored map is written out, and a
factored one goes through the donor's softmax at once.

The correction's own part is PyTorch's: it is rare, small, and written down once for all providers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import epilogue
from ..maps import row_pitch
from . import configs
from .apply import (
    apply_dense,
    apply_factored,
    apply_quantized,
    donor_of,
    factor_arguments,
    map_arguments,
    reuse_arguments,
    value_arguments,
)
from .attention_backward import attention_backward
from .launch import bucket, launch
from .tiles import LOG2E, decode, keep, load_map, load_rows, load_tile, padded, place, precision

# --- dV, and the gradient of the log-sum-exp --------------------------------------------------


@triton.jit
def _store_values(
    dv_ptr, acc, batch, head, heads, columns, n, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    offsets = ((batch * heads + head) * n + columns)[:, None] * D + dims[None, :]
    mask = (columns < n)[:, None] & (dims < D)[None, :]
    tl.store(dv_ptr + offsets, acc.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_lse_gradient(
    dlse_ptr, grad_ptr, grad_stride_m, pv_ptr, batch, head, heads, m,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """-rowsum(dO * P V): all rows of P V scale with exp(-lse)."""
    pv_ptr += (batch * m * heads + head) * D
    for start in range(0, m, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        grad = load_rows(grad_ptr, grad_stride_m, rows, m, D, BLOCK_D, True).to(tl.float32)
        pv = load_rows(pv_ptr, heads * D, rows, m, D, BLOCK_D, True).to(tl.float32)
        place = (batch * heads + head) * m + rows
        tl.store(dlse_ptr + place, -tl.sum(grad * pv, 1), mask=rows < m)


@triton.jit(do_not_specialize=["m", "n", "heads", "units"])
def _values_stored_kernel(
    dv_ptr, dlse_ptr, map_ptr, row_scale_ptr, grad_ptr, pv_ptr, donors_ptr, seed_ptr,
    m, n, heads, units, dropout,
    map_stride_b, map_stride_h, map_stride_m,
    row_scale_stride_b, row_scale_stride_h, row_scale_stride_m,
    grad_stride_b, grad_stride_m, grad_stride_h,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of rows of dV, walking the rows of P; one program a head more for dlse, if wanted."""
    wanted = n if dlse_ptr is None else n + BLOCK_N
    batch, head, start_n = place(wanted, heads, BLOCK_N)
    grad_ptr += batch * grad_stride_b + head * grad_stride_h
    if dlse_ptr is not None:
        if start_n >= n:
            _store_lse_gradient(
                dlse_ptr, grad_ptr, grad_stride_m, pv_ptr, batch, head, heads, m,
                D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
            return
    donor = donor_of(donors_ptr, head)
    columns = start_n + tl.arange(0, BLOCK_N)
    map_ptr += (batch * map_stride_b + donor * map_stride_h) * UNIT
    if row_scale_ptr is not None:
        row_scale_ptr += batch * row_scale_stride_b + donor * row_scale_stride_h
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, m, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        p = load_map(map_ptr, map_stride_m, units, rows, columns, m, UNIT, True)
        grad = load_rows(grad_ptr, grad_stride_m, rows, m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
        if row_scale_ptr is not None:
            # Not multiplied into dO: in float16, the product could underflow.
            row_scale = tl.load(row_scale_ptr + rows * row_scale_stride_m, mask=rows < m, other=0.0)
            p = decode(p, tl.float32) * row_scale[:, None]  # (BLOCK_M, BLOCK_N)
        if seed_ptr is not None:
            p *= keep(tl.load(seed_ptr), rows, columns, n, batch * heads + head, dropout)
        acc = tl.dot(tl.trans(p.to(grad.dtype)), grad, acc, input_precision=PRECISION)
    _store_values(dv_ptr, acc, batch, head, heads, columns, n, D, BLOCK_D)


@triton.jit(do_not_specialize=["m", "n", "heads"])
def _values_factored_kernel(
    dv_ptr, dlse_ptr, q_ptr, k_ptr, lse_ptr, bias_ptr, grad_ptr, pv_ptr, donors_ptr, seed_ptr,
    m, n, heads, scale, dropout,
    q_stride_b, q_stride_h, q_stride_m,
    k_stride_b, k_stride_h, k_stride_n,
    lse_stride_b, lse_stride_h, lse_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    grad_stride_b, grad_stride_m, grad_stride_h,
    QK: tl.constexpr, BLOCK_QK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As above, from tiles of P^T: what is outside of P meets zeros of dO, or isn't stored."""
    wanted = n if dlse_ptr is None else n + BLOCK_N
    batch, head, start_n = place(wanted, heads, BLOCK_N)
    grad_ptr += batch * grad_stride_b + head * grad_stride_h
    if dlse_ptr is not None:
        if start_n >= n:
            _store_lse_gradient(
                dlse_ptr, grad_ptr, grad_stride_m, pv_ptr, batch, head, heads, m,
                D, BLOCK_D, BLOCK_M,
            )  # fmt: skip
            return
    donor = donor_of(donors_ptr, head)
    columns = start_n + tl.arange(0, BLOCK_N)
    q_ptr += batch * q_stride_b + donor * q_stride_h
    k_ptr += batch * k_stride_b + donor * k_stride_h
    lse_ptr += batch * lse_stride_b + donor * lse_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + donor * bias_stride_h
    k = load_rows(k_ptr, k_stride_n, columns, n, QK, BLOCK_QK, True)  # (BLOCK_N, BLOCK_QK)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, m, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, q_stride_m, rows, m, QK, BLOCK_QK, True)  # (BLOCK_M, BLOCK_QK)
        grad = load_rows(grad_ptr, grad_stride_m, rows, m, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + rows * lse_stride_m, mask=rows < m, other=0.0) * LOG2E
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) - lse[None, :]
        if bias_ptr is not None:
            bias = load_tile(bias_ptr, bias_stride_n, bias_stride_m, columns, rows, n, m, True)
            s += bias * LOG2E
        p = tl.exp2(s)  # (BLOCK_N, BLOCK_M)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            p *= tl.trans(keep(seed, rows, columns, n, batch * heads + head, dropout))
        acc = tl.dot(p.to(grad.dtype), grad, acc, input_precision=PRECISION)
    _store_values(dv_ptr, acc, batch, head, heads, columns, n, D, BLOCK_D)


#: head_index, dropout, seed
_Reuse = tuple[list[int] | None, float, Tensor | None]


def _stored_values(
    storage: Tensor,
    row_scale: Tensor | None,
    grad: Tensor,
    v: Tensor,
    reuse: _Reuse,
    pv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    of_map = map_arguments(storage, row_scale)
    table = configs.apply_values_stored(v.dtype, storage.element_size(), reuse[2] is not None)
    return _values(_values_stored_kernel, of_map, table, grad, v, reuse, pv)


def _factored_values(
    factors: tuple[Tensor, Tensor, Tensor, Tensor | None, float],
    grad: Tensor,
    v: Tensor,
    reuse: _Reuse,
    pv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    of_map = factor_arguments(*factors)
    table = configs.apply_values_factored(v.dtype, reuse[2] is not None)
    return _values(_values_factored_kernel, of_map, table, grad, v, reuse, pv)


def _values(
    kernel: Any,
    of_map: dict[str, Any],
    table: list[triton.Config],
    grad: Tensor,
    v: Tensor,
    reuse: _Reuse,
    pv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dV, and the gradient of the log-sum-exp if P V is given."""
    b, h, n, d = v.shape
    m = grad.shape[1]
    dv = v.new_empty(v.shape)
    dlse = None if pv is None else v.new_empty(b, h, m, dtype=torch.float32)
    launch(
        kernel,
        lambda meta: (b * h * (triton.cdiv(n, meta["BLOCK_N"]) + (dlse is not None)),),
        {"dv_ptr": dv, "dlse_ptr": dlse, "pv_ptr": pv, "m": m, "n": n, "heads": h}
        | of_map
        | _grad_arguments(grad)
        | reuse_arguments(*reuse, v.device),
        table,
        (bucket(b * h), bucket(m), bucket(n), d, of_map.get("QK")),
    )
    return dv, v.new_empty(0) if dlse is None else dlse


def _grad_arguments(grad: Tensor) -> dict[str, Any]:
    """Gradients arrive with any strides: a copy where the last one isn't 1."""
    d = grad.shape[3]
    if grad.stride(3) != 1 and d > 1:
        grad = grad.contiguous()
    return {
        "grad_ptr": grad,
        **{f"grad_stride_{x}": s for x, s in zip("bmh", grad.stride()[:3], strict=True)},
        "D": d,
        "BLOCK_D": padded(d),
        "PRECISION": precision(grad.dtype),
    }


# --- the gradient of a stored map -------------------------------------------------------------


@triton.jit(do_not_specialize=["m", "n", "heads", "donor_heads", "batch", "map_batch", "units"])
def _map_kernel(
    dmap_ptr, grad_ptr, v_ptr, receivers_ptr, bounds_ptr, seed_ptr,
    m, n, heads, donor_heads, batch, map_batch, units, dropout,
    grad_stride_b, grad_stride_m, grad_stride_h, v_stride_b, v_stride_h, v_stride_n,
    UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dP = dO V^T, summed over all sequences and heads that applied this map."""
    column_blocks = tl.cdiv(units * UNIT, BLOCK_N)
    row_blocks = tl.cdiv(m, BLOCK_M)
    map_head = (tl.program_id(0) // column_blocks // row_blocks).to(tl.int64)
    rows = tl.program_id(0) // column_blocks % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    donor = map_head % donor_heads
    first, end = donor, donor + 1
    if bounds_ptr is not None:
        first = tl.load(bounds_ptr + donor).to(tl.int64)
        end = tl.load(bounds_ptr + donor + 1).to(tl.int64)
    sequences = batch // map_batch  # one, or all of them
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, sequences * (end - first)):
        b = map_head // donor_heads + i % sequences
        head = first + i // sequences
        if receivers_ptr is not None:
            head = tl.load(receivers_ptr + head).to(tl.int64)
        grad = load_rows(
            grad_ptr + b * grad_stride_b + head * grad_stride_h, grad_stride_m, rows, m,
            D, BLOCK_D, True,
        )  # (BLOCK_M, BLOCK_D)  # fmt: skip
        v = load_rows(
            v_ptr + b * v_stride_b + head * v_stride_h, v_stride_n, columns, n, D, BLOCK_D, True
        )  # (BLOCK_N, BLOCK_D)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if seed_ptr is not None:
            dp *= keep(tl.load(seed_ptr), rows, columns, n, b * heads + head, dropout)
        acc += dp
    offsets = ((map_head * m + rows) * units)[:, None] * UNIT + columns[None, :]
    mask = (rows < m)[:, None] & (columns < units * UNIT)[None, :]
    tl.store(dmap_ptr + offsets, acc.to(dmap_ptr.dtype.element_ty), mask=mask)


def _map_gradient(
    grad: Tensor,
    shape: tuple[int, ...],
    v: Tensor,
    head_index: list[int] | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """In the shape of the map's storage, padding zero."""
    b, h, n, d = v.shape
    map_batch, donor_heads, m, pitch = shape
    dmap = v.new_empty(shape)
    unit = 16 // v.element_size()
    unit = 1 if pitch % unit else unit
    receivers = bounds = None
    if head_index is not None:
        receivers, bounds = _receivers(tuple(head_index), donor_heads, v.device)

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(pitch, meta["BLOCK_N"])
        return (map_batch * donor_heads * tiles,)

    launch(
        _map_kernel,
        grid,
        {"dmap_ptr": dmap, "receivers_ptr": receivers, "bounds_ptr": bounds, "seed_ptr": seed}
        | {"m": m, "n": n, "heads": h, "donor_heads": donor_heads, "batch": b, "dropout": dropout}
        | {"map_batch": map_batch, "units": pitch // unit, "UNIT": unit}
        | value_arguments(v)
        | _grad_arguments(grad),
        configs.apply_map_gradient(v.dtype, seed is not None),
        (bucket(map_batch * donor_heads), bucket(m), bucket(n), d),
    )
    return dmap


@lru_cache(maxsize=1024)
def _receivers(
    head_index: tuple[int, ...], donor_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Heads in the order of their donors, and where those of each donor begin and end."""
    order = sorted(range(len(head_index)), key=lambda head: head_index[head])
    bounds = [sum(donor < d for donor in head_index) for d in range(donor_heads + 1)]
    receivers, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (order, bounds))
    return receivers, starts


# --- the operations ---------------------------------------------------------------------------


class _Uncorrected(NamedTuple):
    """What is left when the correction is taken off, O = P V, and what it got itself."""

    grad: Tensor
    pv: Tensor
    dv: Tensor | None
    dcorrection: Tensor
    dpv: Tensor


def _uncorrected(
    grad_out: Tensor, out: Tensor, v: Tensor, correction: Tensor | None, apply: Callable[[], Tensor]
) -> _Uncorrected:
    if correction is None:
        return _Uncorrected(grad_out, out, None, v.new_empty(0), v.new_empty(0))
    pv = apply()
    g, wide_pv = (t.transpose(1, 2).float() for t in (grad_out, pv))
    g, dv, dcorrection = epilogue.correction_backward(g, wide_pv, v.float(), correction)
    grad = g.transpose(1, 2).to(v.dtype).contiguous()
    return _Uncorrected(grad, pv, dv, dcorrection, grad)


def _result(
    dv: Tensor, dlse: Tensor, rest: _Uncorrected, linked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dV, dcorrection, dlse, dpv, as all three operations return them."""
    dv = dv if rest.dv is None else dv.add_(rest.dv)
    return dv, rest.dcorrection, dlse, rest.dpv if linked else dv.new_empty(0)


def apply_dense_backward(
    grad_out: Tensor,
    map_storage: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reuse = (head_index, dropout, seed)
    rest = _uncorrected(
        grad_out, out, v, correction,
        lambda: apply_dense(map_storage, v, head_index, None, dropout, seed, []),
    )  # fmt: skip
    dv, dlse = _stored_values(map_storage, None, rest.grad, v, reuse, rest.pv if linked else None)
    dmap = v.new_empty(0) if linked else _map_gradient(rest.grad, map_storage.shape, v, *reuse)
    return dmap, *_result(dv, dlse, rest, linked)


def apply_quantized_backward(
    grad_out: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reuse = (head_index, dropout, seed)
    rest = _uncorrected(
        grad_out, out, v, correction,
        lambda: apply_quantized(codes, row_scale, v, head_index, None, dropout, seed, []),
    )  # fmt: skip
    dv, dlse = _stored_values(codes, row_scale, rest.grad, v, reuse, rest.pv if linked else None)
    return _result(dv, dlse, rest, linked)


def apply_factored_backward(
    grad_out: Tensor,
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
    linked: bool,
    need_bias: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unlinked, a head of the map that one head of V applied whole is attention of its own, whose
    backward serves; with a head_index or dropout, dP is written out for it."""
    absent, factors = v.new_empty(0), (q, k, lse, bias, scale)
    rest = _uncorrected(
        grad_out, out, v, correction,
        lambda: apply_factored(*factors, v, head_index, None, dropout, seed, []),
    )  # fmt: skip
    softmax = (bias, scale, absent, lse.contiguous())
    if not linked and head_index is None and seed is None:
        dq, dk, dv, dbias = attention_backward(
            rest.grad, None, None, [], [], q, k, v, *softmax, rest.pv, need_bias
        )
        return dq, dk, dbias, *_result(dv, absent, rest, linked)

    reuse = (head_index, dropout, seed)
    dv, dlse = _factored_values(factors, rest.grad, v, reuse, rest.pv if linked else None)
    result = _result(dv, dlse, rest, linked)
    if linked:
        return q.new_empty(0), q.new_empty(0), q.new_empty(0), *result
    b, h, m, _ = q.shape
    dmap = _map_gradient(rest.grad, (b, h, m, row_pitch(k.shape[2], v.element_size())), v, *reuse)
    nothing = q.new_zeros(b, m, h, 1)  # dO of a layer of no values of its own
    dq, dk, _, dbias = attention_backward(
        nothing,
        dmap[..., : k.shape[2]],
        None,
        [],
        [],
        q,
        k,
        k[..., :1],
        *softmax,
        nothing,
        need_bias,
    )
    return dq, dk, dbias, *result
