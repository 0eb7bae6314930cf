"""``apply_attention``: what a layer that shares a map computes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .attention import wide_dtype
from .maps import AttentionMap, DenseMap, FactoredMap, QuantizedMap
from .registry import register


def apply_attention(
    attn_map: AttentionMap,
    v: Tensor,
    *,
    head_index: Sequence[int] | None = None,
    correction: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """O = P V from a map that another layer computed: no Q, no K, no QK^T, no softmax.

    Args:
        attn_map: the map, `[B, H, M, N]`. The batch of a ``DenseMap`` or ``QuantizedMap`` may be
            1: one map for all.
        v: values, `[B, H, N, d]`, any strides with unit stride on the last dimension, the dtype
            of the map.
        head_index: H integers; head h of ``v`` uses head ``head_index[h]`` of the map. None: its
            own. Costs nothing.
        correction: `[H, 3]`, (alpha, beta, gamma) per head, float32 or the dtype of v: the result
            is alpha (P V) + beta V + gamma mean over tokens(V). Needs M = N. Free when absent.
        dropout: probability with which an element of the map is left out, the others being
            divided by one minus it; of this application only. Its random numbers come from the
            default generator of the device.

    Returns:
        `[B, H, M, d]`, a view of `[B, M, H, d]` memory: merging heads copies nothing.

    Gradients reach v, the correction and the map; through a ``FactoredMap`` they reach its q, k
    and bias as if this layer had computed the softmax itself; through a ``QuantizedMap`` straight,
    see there.

    Raises:
        ValueError: sizes that don't match, a strided last dimension, another device, a head index
            that is out of range or of the wrong length, a probability outside of 0 to 1, a
            ``QuantizedMap`` that can't carry the gradient it should.
        TypeError: not a map, not a floating-point tensor, mixed dtypes.

    Source: PSViT, arXiv 2108.03428, section 3.
    """
    attn_map, v = _checked(attn_map, v)
    heads = _checked_heads(head_index, attn_map.shape[1], v.shape[1])
    _check_correction(correction, attn_map, v)
    seed = _seed(dropout, v)
    links = _links(attn_map, v, heads, seed)
    rest = (v, heads, correction, dropout, seed, links)
    ops, m = torch.ops.psvit_kernels, attn_map
    if isinstance(m, DenseMap):
        out = ops.apply_dense(m.storage, *rest)
    elif isinstance(m, QuantizedMap):
        out = ops.apply_quantized(m.codes, m.row_scale, *rest)
    else:
        out = ops.apply_factored(m.q, m.k, m.lse, m.bias, m.scale, *rest)
    return out.transpose(1, 2)


def _seed(dropout: float, v: Tensor) -> Tensor | None:
    """A random number on the device, so that nobody waits for it."""
    if not 0 <= checks.number("dropout", dropout) < 1:
        raise ValueError(f"dropout: got {dropout}, expected a probability from 0 to below 1")
    return torch.randint(2**63 - 1, (1,), device=v.device) if dropout else None


def _links(
    attn_map: AttentionMap, v: Tensor, heads: list[int] | None, seed: Tensor | None
) -> list[Tensor]:
    """Where this application's gradient goes, if it is one that a link can carry."""
    if attn_map.links is None or not torch.is_grad_enabled():
        return []
    found = attn_map.links.take(v) if heads is None and seed is None else []
    if not found and isinstance(attn_map, QuantizedMap) and not _recomputed():
        raise ValueError(
            "attn_map: got a QuantizedMap without a link for this application's gradient, expected "
            "one: pass attention(..., reuses=...) the number of applications, each with v of the "
            "donor's shape, no head_index and no dropout; or train with a dense map"
        )
    return found


def _recomputed() -> bool:
    """Whether this is a checkpoint's second forward pass, whose graph nobody follows."""
    return torch._C._current_graph_task_id() != -1


