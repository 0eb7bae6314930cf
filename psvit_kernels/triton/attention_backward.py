"""Backward of attention, for its own layer and for all layers that share its map.

With P the map, dO the gradient of the layer's output and (dO_l, V_l) those of the layers that share
P, all of it follows from one matrix, of which only tiles ever exist:

    dS = P * (dO V^T + sum_l dO_l V_l^T + dP - delta)
    delta = rowsum(dO * O) + rowsum(P * dP) - dlse
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO,  dbias = dS

dP is the gradient of the map, where something else used it, and dlse that of the log-sum-exp: the
sharing layers put their part of delta, -rowsum(dO_l * O_l), there.

Two launches: delta, then the products. A program of the second owns a block of columns and walks
the rows (dK, dV), or a block of rows and walks the columns (dQ): the same loop, with Q and K, dO
and V exchanged. The programs of one head are neighbours in the grid, so that what they all read
comes from memory once, and from the L2 cache then.

Counted, not measured: what the backward of one head (d = 64, 2 bytes an element) of a layer and two
that share its map has to move and to multiply, the sharing layers' own dV_l = P^T dO_l included.
Rows and columns each make dP_l again, rather than add up dQ in memory in an order that varies.

========================================  =======  ======  =========  ======
                                          197 tokens       577 tokens
----------------------------------------  ---------------  -----------------
                                          bytes    MFLOP   bytes      MFLOP
========================================  =======  ======  =========  ======
three backwards of flash attention        687,924  74.5    2,014,884  639.2
the group, its map stored: 11 products    719,444  54.6    3,436,612  468.7
the group, factored: 15 products          586,272  74.5    1,717,152  639.2
========================================  =======  ======  =========  ======
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import capability, configs
from .launch import bucket, launch
from .tiles import LOG2E, load_map, load_rows, load_tile, padded, place, precision, tail

#: Layers of a group, beside the one that attends, that one launch takes: as many as fit registers.
MAX_PAIRS = 3


# A tile has a program's own rows of the map first, or, TRANSPOSED, its own columns; i counts along
# the first side, j along the second. Beyond the end of i anything may stand, as it isn't stored.


@triton.jit
def _tile(ptr, stride_m, stride_n, i, j, m, n, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Part of a matrix (M, N) of any strides, in float32."""
    if TRANSPOSED:
        tile = tl.trans(load_tile(ptr, stride_m, stride_n, j, i, m, n, True))
    else:
        tile = load_tile(ptr, stride_m, stride_n, i, j, m, n, MASKED)
    return tile


@triton.jit
def _per_row(ptr, i, j, m, TRANSPOSED: tl.constexpr):
    """One number for each row, along its side of the tile."""
    if TRANSPOSED:
        numbers = tl.load(ptr + j, mask=j < m, other=0.0)[None, :]
    else:
        numbers = tl.load(ptr + i, mask=i < m, other=0.0)[:, None]
    return numbers


