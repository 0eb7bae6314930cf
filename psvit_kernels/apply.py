"""``apply_attention``: what a layer that shares a map computes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .maps import AttentionMap, DenseMap, FactoredMap
from .registry import register


def apply_attention(
    attn_map: AttentionMap,
    v: Tensor,
    *,
    head_index: Sequence[int] | None = None,
    correction: Tensor | None = None,
) -> Tensor:
    """O = P V from a map that another layer computed: no Q, no K, no QK^T, no softmax.

    Args:
        attn_map: the map, `[B, H, M, N]`. The batch of a ``DenseMap`` may be 1: one map for all.
        v: values, `[B, H, N, d]`, any strides with unit stride on the last dimension, the dtype
            of the map.
        head_index: H integers; head h of ``v`` uses head ``head_index[h]`` of the map. None: its
            own. Costs nothing.
        correction: `[H, 3]`, (alpha, beta, gamma) per head, float32 or the dtype of v: the result
            is alpha (P V) + beta V + gamma mean over tokens(V). Needs M = N. Free when absent.

    Returns:
        `[B, H, M, d]`, a view of `[B, M, H, d]` memory: merging heads copies nothing.

    Gradients reach v, the correction and the map; through a ``FactoredMap`` they reach its q, k
    and bias as if this layer had computed the softmax itself.

    Raises:
        ValueError: sizes that don't match, a strided last dimension, another device, a head index
            that is out of range or of the wrong length.
        TypeError: not a map, not a floating-point tensor, mixed dtypes.

    Source: PSViT, arXiv 2108.03428, section 3.
    """
    attn_map, v = _checked(attn_map, v)
    heads = _checked_heads(head_index, attn_map.shape[1], v.shape[1])
    _check_correction(correction, attn_map, v)
    if isinstance(attn_map, DenseMap):
        out = torch.ops.psvit_kernels.apply_dense(attn_map.storage, v, heads, correction)
    else:
        m = attn_map
        out = torch.ops.psvit_kernels.apply_factored(
            m.q, m.k, m.lse, m.bias, m.scale, v, heads, correction
        )
    return out.transpose(1, 2)


def _checked(attn_map: AttentionMap, v: Tensor) -> tuple[DenseMap | FactoredMap, Tensor]:
    if not isinstance(attn_map, (DenseMap, FactoredMap)):
        raise TypeError(
            f"attn_map: got {type(attn_map).__name__}, expected a DenseMap or FactoredMap; "
            f"DenseMap.from_dense(probabilities) makes one"
        )
    checks.is_tensor("v", v, 4, "(B, H, N, d)")
    dtype = checks.autocast_dtype(v.device.type)
    if dtype is not None and v.dtype != torch.float64:
        v = v.to(dtype)
    if v.dtype != attn_map.dtype:
        raise TypeError(f"v: got dtype {v.dtype}, expected {attn_map.dtype} as the map")
    if v.device != attn_map.device:
        raise ValueError(f"v: is on device {v.device}, expected {attn_map.device} as the map")
    batch, _, _, n = attn_map.shape
    if batch != v.shape[0] and not (batch == 1 and isinstance(attn_map, DenseMap)):
        allowed = f"{batch} as the map" + ("" if isinstance(attn_map, DenseMap) else " (factored)")
        raise ValueError(
            f"v: got shape {tuple(v.shape)} with batch {v.shape[0]}, expected {allowed}"
        )
    checks.size("v", v, 2, "tokens", n, "the map")
    checks.not_empty("v", v, 3, "number per head")
    checks.unit_last_stride("v", v)
    return attn_map, v


def _checked_heads(
    head_index: Sequence[int] | None, donor_heads: int, heads: int
) -> list[int] | None:
    if head_index is None:
        if donor_heads != heads:
            raise ValueError(
                f"v: got {heads} heads, expected {donor_heads} as the map, or a head_index"
            )
        return None
    index = list(checks.integers("head_index", head_index))
    if len(index) != heads:
        raise ValueError(f"head_index: got {len(index)} entries, expected {heads}, one per head")
    if not all(0 <= i < donor_heads for i in index):
        raise ValueError(f"head_index: got {index}, expected entries from 0 to {donor_heads - 1}")
    return index


def _check_correction(correction: Tensor | None, attn_map: AttentionMap, v: Tensor) -> None:
    if correction is None:
        return
    checks.is_tensor("correction", correction, 2, "(H, 3)")
    if tuple(correction.shape) != (v.shape[1], 3):
        raise ValueError(
            f"correction: got shape {tuple(correction.shape)}, expected ({v.shape[1]}, 3): "
            f"alpha, beta, gamma of each head"
        )
    checks.parameter("correction", correction, v.dtype, "v", v)
    m, n = attn_map.shape[2:]
    if m != n:
        raise ValueError(f"correction: got a map of shape ({m}, {n}), expected a square one")


# --- registration ---------------------------------------------------------------------------


def _fake_out(rows: int, v: Tensor) -> Tensor:
    b, h, _, d = v.shape
    return v.new_empty(b, rows, h, d)


def _fake_correction(correction, v):
    return v.new_empty(0) if correction is None else correction.new_empty(correction.shape)


def _fake_dense(map_storage, v, head_index, correction):
    return _fake_out(map_storage.shape[2], v)


def _fake_dense_backward(grad_out, map_storage, v, head_index, correction):
    dmap = map_storage.new_empty(map_storage.shape)
    return dmap, v.new_empty(v.shape), _fake_correction(correction, v)


def _setup_dense(ctx, inputs, output):
    map_storage, v, ctx.head_index, correction = inputs
    ctx.save_for_backward(map_storage, v, correction)


def _backward_dense(ctx, grad_out):
    map_storage, v, correction = ctx.saved_tensors
    dmap, dv, dcorrection = torch.ops.psvit_kernels.apply_dense_backward(
        grad_out, map_storage, v, ctx.head_index, correction
    )
    return dmap, dv, None, None if correction is None else dcorrection


def _fake_factored(q, k, lse, bias, scale, v, head_index, correction):
    return _fake_out(q.shape[2], v)


def _fake_factored_backward(grad_out, q, k, lse, bias, scale, v, head_index, correction, need_bias):
    dbias = q.new_empty(*q.shape[:3], k.shape[2]) if need_bias else q.new_empty(0)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dbias, dv, _fake_correction(correction, v)


def _setup_factored(ctx, inputs, output):
    q, k, lse, bias, ctx.scale, v, ctx.head_index, correction = inputs
    ctx.save_for_backward(q, k, lse, bias, v, correction)


def _backward_factored(ctx, grad_out):
    q, k, lse, bias, v, correction = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dbias, dv, dcorrection = torch.ops.psvit_kernels.apply_factored_backward(
        grad_out, q, k, lse, bias, ctx.scale, v, ctx.head_index, correction, need_bias
    )
    dbias = dbias if need_bias else None
    return dq, dk, None, dbias, None, dv, None, None if correction is None else dcorrection


register(
    "apply_dense_backward(Tensor grad_out, Tensor map_storage, Tensor v, int[]? head_index,"
    " Tensor? correction) -> (Tensor, Tensor, Tensor)",
    _fake_dense_backward,
)
register(
    "apply_dense(Tensor map_storage, Tensor v, int[]? head_index, Tensor? correction) -> Tensor",
    _fake_dense,
    _backward_dense,
    _setup_dense,
)
register(
    "apply_factored_backward(Tensor grad_out, Tensor q, Tensor k, Tensor lse, Tensor? bias,"
    " float scale, Tensor v, int[]? head_index, Tensor? correction, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_factored_backward,
)
register(
    "apply_factored(Tensor q, Tensor k, Tensor lse, Tensor? bias, float scale, Tensor v,"
    " int[]? head_index, Tensor? correction) -> Tensor",
    _fake_factored,
    _backward_factored,
    _setup_factored,
)
