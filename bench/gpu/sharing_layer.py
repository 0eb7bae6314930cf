"""An experiment: a sharing layer up to its output projection as one kernel (Hopper).

O = P V with V = LayerNorm(x) W^T + b takes three launches as the package does it. The kernel in
csrc/cuda/sharing_hopper.cu makes V in shared memory, once for each head, and applies the map to it;
csrc/cuda/NOTES.md says what it should win and lose. It has no operation: the benchmark measures it
beside the launches that it would replace, and it becomes one, or goes, by what is found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psvit_kernels import DenseMap, cuda

MAX_TOKENS, MAX_HEAD_DIM = 256, 64


class Projection(NamedTuple):
    """W and b of V with the LayerNorm before it folded in, and the sums of the rows of W."""

    weight: Tensor  # (H d, C), half
    sums: Tensor  # (H d,), float32
    bias: Tensor  # (H d,), float32


def fold(norm: torch.nn.LayerNorm, projection: torch.nn.Linear) -> Projection:
    """What stays the same between calls; the sums are those of the rounded weight."""
    wide = projection.weight.float()
    weight = (wide * norm.weight.float()).to(projection.weight.dtype).contiguous()
    bias = wide @ norm.bias.float() + projection.bias.float()
    return Projection(weight, weight.float().sum(1), bias)


def sharing_layer(x: Tensor, eps: float, projection: Projection, attn_map: DenseMap) -> Tensor:
    """(B, N, H, d) from x (B, N, C) before its LayerNorm and the map (B or 1, H, N, N)."""
    b, n, c = x.shape
    h = attn_map.shape[1]
    d = projection.weight.shape[0] // h
    if n > MAX_TOKENS or d > MAX_HEAD_DIM or d % 8 or c % 8:
        raise ValueError(
            f"x: got {n} tokens of {c} channels and heads of {d} numbers, expected at most "
            f"{MAX_TOKENS} tokens and {MAX_HEAD_DIM} numbers, multiples of 8"
        )
    out = x.new_empty(b, n, h, d)
    cuda._cuda.sharing(
        cuda._place(x.device), x.dtype is torch.bfloat16,
        (b, h, n, c, d, attn_map.shape[0]), x.data_ptr(), x.stride()[:2],
        projection.weight.data_ptr(), projection.sums.data_ptr(), projection.bias.data_ptr(), eps,
        cuda._strided(attn_map.storage), out.data_ptr(),
    )  # fmt: skip
    return out
