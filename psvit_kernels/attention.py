"""``attention``: softmax attention that also hands out its map."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import checks
from .maps import AttentionMap, DenseMap, FactoredMap, row_pitch
from .registry import register


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    return_map: Literal["dense", "factored"] | None = None,
) -> tuple[Tensor, AttentionMap | None]:
    """O = P V with P = softmax(scale Q K^T + bias), and P itself if asked for.

    Args:
        q: queries, `[B, H, M, d]`. Any strides with unit stride on the last dimension, so that
            views of a fused qkv projection pass without a copy.
        k: keys, `[B, H, N, d]`.
        v: values, `[B, H, N, d']`.
        scale: factor of the scores; 1 / sqrt(d) if None.
        bias: added to the scores, broadcastable to `[B, H, M, N]`, the dtype of q: masks (-inf),
            key bias, relative positions. Gradients reach it. A row of -inf alone gives NaN.
        return_map: None, "dense" (the probabilities, in the dtype of q) or "factored" (q, k and
            the log-sum-exp of each row: O(N) memory).

    Returns:
        out: `[B, H, M, d']`, a view of `[B, M, H, d']` memory: merging heads copies nothing.
        map: the ``AttentionMap`` asked for, or None.

    dtypes: float32, bfloat16, float16, float64, the same for all; accumulation and row statistics
    in float32 (float64 for float64). Under autocast, inputs are cast as for PyTorch's attention.

    Raises:
        ValueError: wrong rank, sizes that don't match, no tokens, a strided last dimension,
            another device, an unknown ``return_map``.
        TypeError: not a floating-point tensor, mixed dtypes.

    Source: PSViT, arXiv 2108.03428, section 3.
    """
    q, k, v, bias = _checked(q, k, v, bias)
    if return_map not in (None, "dense", "factored"):
        raise ValueError(f'return_map: got {return_map!r}, expected None, "dense" or "factored"')
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else checks.number("scale", scale)
    dense = return_map == "dense"
    out, storage, lse = torch.ops.psvit_kernels.attention(q, k, v, bias, scale, dense)
    out = out.transpose(1, 2)
    if return_map is None:
        return out, None
    if dense:
        return out, DenseMap(storage, k.shape[2])
    return out, FactoredMap(q, k, lse, scale, bias)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    checks.is_tensor("q", q, 4, "(B, H, M, d)")
    checks.is_tensor("k", k, 4, "(B, H, N, d)")
    checks.is_tensor("v", v, 4, "(B, H, N, d)")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias: got {type(bias).__name__}, expected a Tensor or None")
    if bias is not None and bias.dtype == torch.bool:
        raise TypeError(
            "bias: got dtype torch.bool, expected a tensor to add to the scores; "
            "make one with torch.where(mask, 0.0, -torch.inf)"
        )
    dtype = checks.autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, t in (("k", k), ("v", v)):
        checks.same_kind(name, t, "q", q)
        checks.size(name, t, 0, "batch", q.shape[0], "q")
        checks.size(name, t, 1, "heads", q.shape[1], "q")
    checks.size("k", k, 3, "head dim", q.shape[3], "q")
    checks.size("v", v, 2, "tokens", k.shape[2], "k")
    checks.not_empty("q", q, 2, "token")
    checks.not_empty("k", k, 2, "token")
    checks.not_empty("q", q, 3, "number per head")
    checks.not_empty("v", v, 3, "number per head")
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.unit_last_stride(name, t)
    if bias is not None:
        checks.same_kind("bias", bias, "q", q)
        bias = _expanded_bias(bias, (*q.shape[:3], k.shape[2]))
    return q, k, v, bias


def _expanded_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    fits = bias.dim() <= 4 and all(
        have in (1, want) for have, want in zip(padded, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected one that broadcasts to "
            f"(B, H, M, N) = {tuple(shape)}"
        )
    return bias.expand(shape)


# --- registration ---------------------------------------------------------------------------


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(q, k, v, bias, scale, dense_map):
    b, h, m, _ = q.shape
    n = k.shape[2]
    out = q.new_empty(b, m, h, v.shape[3])
    pitch = row_pitch(n, q.element_size())
    storage = q.new_empty(b, h, m, pitch) if dense_map else q.new_empty(0)
    return out, storage, q.new_empty(b, h, m, dtype=wide_dtype(q.dtype))


def _fake_backward(grad_out, grad_map, q, k, v, bias, scale, map_storage, lse, need_bias):
    b, h, m, _ = q.shape
    dbias = q.new_empty(b, h, m, k.shape[2]) if need_bias else q.new_empty(0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dbias)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, scale, dense_map = inputs
    _, storage, lse = output
    # One call: another one would replace the first.
    ctx.mark_non_differentiable(*((lse,) if dense_map else (lse, storage)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, storage, lse)
    ctx.scale = scale


def _backward(ctx, grad_out, grad_map, grad_lse):
    q, k, v, bias, storage, lse = ctx.saved_tensors
    if grad_out is None:
        if grad_map is None:
            return None, None, None, None, None, None
        grad_out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    need_bias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = torch.ops.psvit_kernels.attention_backward(
        grad_out, grad_map, q, k, v, bias, ctx.scale, storage, lse, need_bias
    )
    return dq, dk, dv, dbias if need_bias else None, None, None


register(
    "attention_backward(Tensor grad_out, Tensor? grad_map, Tensor q, Tensor k, Tensor v,"
    " Tensor? bias, float scale, Tensor map_storage, Tensor lse, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool dense_map)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    _backward,
    _setup_context,
)
