"""The C++ provider: float32 and bfloat16 on the CPU, AVX-512, AVX2 or portable."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .epilogue import correction_backward, merge_gradient, norm_backward
from .grid import pooled_grid
from .maps import row_pitch

try:
    import psvit_kernels._native as _native

    _import_error: str | None = None
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _import_error = str(error)
    warnings.warn(
        f"psvit_kernels: the compiled module could not be imported ({error}); the PyTorch "
        f"reference serves instead. Remedy: pip install . in the source folder",
        stacklevel=2,
    )

MAX_HEAD_DIM = 128
_POOL_KIND = {"max": "max", "avg": "avg", "stride": "avg", "conv": "depthwise"}


def missing() -> str | None:
    """Why this provider can't be used on this machine, or None."""
    return None if _native is not None else f"the compiled module is missing: {_import_error}"


def supports(op: str, args: tuple) -> str | None:
    if _native is None:
        return missing()
    first = args[0]
    if first.device.type != "cpu":
        return f"device {first.device.type}, not cpu"
    if first.dtype is not torch.float32 and first.dtype is not torch.bfloat16:
        return f"dtype {first.dtype}, not float32 or bfloat16"
    return _SUPPORTS[op](*args)


def _head_dims(*tensors: Tensor) -> str | None:
    for t in tensors:
        if t.shape[3] > MAX_HEAD_DIM:
            return f"head dim {t.shape[3]} > {MAX_HEAD_DIM}"
    return None


def _drops(dropout: float) -> str | None:
    return "dropout of a map that isn't stored" if dropout else None


def _pool_reason(
    x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups, *norm
):
    if kind == "conv" and not groups == x.shape[2] == weight.shape[0]:
        return "a convolution that is not depthwise (PyTorch's own serves it)"
    return None


_SUPPORTS: dict[str, Callable[..., str | None]] = {
    "attention": lambda q, k, v, *_: _head_dims(q, v),
    "attention_quantized": lambda *_: "8-bit maps are the reference's on a CPU",
    "attention_backward": lambda *args: _head_dims(*args[5:8]),
    "apply_dense": lambda storage, v, *_: _head_dims(v),
    "apply_dense_backward": lambda g, storage, v, *_: _head_dims(v),
    "apply_quantized": lambda *_: "8-bit maps are the reference's on a CPU",
    "apply_quantized_backward": lambda *_: "8-bit maps are the reference's on a CPU",
    "apply_factored": lambda q, k, lse, b, s, v, *rest: _drops(rest[2]) or _head_dims(q, v),
    "apply_factored_backward": lambda g, q, k, lse, b, s, v, *rest: (
        _drops(rest[2]) or _head_dims(q, v)
    ),
    "token_pool": _pool_reason,
    "token_pool_backward": lambda g, *args: _pool_reason(*args),
    "match_tokens": lambda *_: None,
    "select_tokens": lambda *_: "sorting scores is PyTorch's",
    "merge_tokens": lambda *_: None,
    "merge_tokens_backward": lambda *args: "gradients of weights" if args[-1] else None,
    "reduce_map": lambda *_: None,
}


# --- tensors as the native module takes them --------------------------------------------------