def _checked(
    attn_map: AttentionMap, v: Tensor
) -> tuple[DenseMap | QuantizedMap | FactoredMap, Tensor]:
    if not isinstance(attn_map, (DenseMap, QuantizedMap, FactoredMap)):
        raise TypeError(
            f"attn_map: got {type(attn_map).__name__}, expected a DenseMap, QuantizedMap or "
            f"FactoredMap; DenseMap.from_dense(probabilities) makes one"
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
    stored = not isinstance(attn_map, FactoredMap)
    if batch != v.shape[0] and not (batch == 1 and stored):
        allowed = f"{batch} as the map" + ("" if stored else " (factored)")
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


def _fake_linked(v, correction, linked, out):
    """The gradients of the log-sum-exp and of P V: see ``_apply_backward`` of the reference."""
    if not linked:
        return v.new_empty(0), v.new_empty(0)
    b, h, _, _ = v.shape
    dlse = v.new_empty(b, h, out.shape[1], dtype=wide_dtype(v.dtype))
    return dlse, v.new_empty(0) if correction is None else out.new_empty(out.shape)


def _link_grads(ctx, grad_out, v, correction, dlse, dpv):
    """For the log-sum-exp and the pair of links: what the donor's backward walks."""
    return [dlse, grad_out if correction is None else dpv, v] if ctx.linked else []


def _fake_dense(map_storage, v, head_index, correction, dropout, seed, links):
    return _fake_out(map_storage.shape[2], v)


def _fake_dense_backward(
    grad_out, map_storage, v, head_index, correction, dropout, seed, linked, out
):
    dmap = map_storage.new_empty(0 if linked else map_storage.shape)
    linked_grads = _fake_linked(v, correction, linked, out)
    return dmap, v.new_empty(v.shape), _fake_correction(correction, v), *linked_grads


def _setup_dense(ctx, inputs, output):
    map_storage, v, ctx.head_index, correction, ctx.dropout, seed, links = inputs
    ctx.linked = bool(links)
    ctx.save_for_backward(map_storage, v, correction, seed, output)


def _backward_dense(ctx, grad_out):
    map_storage, v, correction, seed, out = ctx.saved_tensors
    dmap, dv, dcorrection, *linked = torch.ops.psvit_kernels.apply_dense_backward(
        grad_out, map_storage, v, ctx.head_index, correction, ctx.dropout, seed, ctx.linked, out
    )
    return (
        None if ctx.linked else dmap, dv, None, None if correction is None else dcorrection,
        None, None, _link_grads(ctx, grad_out, v, correction, *linked),
    )  # fmt: skip


def _fake_quantized(codes, row_scale, v, head_index, correction, dropout, seed, links):
    return _fake_out(codes.shape[2], v)


def _fake_quantized_backward(
    grad_out, codes, row_scale, v, head_index, correction, dropout, seed, linked, out
):
    linked_grads = _fake_linked(v, correction, linked, out)
    return v.new_empty(v.shape), _fake_correction(correction, v), *linked_grads


def _setup_quantized(ctx, inputs, output):
    codes, row_scale, v, ctx.head_index, correction, ctx.dropout, seed, links = inputs
    ctx.linked = bool(links)
    ctx.save_for_backward(codes, row_scale, v, correction, seed, output)


def _backward_quantized(ctx, grad_out):
    codes, row_scale, v, correction, seed, out = ctx.saved_tensors
    dv, dcorrection, *linked = torch.ops.psvit_kernels.apply_quantized_backward(
        grad_out, codes, row_scale, v, ctx.head_index, correction, ctx.dropout, seed, ctx.linked,
        out,
    )  # fmt: skip
    return (
        None, None, dv, None, None if correction is None else dcorrection,
        None, None, _link_grads(ctx, grad_out, v, correction, *linked),
    )  # fmt: skip


def _fake_factored(q, k, lse, bias, scale, v, head_index, correction, dropout, seed, links):
    return _fake_out(q.shape[2], v)


def _fake_factored_backward(
    grad_out, q, k, lse, bias, scale, v, head_index, correction, dropout, seed, linked, need_bias,
    out,
):  # fmt: skip
    dbias = q.new_empty(*q.shape[:3], k.shape[2]) if need_bias else q.new_empty(0)
    dq, dk = (t.new_empty(0 if linked else t.shape) for t in (q, k))
    dv, dcorrection = v.new_empty(v.shape), _fake_correction(correction, v)
    return dq, dk, dbias, dv, dcorrection, *_fake_linked(v, correction, linked, out)


def _setup_factored(ctx, inputs, output):
    q, k, lse, bias, ctx.scale, v, ctx.head_index, correction, ctx.dropout, seed, links = inputs
    ctx.linked = bool(links)
    ctx.save_for_backward(q, k, lse, bias, v, correction, seed, output)


def _backward_factored(ctx, grad_out):
    q, k, lse, bias, v, correction, seed, out = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[3] and not ctx.linked
    dq, dk, dbias, dv, dcorrection, *linked = torch.ops.psvit_kernels.apply_factored_backward(
        grad_out, q, k, lse, bias, ctx.scale, v, ctx.head_index, correction, ctx.dropout, seed,
        ctx.linked, need_bias, out,
    )  # fmt: skip
    dq, dk = (None, None) if ctx.linked else (dq, dk)
    return (
        dq, dk, None, dbias if need_bias else None, None, dv, None,
        None if correction is None else dcorrection, None, None,
        _link_grads(ctx, grad_out, v, correction, *linked),
    )  # fmt: skip


_APPLICATION = "Tensor v, int[]? head_index, Tensor? correction, float dropout, Tensor? seed"
_FACTORS = "Tensor q, Tensor k, Tensor lse, Tensor? bias, float scale"

register(
    f"apply_dense_backward(Tensor grad_out, Tensor map_storage, {_APPLICATION}, bool linked,"
    " Tensor out) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_dense_backward,
)
register(
    f"apply_dense(Tensor map_storage, {_APPLICATION}, Tensor[] links) -> Tensor",
    _fake_dense,
    _backward_dense,
    _setup_dense,
)
register(
    f"apply_quantized_backward(Tensor grad_out, Tensor codes, Tensor row_scale, {_APPLICATION},"
    " bool linked, Tensor out) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_quantized_backward,
)
register(
    f"apply_quantized(Tensor codes, Tensor row_scale, {_APPLICATION}, Tensor[] links) -> Tensor",
    _fake_quantized,
    _backward_quantized,
    _setup_quantized,
)
register(
    f"apply_factored_backward(Tensor grad_out, {_FACTORS}, {_APPLICATION}, bool linked,"
    " bool need_bias, Tensor out)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_factored_backward,
)
register(
    f"apply_factored({_FACTORS}, {_APPLICATION}, Tensor[] links) -> Tensor",
    _fake_factored,
    _backward_factored,
    _setup_factored,
)
