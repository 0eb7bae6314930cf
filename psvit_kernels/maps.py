"""The value that one attention layer computes and later layers may apply.

A map has shape (B or 1, H, M, N) and its rows sum to 1. It travels from layer to layer as a
value; it is never stored on a module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import checks, codes
from .groups import TokenGroups, check_groups

#: Rows of a stored map start on multiples of this many bytes, for vector loads and bulk copies.
ROW_ALIGNMENT = 16


def row_pitch(n: int, itemsize: int) -> int:
    """Elements between the starts of two rows of a stored map of ``n`` columns."""
    per_unit = ROW_ALIGNMENT // itemsize
    return (n + per_unit - 1) // per_unit * per_unit


class Links:
    """Edges on which the layers that apply a map send their gradients back to its donor.

    The gradient of a map is a sum of products, dP = sum_l dO_l V_l^T. Instead of writing it, each
    application sends dO_l and V_l, and its part of the log-sum-exp's gradient, and the donor's
    backward walks them. A link is a tensor without memory of its own whose "gradient" is such a
    tensor; it can carry one, so each application takes its own pair.

    Args:
        lse: of the donor.
        pairs: stand-ins for `[B, M, H, d]` and `[B, H, N, d]`, one of each for every application.
    """

    def __init__(self, lse: Tensor, pairs: list[Tensor]) -> None:
        self.lse = lse
        self.pairs = pairs

    def take(self, v: Tensor) -> list[Tensor]:
        """The log-sum-exp and a pair for values like ``v``, or nothing if there is none."""
        if not self.pairs or self.pairs[1].shape != v.shape:
            return []
        pair, self.pairs = self.pairs[:2], self.pairs[2:]
        return [self.lse, *pair]


class AttentionMap:
    """Base class of the forms of an attention map; make one with ``attention(return_map=...)``."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    links: Links | None

    def dense(self) -> Tensor:
        """The probabilities, (B, H, M, N), for people and pictures."""
        raise TypeError(f"{type(self).__name__} has no dense form")

    def reduce(self, groups: TokenGroups) -> DenseMap:
        """The map of tokens that became fewer: rows averaged, columns summed.

        Its rows sum to 1. It does to values that are equal within groups what this map does
        before its results are averaged. Other forms than ``DenseMap`` are made dense first.

        Args:
            groups: of the N tokens, of each image or the same for all.

        Returns:
            `(B, H, M, M)`; gradients go back to this map, none to the groups.

        Raises:
            ValueError: a map that isn't square, groups of other tokens or images.
            TypeError: no groups.
        """
        source = self if isinstance(self, DenseMap) else DenseMap.from_dense(self.dense())
        check_groups(groups, source.storage, source.n)
        reduced = torch.ops.psvit_kernels.reduce_map(source.storage, source.n, *groups)
        return DenseMap(reduced, groups.tokens)

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
    links: Links | None = field(default=None, repr=False)

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
class QuantizedMap(AttentionMap):
    """Probabilities in 8 bits with a scale per row: half the memory of a bfloat16 map.

    P[b, h, i, j] = row_scale[b, h, i] * weight(codes[b, h, i, j]); what the codes and weights are,
    and how far such maps are from exact ones in a trained model, says ``psvit_kernels/codes.py``.
    The scale is one over the sum of the row's weights, so that rows stay convex: what rounding
    takes from one token goes to the others, in proportion. The worst row has one peak and N - 1
    equal probabilities that all round the same way: a total variation of 0.00086 sqrt(N) with
    uint8, of 1/64 with e4m3 (and there what is below 2^-18 of the peak is lost).

    Gradients pass straight through: those of v are exact for this map, those of q, k and bias are
    what the exact probabilities have for the gradient that arrives here. They need a link for every
    application (``attention(..., reuses=...)``); one map made by ``from_dense`` has none.

    Args:
        codes: `[B or 1, H, M, pitch]`, uint8 or float8_e4m3fn, columns ``n`` and beyond are zero.
        row_scale: `[B or 1, H, M]`, float32.
        n: number of columns that count.
        dtype: of the values that it is applied to.
    """

    codes: Tensor
    row_scale: Tensor
    n: int
    dtype: torch.dtype  # type: ignore[misc]
    links: Links | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        c, scale = self.codes, self.row_scale
        known = tuple(codes.CODES.values())
        if not isinstance(c, Tensor) or c.dim() != 4 or c.dtype not in known:
            got = type(c).__name__ if not isinstance(c, Tensor) else f"{tuple(c.shape)}, {c.dtype}"
            raise TypeError(
                f"codes: got {got}, expected (B or 1, H, M, pitch), {' or '.join(map(str, known))}"
            )
        checks.is_tensor("row_scale", scale, 3, "(B or 1, H, M)")
        if scale.shape != c.shape[:3] or scale.dtype != torch.float32 or scale.device != c.device:
            raise ValueError(
                f"row_scale: got shape {tuple(scale.shape)}, {scale.dtype} on {scale.device}, "
                f"expected {tuple(c.shape[:3])}, torch.float32 on {c.device}"
            )
        if not 1 <= self.n <= c.shape[-1]:
            raise ValueError(
                f"n: got {self.n} for codes of shape {tuple(c.shape)}, expected 1 to "
                f"{c.shape[-1]}, the number of columns that count"
            )
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype: got {self.dtype}, expected a floating-point dtype")
        checks.unit_last_stride("codes", c)

    @classmethod
    def from_dense(cls, probabilities: Tensor, code: str = "uint8") -> QuantizedMap:
        """Codes given probabilities, `[B or 1, H, M, N]`.

        Args:
            code: "uint8" or "e4m3".

        Raises:
            ValueError: not four dimensions, no column, or an unknown code.
            TypeError: not a floating-point tensor.
        """
        checks.is_tensor("probabilities", probabilities, 4, "(B or 1, H, M, N)")
        checks.not_empty("probabilities", probabilities, 3, "column")
        if code not in codes.CODES:
            raise ValueError(f'code: got {code!r}, expected "uint8" or "e4m3"')
        n = probabilities.shape[-1]
        p = probabilities.detach().float()
        coded = codes.encode(p / p.amax(-1, keepdim=True), codes.CODES[code])
        return cls(*padded_codes(coded), n, probabilities.dtype)

    def dense(self) -> Tensor:
        weights = codes.decode(self.codes[..., : self.n], torch.float32)
        return (weights * self.row_scale.unsqueeze(-1)).to(self.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        b, h, m, _ = self.codes.shape
        return (b, h, m, self.n)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.row_scale.numel()


def padded_codes(coded: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[B, H, M, N]` in rows of 16 bytes, and the scale of each row, float32."""
    *rows, n = coded.shape
    storage = torch.zeros(*rows, row_pitch(n, 1), dtype=coded.dtype, device=coded.device)
    storage[..., :n] = coded
    return storage, 1 / codes.decode(coded, torch.float32).sum(-1)


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
    links: Links | None = field(default=None, repr=False)

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
