"""The value that one attention layer computes and later layers may apply.

A map has shape (B or 1, H, M, N) and its rows sum to 1. It travels from layer to layer as a
value; it is never stored on a module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks

#: Rows of a stored map start on multiples of this many bytes, for vector loads and bulk copies.
ROW_ALIGNMENT = 16


def row_pitch(n: int, itemsize: int) -> int:
    """Elements between the starts of two rows of a stored map of ``n`` columns."""
    per_unit = ROW_ALIGNMENT // itemsize
    return (n + per_unit - 1) // per_unit * per_unit


class AttentionMap:
    """Base class of the forms of an attention map; make one with ``attention(return_map=...)``."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> Tensor:
        """The probabilities, (B, H, M, N), for people and pictures."""
        raise TypeError(f"{type(self).__name__} has no dense form")

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keeping this map costs."""
        raise TypeError(f"{type(self).__name__} has no size")


@dataclass(eq=False)
class DenseMap(AttentionMap):
    """Probabilities, each row padded with zeros to a multiple of 16 bytes.

    Args:
        storage: `[B or 1, H, M, pitch]`, columns ``n`` and beyond are zero.
        n: number of columns that count.
    """

    storage: Tensor
    n: int

    def __post_init__(self) -> None:
        checks.is_tensor("storage", self.storage, 4, "(B or 1, H, M, pitch)")
        if not 1 <= self.n <= self.storage.shape[-1]:
            raise ValueError(
                f"n: got {self.n} for storage of shape {tuple(self.storage.shape)}, expected 1 to "
                f"{self.storage.shape[-1]}, the number of columns that count"
            )
        checks.unit_last_stride("storage", self.storage)

    @classmethod
    def from_dense(cls, probabilities: Tensor) -> DenseMap:
        """Stores given probabilities, `[B or 1, H, M, N]`, as a map (one copy if N needs padding).

        Raises:
            ValueError: not four dimensions, or no column.
            TypeError: not a floating-point tensor.
        """
        checks.is_tensor("probabilities", probabilities, 4, "(B or 1, H, M, N)")
        checks.not_empty("probabilities", probabilities, 3, "column")
        n = probabilities.shape[-1]
        padding = row_pitch(n, probabilities.element_size()) - n
        return cls(torch.nn.functional.pad(probabilities, (0, padding)).contiguous(), n)

    def dense(self) -> Tensor:
        return self.storage[..., : self.n]

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        b, h, m, _ = self.storage.shape
        return (b, h, m, self.n)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.storage.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.storage.device

    @property
    def nbytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()


@dataclass(eq=False)
class FactoredMap(AttentionMap):
    """What a map can be rebuilt from: O(N) memory, and no softmax reduction when it is applied.

    P[b, h, i, j] = exp(scale * q[b, h, i] . k[b, h, j] + bias[b, h, i, j] - lse[b, h, i]).

    Args:
        q: `[B, H, M, d]`.
        k: `[B, H, N, d]`.
        lse: `[B, H, M]`, log-sum-exp of each row, float32 (float64 for float64 inputs).
        scale: factor of the scores.
        bias: None, or `[B, H, M, N]` (expanded views are fine).
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    scale: float
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        q, k, lse, bias = self.q, self.k, self.lse, self.bias
        checks.is_tensor("q", q, 4, "(B, H, M, d)")
        checks.is_tensor("k", k, 4, "(B, H, N, d)")
        checks.is_tensor("lse", lse, 3, "(B, H, M)")
        checks.same_kind("k", k, "q", q)
        for dim, meaning in ((0, "batch"), (1, "heads"), (3, "head dim")):
            checks.size("k", k, dim, meaning, q.shape[dim], "q")
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        if lse.shape != q.shape[:3] or lse.dtype != wide or lse.device != q.device:
            raise ValueError(
                f"lse: got shape {tuple(lse.shape)}, {lse.dtype} on {lse.device}, expected "
                f"{tuple(q.shape[:3])}, {wide} on {q.device}"
            )
        if bias is not None:
            checks.is_tensor("bias", bias, 4, "(B, H, M, N)")
            checks.same_kind("bias", bias, "q", q)
            if bias.shape != self.shape:
                raise ValueError(
                    f"bias: got shape {tuple(bias.shape)}, expected {self.shape}; expand it"
                )
        checks.unit_last_stride("q", q)
        checks.unit_last_stride("k", k)

    def dense(self) -> Tensor:
        wide = self.lse.dtype
        scores = (self.q.to(wide) @ self.k.to(wide).transpose(-1, -2)) * self.scale
        if self.bias is not None:
            scores = scores + self.bias.to(wide)
        # Not exp(scores - lse): lse is no input to autograd, and gradients are those of a softmax.
        return torch.softmax(scores, -1).to(self.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        b, h, m, _ = self.q.shape
        return (b, h, m, self.k.shape[2])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.q.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.q.device

    @property
    def nbytes(self) -> int:
        parts = [self.q, self.k, self.lse] + ([] if self.bias is None else [self.bias])
        return sum(_nbytes(t) for t in parts)


def _nbytes(t: Tensor) -> int:
    """Bytes of the elements of ``t``, those that an expanded view repeats counted once."""
    sizes = (n for n, step in zip(t.shape, t.stride(), strict=True) if step or n == 0)
    return math.prod(sizes) * t.element_size()
