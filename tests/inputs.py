"""Tensors that go into the operations: random, cut out of others, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F32).to(dtype)


def probabilities(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return normal(*shape).softmax(-1).to(dtype)


def fused_qkv(
    b: int, n: int, heads: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one (B, N, 3 H d) projection, as in timm."""
    q, k, v = normal(b, n, 3, heads, d, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def guarded(values: Tensor, offset: int = 0, gaps: Sequence[int] = ()) -> Tensor:
    """The same values in memory that is NaN everywhere else: before, between rows and after.

    Dimensions keep their order in memory; ``gaps[i]`` elements are left after each block of
    dimension i. What reads past a row becomes NaN.
    """
    gaps = list(gaps) or [0] * values.dim()
    strides, step = [0] * values.dim(), 1
    for dim in reversed(range(values.dim())):
        strides[dim] = step
        step = step * values.shape[dim] + gaps[dim]
    memory = torch.full((offset + max(step, 1) + 64,), math.nan, dtype=values.dtype)
    view = memory.as_strided(values.shape, strides, offset)
    return view.copy_(values)


def described(case: tuple) -> str:
    """The fields of a case, tensors by what matters about them."""
    fields = zip(case._fields, case, strict=True)  # type: ignore[attr-defined]
    return ", ".join(f"{name}={_described(value)}" for name, value in fields)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        place = f"strides {tuple(value.stride())} from {value.storage_offset()}"
        return f"<{kind} {tuple(value.shape)} {place}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_described, value)) + "]"
    return repr(value)


def leaf(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A leaf with the same values (and strides, if the dtype stays), so that grads can be asked."""
    if t is None:
        return None
    return t.detach().to(t.dtype if dtype is None else dtype).requires_grad_()


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()
