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
    words, _, _, _ = tl.philox(seed, rows[:, None] * n + columns[None, :], head, 0, 0)
    return tl.where(tl.uint_to_uniform_float(words) >= dropout, 1 / (1 - dropout), 0.0)


@triton.jit
def encode(e, dtype: tl.constexpr):
    """The 8-bit code of probabilities relative to the largest of their row: see ``codes.py``."""
    if dtype == tl.uint8:
        code = (tl.sqrt(e) * 255 + 0.5).to(tl.int32).to(tl.uint8)
    else:
        code = (e * 256).to(dtype)
    return code


@triton.jit
def decode(code, dtype: tl.constexpr):
    """The weights that codes stand for, up to the scale of their row."""
    if code.dtype == tl.uint8:
        root = code.to(tl.float32) * (1 / 256)
        weight = root * root
    else:
        weight = code
    return weight.to(dtype)
