"""``reduce_map``: a tile of the result, each element gathered from rows and columns; no atomics.

Most groups have one member: the loops over members run as often as the largest group of a tile
has some, with few elements at work after the first. What is read for one element of a row lies near
what its neighbours need, so that rows come from memory whole, and once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..maps import row_pitch
from . import configs
from .launch import bucket, launch
from .tiles import place


def reduce_map(
    storage: Tensor, n: int, order: Tensor, starts: Tensor, means: Tensor, shares: Tensor | None
) -> Tensor:
    images, entries = order.shape
    b, h, m = max(storage.shape[0], images), storage.shape[1], starts.shape[1] - 1
    if storage.stride(3) != 1:  # gradients arrive with any strides
        storage = storage.contiguous()
    storage = storage.expand(b, -1, -1, -1)
    out = storage.new_empty(b, h, m, row_pitch(m, storage.itemsize))
    arguments = {
        "map_ptr": storage,
        "order_ptr": order.contiguous(),
        "starts_ptr": starts.contiguous(),
        "means_ptr": means.contiguous(),
        "shares_ptr": None if shares is None else shares.contiguous(),
        "out_ptr": out,
        "heads": h,
        "m": m,
        "pitch": out.shape[3],
        "order_stride": entries if images > 1 else 0,
        "starts_stride": m + 1 if images > 1 else 0,
        "map_stride_b": storage.stride(0),
        "map_stride_h": storage.stride(1),
        "map_stride_n": storage.stride(2),
    }
    launch(
        _reduce_map_kernel,
        lambda meta: (b * h * triton.cdiv(m, meta["BLOCK_M"]),),
        arguments,
        configs.reduce_map(m),
        (bucket(b * h), bucket(m)),
    )
    return out


@triton.jit
def _members(starts_ptr, group, m):
    """Where the members of groups begin, and how many they are."""
    is_group = group < m
    begin = tl.load(starts_ptr + group, mask=is_group, other=0)
    return begin, tl.load(starts_ptr + group + 1, mask=is_group, other=0) - begin


@triton.jit
def _member(order_ptr, values_ptr, begin, count, number):
    """One member of each group, and how much of it counts."""
    there = number < count
    token = tl.load(order_ptr + begin + number, mask=there, other=0)
    if values_ptr is None:
        part = there.to(tl.float32)
    else:
        part = tl.load(values_ptr + begin + number, mask=there, other=0.0).to(tl.float32)
    return token, part, there


@triton.jit
def _reduce_map_kernel(
    map_ptr, order_ptr, starts_ptr, means_ptr, shares_ptr, out_ptr, heads, m, pitch,
    order_stride, starts_stride, map_stride_b, map_stride_h, map_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    image, head, first = place(m, heads, BLOCK_M)
    map_ptr += image * map_stride_b + head * map_stride_h
    out_ptr += (image * heads + head) * m * pitch
    order_ptr += image * order_stride
    starts_ptr += image * starts_stride
    means_ptr += image * order_stride
    if shares_ptr is not None:
        shares_ptr += image * order_stride
    rows = first + tl.arange(0, BLOCK_M)
    row_begin, row_count = _members(starts_ptr, rows, m)
    for start in range(0, pitch, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_begin, column_count = _members(starts_ptr, columns, m)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(tl.max(row_count, 0)):
            row, mean, is_row = _member(order_ptr, means_ptr, row_begin, row_count, i)
            line = map_ptr + row * map_stride_n
            for j in range(tl.max(column_count, 0)):
                column, share, is_column = _member(
                    order_ptr, shares_ptr, column_begin, column_count, j
                )
                there = is_row[:, None] & is_column[None, :]
                p = tl.load(line[:, None] + column[None, :], mask=there, other=0.0)
                total += p.to(tl.float32) * (mean[:, None] * share[None, :])
        inside = (rows < m)[:, None] & (columns < pitch)[None, :]
        pointers = out_ptr + rows[:, None] * pitch + columns[None, :]
        tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=inside)
