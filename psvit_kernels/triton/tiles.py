"""What the kernels share: pieces of a row, the 8-bit code of a map, dropout's mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def precision(dtype: torch.dtype) -> str:
    """Of products of float32: TF32 only where the user has allowed it to PyTorch too."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def padded(n: int) -> int:
    """The side of a tile for ``n`` elements: a power of two, and at least a product's 16."""
    return max(16, triton.next_power_of_2(n))


def tail(n: int, block: int) -> int:
    """Width of the masked tile after the full ones: 197 = 3 x 64 + 5 needs 16 more, not 64."""
    return padded(n % block) if n % block else 0


@triton.jit
def keep(seed, rows, columns, n, head, dropout):
    """1 / (1 - dropout) where an element of the map is kept, else 0; head counts over the batch."""
    element = rows[:, None] * n + columns[None, :]
    words, _, _, _ = tl.philox(seed, element, head.to(tl.int32), 0, 0)
    return tl.where(tl.uint_to_uniform_float(words) >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit
def encode(root, dtype: tl.constexpr):
    """The 8-bit codes of e = root^2 (``codes.py``), and the weights that they stand for.

    From the root, because exp2(x / 2) costs what exp2(x) does, and a square root as much again.
    """
    if dtype == tl.uint8:
        # Rounds a root that a fused multiply-add left a little above 1 to 1.
        bits = (root * 1.4921875 + 0.5).to(tl.int32, bitcast=True) + 0x8000
        code = (bits >> 16).to(tl.uint8)
        rounded = (bits & 0x7FFF0000).to(tl.float32, bitcast=True) - 0.5
        weight = rounded * rounded
    else:
        code = (root * root * 256).to(dtype)
        weight = code.to(tl.float32)
    return code, weight


@triton.jit
def decode(code, dtype: tl.constexpr):
    """The weights that codes stand for, up to the scale of their row."""
    if code.dtype != tl.uint8:
        weight = code.to(dtype)
    elif dtype == tl.bfloat16:
        root = (code.to(tl.int16) | 0x3F00).to(tl.bfloat16, bitcast=True) - 0.5
        weight = root * root
    else:
        root = (code.to(tl.int32) << 16 | 0x3F000000).to(tl.float32, bitcast=True) - 0.5
        weight = (root * root).to(dtype)
    return weight


@triton.jit
def place(count, heads, BLOCK: tl.constexpr):
    """Batch, head and first row of this program: the blocks of one head are neighbours, so that
    what they all read comes from memory once, and from the L2 cache then."""
    blocks = tl.cdiv(count, BLOCK)
    head = tl.program_id(0) // blocks
    return (
        (head // heads).to(tl.int64),
        (head % heads).to(tl.int64),
        tl.program_id(0) % blocks * BLOCK,
    )


@triton.jit
def load_rows(ptr, stride, rows, end, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, (BLOCK, BLOCK_D), zero outside: what a product met there could be NaN."""
    dims = tl.arange(0, BLOCK_D)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=(rows < end)[:, None] & (dims < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_map(ptr, stride, units, rows, columns, end, UNIT: tl.constexpr, MASKED: tl.constexpr):
    """A tile of a stored map, zero outside; MASKED: columns may be.

    Strides and widths are in units of UNIT elements, 16 bytes if the storage allows: the compiler
    then knows that 16 bytes may be loaded at once, also under the mask. Padding is read: it is 0.
    """
    pointers = ptr + (rows.to(tl.int64) * stride)[:, None] * UNIT + columns[None, :]
    inside = (rows < end)[:, None]
    if MASKED:
        inside = inside & (columns < units * UNIT)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_tile(ptr, stride_0, stride_1, rows, columns, end_0, end_1, MASKED: tl.constexpr):
    """(BLOCK_0, BLOCK_1) of any strides, in float32, zero outside; MASKED: columns may be."""
    offsets = rows.to(tl.int64)[:, None] * stride_0 + columns.to(tl.int64)[None, :] * stride_1
    inside = (rows < end_0)[:, None]
    if MASKED:
        inside = inside & (columns < end_1)[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
