"""``attention``: softmax attention that also hands out its map."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from . import checks, choice
from .codes import CODES
from .maps import AttentionMap, DenseMap, FactoredMap, Links, QuantizedMap, row_pitch
from .registry import call, register

FORMS = (None, "dense", *CODES, "factored", "auto")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    return_map: Literal["dense", "uint8", "e4m3", "factored", "auto"] | None = None,
    reuses: int = 1,
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
        return_map: None, "dense" (the probabilities, in the dtype of q), "uint8" or "e4m3" (8 bits
            an element and a scale per row, see ``QuantizedMap``), "factored" (q, k and the
            log-sum-exp of each row: O(N) memory), or "auto": the fastest for this shape, this
            machine and so many reuses, exact where gradients are wanted (see ``explain``).
        reuses: how many layers will apply the map. That many gradients come back to q, k and bias
            without an N x N gradient in memory; more than that are right too, by way of one, and
            so are those of a layer with a ``head_index`` or dropout.

    Returns:
        out: `[B, H, M, d']`, a view of `[B, M, H, d']` memory: merging heads copies nothing.
        map: the ``AttentionMap`` asked for, or None.

    dtypes: float32, bfloat16, float16, float64, the same for all; accumulation and row statistics
    in float32 (float64 for float64). Under autocast, inputs are cast as for PyTorch's attention.

    Raises:
        ValueError: wrong rank, sizes that don't match, no tokens, a strided last dimension,
            another device, an unknown ``return_map``, negative ``reuses``.
        TypeError: not a floating-point tensor, mixed dtypes.

    Source: PSViT, arXiv 2108.03428, section 3.
    """
    q, k, v, bias = _checked(q, k, v, bias)
    if return_map not in FORMS:
        raise ValueError(
            f"return_map: got {return_map!r}, expected one of {', '.join(map(repr, FORMS))}"
        )
    if checks.integer("reuses", reuses) < 0:
        raise ValueError(f"reuses: got {reuses}, expected 0 or more")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else checks.number("scale", scale)
    trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, bias)
    )
    form: str | None = return_map
    if form == "auto":
        sizes = (*q.shape[:3], k.shape[2], q.shape[3])
        form = choice.resolve(sizes, max(1, reuses), q.dtype, q.device, trained)
    links = reuses if trained and form is not None else 0
    ops = torch.ops.psvit_kernels
    if form in CODES:
        code = CODES[form]
        out, coded, row_scale, lse, pairs = ops.attention_quantized(
            q, k, v, bias, scale, code, links
        )
        attn_map: AttentionMap = QuantizedMap(coded, row_scale, k.shape[2], q.dtype)
    else:
        dense = form == "dense"
        out, storage, lse, pairs = ops.attention(q, k, v, bias, scale, dense, links)
        if form is None:
            return out.transpose(1, 2), None
        attn_map = DenseMap(storage, k.shape[2]) if dense else FactoredMap(q, k, lse, scale, bias)
    attn_map.links = Links(lse, pairs) if links else None
    return out.transpose(1, 2), attn_map


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


def _links(out: Tensor, v: Tensor, count: int) -> list[Tensor]:
    """Pairs of stand-ins for the gradient of an output and for values: one element each."""
    pair = (out, v)
    return [t.new_empty(1).expand(t.shape) for _ in range(count) for t in pair]


def _fake(q, k, v, bias, scale, dense_map, links):
    out, storage, lse = _fake_results(q, k, v, row_pitch(k.shape[2], q.element_size()))
    return out, storage if dense_map else q.new_empty(0), lse, _links(out, v, links)


def _fake_quantized(q, k, v, bias, scale, code, links):
    out, codes, lse = _fake_results(q, k, v, row_pitch(k.shape[2], 1))
    return (
        out,
        codes.to(code),
        torch.empty_like(lse, dtype=torch.float32),
        lse,
        _links(out, v, links),
    )


def _fake_results(q, k, v, pitch):
    b, h, m, _ = q.shape
    out, storage = q.new_empty(b, m, h, v.shape[3]), q.new_empty(b, h, m, pitch)
    return out, storage, q.new_empty(b, h, m, dtype=wide_dtype(q.dtype))


def _run(q, k, v, bias, scale, dense_map, links):
    out, storage, lse = call("attention", q, k, v, bias, scale, dense_map)
    return out, storage, lse, _links(out, v, links)


def _run_quantized(q, k, v, bias, scale, code, links):
    out, codes, row_scale, lse = call("attention_quantized", q, k, v, bias, scale, code)
    return out, codes, row_scale, lse, _links(out, v, links)


def _fake_backward(
    grad_out, grad_map, grad_lse, group_grads, group_values, q, k, v, bias, scale, map_storage,
    lse, out, need_bias,
):  # fmt: skip
    b, h, m, _ = q.shape
    dbias = q.new_empty(b, h, m, k.shape[2]) if need_bias else q.new_empty(0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dbias)


def _setup_context(ctx, inputs, output):
    q, k, v, bias, ctx.scale, dense_map, _ = inputs
    out, storage, lse, _ = output
    if not dense_map:
        ctx.mark_non_differentiable(storage)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, storage, lse, out)


def _setup_quantized(ctx, inputs, output):
    q, k, v, bias, ctx.scale, _, _ = inputs
    out, codes, row_scale, lse, _ = output
    ctx.mark_non_differentiable(codes, row_scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, q.new_empty(0), lse, out)


def _backward(ctx, grad_out, grad_map, grad_lse, grad_links):
    q, k, v, bias, storage, lse, out = ctx.saved_tensors
    pairs = [pair for pair in zip(*[iter(grad_links)] * 2, strict=True) if pair[0] is not None]
    if grad_out is None:
        if grad_map is None and grad_lse is None and not pairs:
            return None, None, None, None, None, None, None
        grad_out = torch.zeros_like(out)
    need_bias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = torch.ops.psvit_kernels.attention_backward(
        grad_out, grad_map, grad_lse, [g for g, _ in pairs], [values for _, values in pairs],
        q, k, v, bias, ctx.scale, storage, lse, out, need_bias,
    )  # fmt: skip
    return dq, dk, dv, dbias if need_bias else None, None, None, None


def _backward_quantized(ctx, grad_out, grad_codes, grad_row_scale, grad_lse, grad_links):
    return _backward(ctx, grad_out, None, grad_lse, grad_links)


register(
    "attention_backward(Tensor grad_out, Tensor? grad_map, Tensor? grad_lse, Tensor[] group_grads,"
    " Tensor[] group_values, Tensor q, Tensor k, Tensor v, Tensor? bias, float scale,"
    " Tensor map_storage, Tensor lse, Tensor out, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool dense_map, int links)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    _fake,
    _backward,
    _setup_context,
    _run,
)
register(
    "attention_quantized(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, ScalarType code,"
    " int links) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _fake_quantized,
    _backward_quantized,
    _setup_quantized,
    _run_quantized,
)