@triton.jit
def _probabilities(
    own, other, i, j, m, n, scale, bias, bias_m, bias_n, stored, units, lse,
    UNIT: tl.constexpr, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, as it is stored or from rows of q and k, in float32; MASKED: 0 beyond the end of j."""
    if stored is not None:
        if TRANSPOSED:
            p = tl.trans(load_map(stored, units, units, j, i, m, UNIT, True))
        else:
            p = load_map(stored, units, units, i, j, m, UNIT, MASKED)
        p = p.to(tl.float32)
    else:
        s = tl.dot(own, tl.trans(other), input_precision=PRECISION) * (scale * LOG2E)
        if bias is not None:
            s += _tile(bias, bias_m, bias_n, i, j, m, n, MASKED, TRANSPOSED) * LOG2E
        p = tl.exp2(s - _per_row(lse, i, j, m, TRANSPOSED) * LOG2E)
        if MASKED:
            p = tl.where((j < (m if TRANSPOSED else n))[None, :], p, 0.0)
    return p


@triton.jit
def _delta_kernel(
    delta, grad_out, out, grad_lse, q, k, bias, stored, grad_map, lse,
    grad_b, grad_m, grad_h, q_b, q_h, q_m, k_b, k_h, k_n, bias_b, bias_h, bias_m, bias_n,
    grad_map_b, grad_map_h, grad_map_m, heads, m, n, units, scale,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, start = place(m, heads, BLOCK_M)
    rows = start + tl.arange(0, BLOCK_M)
    statistics = (b * heads + h) * m + rows
    grad_out += b * grad_b + h * grad_h
    out += (b * m * heads + h) * DV
    g = load_rows(grad_out, grad_m, rows, m, DV, BLOCK_DV, True)  # (BLOCK_M, BLOCK_DV)
    o = load_rows(out, heads * DV, rows, m, DV, BLOCK_DV, True)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)  # (BLOCK_M,)
    if grad_lse is not None:
        total -= tl.load(grad_lse + statistics, mask=rows < m, other=0.0)
    if grad_map is not None:
        k += b * k_b + h * k_h
        grad_map += b * grad_map_b + h * grad_map_h
        lse += (b * heads + h) * m
        if bias is not None:
            bias += b * bias_b + h * bias_h
        if stored is not None:
            stored += (b * heads + h) * m * units * UNIT
        own = load_rows(q + b * q_b + h * q_h, q_m, rows, m, D, BLOCK_D, True)
        for start in range(0, n, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            p = _probabilities(
                own, load_rows(k, k_n, columns, n, D, BLOCK_D, True), rows, columns, m, n, scale,
                bias, bias_m, bias_n, stored, units, lse, UNIT, True, False, PRECISION,
            )  # (BLOCK_M, BLOCK_N)  # fmt: skip
            total += tl.sum(p * load_tile(grad_map, grad_map_m, 1, rows, columns, m, n, True), 1)
    tl.store(delta + statistics, total, mask=rows < m)


@triton.jit
def _walk(
    x, y, i, m, n, own_end, other_end, own_x, own_y, own_group,
    other_x, other_x_stride, other_y, other_y_stride, other_group, other_group_strides,
    bias, bias_m, bias_n, stored, units, grad_map, grad_map_m, dbias, lse, delta, scale,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """x + dS other_x, which is dQ or dK; for own columns, y + P^T other_y, which is dV."""
    full = other_end // BLOCK * BLOCK
    for last in tl.static_range(2 if TAIL else 1):
        for start in range(
            full if last else 0, other_end if last else full, TAIL if last else BLOCK
        ):
            j = start + tl.arange(0, TAIL if last else BLOCK)
            tile_y = load_rows(other_y, other_y_stride, j, other_end, DV, BLOCK_DV, last)
            dp = tl.dot(own_y, tl.trans(tile_y), input_precision=PRECISION)
            for layer in tl.static_range(PAIRS):
                tile = load_rows(
                    other_group[layer], other_group_strides[layer], j, other_end, DV, BLOCK_DV, last
                )
                dp = tl.dot(own_group[layer], tl.trans(tile), dp, input_precision=PRECISION)
            tile_x = load_rows(other_x, other_x_stride, j, other_end, D, BLOCK_D, last)
            p = _probabilities(
                own_x, tile_x, i, j, m, n, scale, bias, bias_m, bias_n, stored, units, lse,
                UNIT, last, TRANSPOSED, PRECISION,
            )  # (BLOCK_OWN, width)  # fmt: skip
            if grad_map is not None:
                dp += _tile(grad_map, grad_map_m, 1, i, j, m, n, last, TRANSPOSED)
            ds = p * (dp - _per_row(delta, i, j, m, TRANSPOSED))
            if dbias is not None:
                inside = (i < own_end)[:, None] & (j < other_end)[None, :]
                pointers = dbias + i.to(tl.int64)[:, None] * n + j[None, :]
                tl.store(pointers, ds.to(dbias.dtype.element_ty), mask=inside)
            x = tl.dot(ds.to(tile_x.dtype), tile_x, x, input_precision=PRECISION)
            if TRANSPOSED:
                y = tl.dot(p.to(tile_y.dtype), tile_y, y, input_precision=PRECISION)
    return x, y


@triton.jit
def _load_group(
    ptrs, strides, rows, end, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr
):
    """The same rows of every tensor, (BLOCK, BLOCK_D) each."""
    tiles = ()
    for layer in tl.static_range(PAIRS):
        tiles += (load_rows(ptrs[layer], strides[layer], rows, end, D, BLOCK_D, True),)
    return tiles


@triton.jit
def _store_rows(ptr, tile, rows, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < end)[:, None] & (dims < D)[None, :]
    pointers = ptr + rows.to(tl.int64)[:, None] * D + dims[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.heuristics(
    {
        "TAIL_M": lambda arguments: tail(arguments["m"], arguments["BLOCK"]),
        "TAIL_N": lambda arguments: tail(arguments["n"], arguments["BLOCK"]),
    }
)
@triton.jit
def _attention_backward_kernel(
    dq, dk, dv, dbias,
    q, k, v, grad_out, group_grads, group_values, bias, stored, grad_map, lse, delta,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_m, grad_h,
    group_grad_strides, group_value_strides, bias_b, bias_h, bias_m, bias_n,
    grad_map_b, grad_map_h, grad_map_m,
    heads, m, n, units, scale,
    UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK: tl.constexpr, TAIL_M: tl.constexpr, TAIL_N: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(n, BLOCK_OWN)
    blocks = column_blocks + tl.cdiv(m, BLOCK_OWN)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad_out += b * grad_b + h * grad_h
    lse += head * m
    delta += head * m
    if bias is not None:
        bias += b * bias_b + h * bias_h
    if stored is not None:
        stored += head * m * units * UNIT
    if grad_map is not None:
        grad_map += b * grad_map_b + h * grad_map_h
    grads, grad_strides, values, value_strides = (), (), (), ()
    for layer in tl.static_range(PAIRS):
        stride_b, stride_m, stride_h = group_grad_strides[layer]
        grads += (group_grads[layer] + b * stride_b + h * stride_h,)
        grad_strides += (stride_m,)
        stride_b, stride_h, stride_n = group_value_strides[layer]
        values += (group_values[layer] + b * stride_b + h * stride_h,)
        value_strides += (stride_n,)

    if block < column_blocks:
        columns = block * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
        x, y = _walk(
            tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32), tl.zeros((BLOCK_OWN, BLOCK_DV), tl.float32),
            columns, m, n, n, m,
            load_rows(k, k_n, columns, n, D, BLOCK_D, True),
            load_rows(v, v_n, columns, n, DV, BLOCK_DV, True),
            _load_group(values, value_strides, columns, n, DV, BLOCK_DV, PAIRS),
            q, q_m, grad_out, grad_m, grads, grad_strides,
            bias, bias_m, bias_n, stored, units, grad_map, grad_map_m, None, lse, delta, scale,
            UNIT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, PAIRS, True, BLOCK, TAIL_M,
        )  # fmt: skip
        _store_rows(dk + head * n * D, x * scale, columns, n, D, BLOCK_D)
        _store_rows(dv + head * n * DV, y, columns, n, DV, BLOCK_DV)
    else:
        rows = (block - column_blocks) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
        if dbias is not None:
            dbias += head * m * n
        x, _ = _walk(
            tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32), 0.0,
            rows, m, n, m, n,
            load_rows(q, q_m, rows, m, D, BLOCK_D, True),
            load_rows(grad_out, grad_m, rows, m, DV, BLOCK_DV, True),
            _load_group(grads, grad_strides, rows, m, DV, BLOCK_DV, PAIRS),
            k, k_n, v, v_n, values, value_strides,
            bias, bias_m, bias_n, stored, units, grad_map, grad_map_m, dbias, lse, delta, scale,
            UNIT, D, DV, BLOCK_D, BLOCK_DV, PRECISION, PAIRS, False, BLOCK, TAIL_N,
        )  # fmt: skip
        _store_rows(dq + head * m * D, x * scale, rows, m, D, BLOCK_D)


# --- launching --------------------------------------------------------------------------------

Pairs = Sequence[tuple[Tensor, Tensor]]


def attention_backward(
    grad_out: Tensor,
    grad_map: Tensor | None,
    grad_lse: Tensor | None,
    group_grads: Sequence[Tensor],
    group_values: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    map_storage: Tensor,
    lse: Tensor,
    out: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = list(zip(map(_unit_last_stride, group_grads), group_values, strict=True))
    here, later = pairs[:MAX_PAIRS], pairs[MAX_PAIRS:]
    b, h, m, _ = q.shape
    shapes = (q.shape, k.shape, v.shape, (b, h, m, k.shape[2]) if need_bias else (0,))
    found = [q.new_empty(s, dtype=torch.float32 if later else None) for s in shapes]
    if q.numel():
        shared = _shared_arguments(q, k, bias, scale, map_storage, lse)
        shared |= _layer_arguments(_unit_last_stride(grad_out), grad_map, torch.empty_like(lse))
        _launch_delta(shared, out, grad_lse)
        _launch_backward(shared, v, here, found)
    # The rest of a long group, as of layers whose delta is zero: a sum over launches, and rare.
    for start in range(0, len(later) if q.numel() else 0, 1 + MAX_PAIRS):
        (grad, values), *others = later[start : start + 1 + MAX_PAIRS]
        shared |= _layer_arguments(grad, None, torch.zeros_like(lse))
        more = [torch.empty_like(t) for t in found]
        _launch_backward(shared, values, others, more)
        for i in (0, 1, 3):
            found[i] += more[i]
    dq, dk, dv, dbias = (t.to(q.dtype) for t in found)
    return dq, dk, dv, dbias


def _unit_last_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _shared_arguments(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, map_storage: Tensor, lse: Tensor
) -> dict[str, Any]:
    """The map, in whatever form, for both kernels."""
    unit = 16 // map_storage.element_size()
    return {
        **dict(q=q, k=k, bias=bias, lse=lse, scale=scale),
        "stored": map_storage if map_storage.numel() else None,
        **_strides("q", "bhm", q),
        **_strides("k", "bhn", k),
        **_strides("bias", "bhmn", bias),
        **dict(heads=q.shape[1], m=q.shape[2], n=k.shape[2]),
        **dict(units=map_storage.shape[-1] // unit, UNIT=unit, PRECISION=precision(q.dtype)),
        **dict(D=q.shape[3], BLOCK_D=padded(q.shape[3])),
    }


def _layer_arguments(grad_out: Tensor, grad_map: Tensor | None, delta: Tensor) -> dict[str, Any]:
    """What came back to the layer that attends, for both kernels."""
    grad_map = None if grad_map is None else _unit_last_stride(grad_map)
    return {
        **dict(grad_out=grad_out, grad_map=grad_map, delta=delta),
        **_strides("grad", "bmh", grad_out),
        **_strides("grad_map", "bhm", grad_map),
        **dict(DV=grad_out.shape[3], BLOCK_DV=padded(grad_out.shape[3])),
    }


def _strides(name: str, dims: str, t: Tensor | None) -> dict[str, int]:
    return {f"{name}_{dim}": 0 if t is None else t.stride(i) for i, dim in enumerate(dims)}


def _launch_delta(shared: dict[str, Any], out: Tensor, grad_lse: Tensor | None) -> None:
    b, m, h, d = out.shape
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    launch(
        _delta_kernel,
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * b * h,),
        shared | dict(out=out, grad_lse=grad_lse),
        configs.attention_delta(out.dtype),
        (bucket(b * h), bucket(m), bucket(shared["n"]), shared["D"], d),
    )


def _launch_backward(
    shared: dict[str, Any], v: Tensor, pairs: Pairs, found: Sequence[Tensor]
) -> None:
    b, h, n, d = v.shape
    m, widest = shared["m"], max(shared["D"], d)
    dq, dk, dv, dbias = found
    launch(
        _attention_backward_kernel,
        lambda meta: (sum(triton.cdiv(side, meta["BLOCK_OWN"]) for side in (m, n)) * b * h,),
        {
            **shared,
            **dict(dq=dq, dk=dk, dv=dv, dbias=dbias if dbias.numel() else None, v=v),
            **_strides("v", "bhn", v),
            "group_grads": tuple(grad for grad, _ in pairs),
            "group_grad_strides": tuple(grad.stride()[:3] for grad, _ in pairs),
            "group_values": tuple(values for _, values in pairs),
            "group_value_strides": tuple(values.stride()[:3] for _, values in pairs),
            "PAIRS": len(pairs),
        },
        configs.attention_backward(capability(v.device), v.dtype, widest, len(pairs)),
        (bucket(b * h), bucket(m), bucket(n), shared["D"], d, len(pairs)),
    )