def _strided(t: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and strides of the first three dimensions; the last has unit stride."""
    return t.data_ptr(), t.stride()[:3]


def _maybe(t: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if t is None or t.numel() == 0 else _strided(t)


def _heads_first(t: Tensor) -> tuple[int, tuple[int, ...]]:
    """A (B, M, H, d) tensor, described as (B, H, M, d)."""
    s = t.stride()
    return t.data_ptr(), (s[0], s[2], s[1])


def _tokens(t: Tensor) -> tuple[int, tuple[int, ...]]:
    """A (B, N, C) tensor."""
    s = t.stride()
    return t.data_ptr(), (s[0], 0, s[1])


def _unit(t: Tensor) -> Tensor:
    """Gradients arrive with any strides: a copy where the last one isn't 1."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


# --- attention --------------------------------------------------------------------------------


def _unit_bias(bias: Tensor | None) -> Tensor | None:
    """A bias that doesn't vary along the keys is expanded there; everything else stays a view."""
    return bias if bias is None or bias.shape[-1] == 1 else _unit(bias)


def _factors(q, k, bias, lse, scale, stored=None):
    """A map as the native module takes it: its stored rows, if any, and what they come from."""
    return (_maybe(stored), _strided(q), _strided(k), _maybe(bias), _strided(lse), scale)


def _stored(storage):
    """The same for a map of which there are only the rows."""
    address, strides = _strided(storage)
    repeats = storage.shape[0] == 1
    return ((address, (0, *strides[1:]) if repeats else strides), None, None, None, None, 1.0)


def attention(q, k, v, bias, scale, dense_map):
    b, h, m, d = q.shape
    n, dv = k.shape[2], v.shape[3]
    out = q.new_empty(b, m, h, dv)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    pitch = row_pitch(n, q.element_size())
    storage = q.new_empty(b, h, m, pitch) if dense_map else q.new_empty(0)
    bias = _unit_bias(bias)
    _native.attention(
        q.dtype is torch.bfloat16, (b, h, m, n, d, dv), _factors(q, k, bias, lse, scale, storage),
        pitch, _strided(v), _heads_first(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, storage, lse


def attention_backward(
    grad_out, grad_map, grad_lse, group_grads, group_values, q, k, v, bias, scale, map_storage,
    lse, out, need_bias,
):  # fmt: skip
    grad_map = None if grad_map is None else _unit(grad_map)
    grad_lse, group_grads = _float(grad_lse), [_unit(g) for g in group_grads]
    pairs = zip(map(_heads_first, group_grads), map(_strided, group_values), strict=True)
    sent = (_maybe(grad_map), _maybe(grad_lse), list(pairs))
    return _backward(grad_out, *sent, map_storage, q, k, lse, bias, scale, v, None, need_bias)


def _backward(
    grad_out, grad_map, grad_lse, pairs, stored, q, k, lse, bias, scale, v, head_index, need_bias
):
    """``grad_map``, ``grad_lse`` and ``pairs`` as the native module takes them."""
    b, hq, m, d = q.shape
    h, n, dv = v.shape[1], k.shape[2], v.shape[3]
    grad_out, bias = _unit(grad_out), _unit_bias(bias)
    dq, dk, dv_ = (t.new_empty(t.shape) for t in (q, k, v))
    dbias = q.new_empty(b, hq, m, n) if need_bias else q.new_empty(0)
    _native.attention_backward(
        q.dtype is torch.bfloat16, (b, h, m, n, d, dv), hq,
        _factors(q, k, bias, lse, scale, stored), _strided(v), _heads_first(grad_out), grad_map,
        grad_lse, pairs, _strided(dq), _strided(dk), _strided(dv_), _maybe(dbias), head_index,
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv_, dbias


# --- apply_attention --------------------------------------------------------------------------


def _apply(rows, m, d, v, head_index, correction):
    """(B, M, H, d) from rows of a map of head dim ``d``, which is 0 if they are stored."""
    b, h, n, dv = v.shape
    out = v.new_empty(b, m, h, dv)
    correction = _float(correction)
    _native.apply(
        v.dtype is torch.bfloat16, (b, h, m, n, d, dv), rows, _strided(v), _heads_first(out),
        head_index, _address(correction), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _dropped(map_storage, v, head_index, dropout, seed):
    """The map of each receiver after dropout, stored, and what it was multiplied with.

    The seed is all that the backward needs to make the same random numbers again.
    """
    if head_index is not None:
        map_storage = map_storage[:, head_index]
    generator = torch.Generator().manual_seed(int(seed))
    kept = map_storage.new_empty(*v.shape[:2], *map_storage.shape[2:])
    kept.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
    return map_storage * kept, kept


def apply_dense(map_storage, v, head_index, correction, dropout=0.0, seed=None, links=()):
    if seed is not None:
        map_storage, _ = _dropped(map_storage, v, head_index, dropout, seed)
        head_index = None
    return _apply(_stored(map_storage), map_storage.shape[2], 0, v, head_index, correction)


def apply_factored(
    q, k, lse, bias, scale, v, head_index, correction, dropout=0.0, seed=None, links=()
):
    m, d = q.shape[2:]
    bias, lse = _unit_bias(bias), lse.contiguous()  # bound to names, so that their memory lasts
    return _apply(_factors(q, k, bias, lse, scale), m, d, v, head_index, correction)


def _before_correction(grad_out, out, v, correction, apply):
    """P V with its gradient, the part of dV that doesn't come through it, and dcorrection."""
    if correction is None:
        return _unit(grad_out), out, None, v.new_empty(0)
    pv = apply()
    g, wide_pv = (t.transpose(1, 2).float() for t in (grad_out, pv))
    g, dv, dcorrection = correction_backward(g, wide_pv, v.float(), correction)
    return g.transpose(1, 2).to(v.dtype).contiguous(), pv, dv, dcorrection


def _linked_backward(rows, d, g, pv, v, correction):
    """dV, and what goes back to the donor: the gradients of its log-sum-exp and of P V."""
    b, h, n, dv_ = v.shape
    m = g.shape[1]
    dv, dlse = v.new_empty(v.shape), v.new_empty(b, h, m, dtype=torch.float32)
    _native.apply_backward(
        v.dtype is torch.bfloat16, (b, h, m, n, d, dv_), (b, h, 0), rows, _strided(v),
        _heads_first(g), _strided(dv), None, _heads_first(pv), _strided(dlse), None,
        torch.get_num_threads(),
    )  # fmt: skip
    return dv, dlse, v.new_empty(0) if correction is None else g


def apply_dense_backward(
    grad_out, map_storage, v, head_index, correction, dropout, seed, linked, out
):
    if seed is not None:
        dropped, kept = _dropped(map_storage, v, head_index, dropout, seed)
        of_receivers, *others = apply_dense_backward(
            grad_out, dropped, v, None, correction, 0.0, None, False, out
        )
        dmap = (of_receivers * kept).float().sum_to_size(map_storage.shape[0], *kept.shape[1:])
        if head_index is not None:
            index = torch.tensor(head_index)
            dmap = dmap.new_zeros(map_storage.shape).index_add_(1, index, dmap)
        return dmap.to(map_storage.dtype), *others
    g, pv, dv_direct, dcorrection = _before_correction(
        grad_out, out, v, correction, lambda: apply_dense(map_storage, v, head_index, None)
    )
    rows = _stored(map_storage)
    if linked:
        dmap = v.new_empty(0)
        dv, dlse, dpv = _linked_backward(rows, 0, g, pv, v, correction)
    else:
        b, h, n, d = v.shape
        mb, mh, m, pitch = map_storage.shape
        dmap, dv = map_storage.new_empty(map_storage.shape), v.new_empty(v.shape)
        dlse, dpv = _absent(v, 2)
        _native.apply_backward(
            v.dtype is torch.bfloat16, (b, h, m, n, 0, d), (mb, mh, pitch), rows, _strided(v),
            _heads_first(g), _strided(dv), _strided(dmap), None, None, head_index,
            torch.get_num_threads(),
        )  # fmt: skip
    return dmap, _sum(dv, dv_direct), dcorrection, dlse, dpv


def apply_factored_backward(
    grad_out, q, k, lse, bias, scale, v, head_index, correction, dropout, seed, linked, need_bias,
    out,
):  # fmt: skip
    rest = (q, k, lse, bias, scale, v, head_index)
    g, pv, dv_direct, dcorrection = _before_correction(
        grad_out, out, v, correction, lambda: apply_factored(*rest, None)
    )
    bias, lse = _unit_bias(bias), lse.contiguous()
    if linked:
        dq, dk, dbias = _absent(v, 3)
        rows = _factors(q, k, bias, lse, scale)
        dv, dlse, dpv = _linked_backward(rows, q.shape[3], g, pv, v, correction)
    else:
        dlse, dpv = _absent(v, 2)
        dq, dk, dv, dbias = _backward(
            g, None, None, [], None, q, k, lse, bias, scale, v, head_index, need_bias
        )
    return dq, dk, dbias, _sum(dv, dv_direct), dcorrection, dlse, dpv


def _absent(like: Tensor, count: int) -> list[Tensor]:
    """Results that aren't asked for; no two may be one tensor."""
    return [like.new_empty(0) for _ in range(count)]


def _sum(dv, dv_direct):
    return dv if dv_direct is None else dv.add_(dv_direct)


# --- token_pool -------------------------------------------------------------------------------


def _taps_first(weight: Tensor | None) -> Tensor | None:
    """A depthwise weight (C, 1, kh, kw) as (taps, C)."""
    return None if weight is None else weight.float().flatten(1).t().contiguous()


def token_pool(
    x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups,
    norm_weight, norm_bias, norm_eps,
):  # fmt: skip
    if residual is not None:
        pool = (grid, prefix, kind, kernel, stride, padding, weight, bias, groups)
        norm = (norm_weight, norm_bias, norm_eps)
        return token_pool(x.float() + residual, None, *pool, *norm).to(x.dtype)
    b, _, c = x.shape
    new_grid = pooled_grid(grid, kernel, stride, padding)
    out = x.new_empty(b, prefix + new_grid[0] * new_grid[1], c)
    parameters = (_taps_first(weight), _float(bias), _float(norm_weight), _float(norm_bias))
    _native.token_pool(
        x.dtype is torch.bfloat16, _POOL_KIND[kind], (b, c, prefix), (*grid, *new_grid),
        (*kernel, *stride, *padding), _tokens(x), _tokens(out),
        *map(_address, parameters), norm_eps, torch.get_num_threads(),
    )  # fmt: skip
    return out


def token_pool_backward(
    grad_out, x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups,
    norm_weight, norm_bias, norm_eps,
):  # fmt: skip
    if residual is not None:
        pool = (grid, prefix, kind, kernel, stride, padding, weight, bias, groups)
        norm = (norm_weight, norm_bias, norm_eps)
        total = x.float() + residual
        dx, *others = token_pool_backward(grad_out.float(), total, None, *pool, *norm)
        return dx.to(x.dtype), *others
    absent = x.new_empty(0)
    dnorm_weight = dnorm_bias = absent
    if norm_weight is not None:
        pooled = token_pool(
            x, None, grid, prefix, kind, kernel, stride, padding, weight, bias, groups,
            None, None, 0.0,
        )  # fmt: skip
        grad_out, dnw, dnb = norm_backward(
            grad_out.float(), pooled.float(), norm_weight, norm_bias, norm_eps
        )
        grad_out, dnorm_weight = grad_out.to(x.dtype), dnw.to(norm_weight.dtype)
        dnorm_bias = absent if norm_bias is None or dnb is None else dnb.to(norm_bias.dtype)
    grad_out = _unit(grad_out)
    b, _, c = x.shape
    dx = x.new_empty(x.shape)
    taps = _taps_first(weight)
    sums = x.new_empty(0 if taps is None else taps.shape[0] + 1, c, dtype=torch.float32)
    dtaps, dbias = sums[:-1], sums[-1:]
    _native.token_pool_backward(
        x.dtype is torch.bfloat16, _POOL_KIND[kind], (b, c, prefix),
        (*grid, *pooled_grid(grid, kernel, stride, padding)), (*kernel, *stride, *padding),
        _tokens(x), _tokens(grad_out), _tokens(dx), _address(taps), dtaps.data_ptr(),
        dbias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    dweight = absent
    if weight is not None:
        dweight = dtaps.t().contiguous().view(weight.shape).to(weight.dtype)
    dbias = absent if bias is None else dbias.flatten().to(bias.dtype)
    return dx, dweight, dbias, dnorm_weight, dnorm_bias


# --- match_tokens, merge_tokens ---------------------------------------------------------------


def match_tokens(metric, r, prefix, penalty):
    b, h, n, d = metric.shape
    tables = [metric.new_empty(b, size, dtype=torch.int64) for size in (n, n, n - r + 1)]
    penalty = _float(penalty)
    _native.match_tokens(
        metric.dtype is torch.bfloat16, (b, h, n, d, prefix, r), _strided(metric),
        _address(penalty), [t.data_ptr() for t in tables], torch.get_num_threads(),
    )  # fmt: skip
    return tuple(tables)


def merge_tokens(
    x, residual, into, order, starts, weights, norm_weight, norm_bias, norm_eps
):  # fmt: skip
    b, n, c = x.shape
    m = starts.shape[1] - 1
    out, sizes = x.new_empty(b, m, c), x.new_empty(b, m, dtype=torch.float32)
    normed = x.new_empty(0) if norm_weight is None else x.new_empty(b, m, c)
    tables = [t.contiguous() for t in (into, order, starts)]
    weights, norm_weight, norm_bias = (_float(t) for t in (weights, norm_weight, norm_bias))
    _native.merge_tokens(
        x.dtype is torch.bfloat16, (b, n, m, c), [t.data_ptr() for t in tables], _address(weights),
        sizes.data_ptr(), _tokens(out), _tokens(x), None if residual is None else _tokens(residual),
        None if norm_weight is None else _tokens(normed), _address(norm_weight),
        _address(norm_bias), norm_eps, torch.get_num_threads(),
    )  # fmt: skip
    return out, sizes, normed


def merge_tokens_backward(
    x, residual, into, order, starts, weights, norm_weight, norm_bias, norm_eps, sizes,
    grad_tokens, grad_sizes, grad_normed, need_weights,
):  # fmt: skip
    b, n, c = x.shape
    g, *dnorm = merge_gradient(
        merge_tokens, x, residual, (into, order, starts), weights, norm_weight, norm_bias,
        norm_eps, grad_tokens, grad_normed,
    )  # fmt: skip
    m = g.shape[1]
    dx = x.new_empty(b, n, c)
    tables = [t.contiguous() for t in (into, order, starts)]
    weights, sizes = _float(weights), sizes.contiguous()
    _native.merge_tokens_backward(
        x.dtype is torch.bfloat16, (b, n, m, c), [t.data_ptr() for t in tables], _address(weights),
        sizes.data_ptr(), _tokens(g), _tokens(dx), torch.get_num_threads(),
    )  # fmt: skip
    return dx, x.new_empty(0), *dnorm


# --- reduce_map -------------------------------------------------------------------------------


def reduce_map(storage, n, order, starts, means, shares):
    images, entries = order.shape
    b, h, m = max(storage.shape[0], images), storage.shape[1], starts.shape[1] - 1
    storage = _unit(storage).expand(b, -1, -1, -1)
    out = storage.new_empty(b, h, m, row_pitch(m, storage.itemsize))
    tables = [order.contiguous(), starts.contiguous(), _float(means), _float(shares)]
    _native.reduce_map(
        storage.dtype is torch.bfloat16, (b, h, n, m, images, entries), _strided(storage),
        _strided(out), [_address(t) for t in tables], torch.get_num_threads(),
    )  # fmt: skip
    return out
