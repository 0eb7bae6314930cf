"""The C++ provider: float32 and bfloat16 on the CPU, AVX-512, AVX2 or portable."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .epilogue import correction_backward, norm_backward
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
    return "dropout" if dropout else None


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
    "apply_dense": lambda storage, v, *rest: _drops(rest[2]) or _head_dims(v),
    "apply_dense_backward": lambda g, storage, v, *rest: _drops(rest[2]) or _head_dims(v),
    "apply_quantized": lambda *_: "8-bit maps are the reference's on a CPU",
    "apply_quantized_backward": lambda *_: "8-bit maps are the reference's on a CPU",
    "apply_factored": lambda q, k, lse, b, s, v, *rest: _drops(rest[2]) or _head_dims(q, v),
    "apply_factored_backward": lambda g, q, k, lse, b, s, v, *rest: (
        _drops(rest[2]) or _head_dims(q, v)
    ),
    "token_pool": _pool_reason,
    "token_pool_backward": lambda g, *args: _pool_reason(*args),
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


def attention(q, k, v, bias, scale, dense_map):
    b, h, m, d = q.shape
    n, dv = k.shape[2], v.shape[3]
    out = q.new_empty(b, m, h, dv)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    pitch = row_pitch(n, q.element_size())
    storage = q.new_empty(b, h, m, pitch) if dense_map else q.new_empty(0)
    bias = None if bias is None else _unit_bias(bias)
    _native.attention(
        q.dtype is torch.bfloat16, (b, h, m, n, d, dv),
        _strided(q), _strided(k), _strided(v), _maybe(bias), _heads_first(out), _maybe(storage),
        pitch, lse.data_ptr(), h, False, None, 0, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out, storage, lse


def _unit_bias(bias: Tensor) -> Tensor:
    """A bias that doesn't vary along the keys is expanded there; everything else stays a view."""
    return bias if bias.stride(-1) == 1 or bias.shape[-1] == 1 else bias.contiguous()


def attention_backward(
    grad_out, grad_map, grad_lse, group_grads, group_values, q, k, v, bias, scale, map_storage,
    lse, out, need_bias,
):  # fmt: skip
    stored = map_storage if map_storage.numel() else None
    return _backward(
        grad_out, grad_map, stored, q, k, lse, bias, scale, v, None, need_bias
    )  # fmt: skip


def _backward(grad_out, grad_map, stored, q, k, lse, bias, scale, v, head_index, need_bias):
    b, hq, m, d = q.shape
    h, n, dv = v.shape[1], k.shape[2], v.shape[3]
    grad_out = _unit(grad_out)
    grad_map = None if grad_map is None else _unit(grad_map)
    bias = None if bias is None else _unit_bias(bias)
    dq, dk, dv_ = (t.new_empty(t.shape) for t in (q, k, v))
    dbias = q.new_empty(b, hq, m, n) if need_bias else q.new_empty(0)
    _native.attention_backward(
        q.dtype is torch.bfloat16, (b, h, m, n, d, dv), hq,
        _strided(q), _strided(k), _strided(v), _maybe(bias), _heads_first(grad_out),
        _maybe(stored), _maybe(grad_map), _strided(dq), _strided(dk), _strided(dv_),
        _maybe(dbias), row_pitch(n, q.element_size()), lse.data_ptr(), head_index, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv_, dbias


# --- apply_attention --------------------------------------------------------------------------


def apply_dense(map_storage, v, head_index, correction, dropout=0.0, seed=None, links=()):
    b, h, n, d = v.shape
    m = map_storage.shape[2]
    out = v.new_empty(b, m, h, d)
    address, strides = _strided(map_storage)
    if map_storage.shape[0] == 1:
        strides = (0, *strides[1:])
    correction = _float(correction)
    _native.apply(
        v.dtype is torch.bfloat16, (b, h, m, n, n, d), (address, strides), _strided(v),
        _heads_first(out), head_index, _address(correction), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _correction_backward(grad_out, out, v, correction):
    """The gradient that reaches P V, as (B, M, H, d); those of V itself and of the scalars."""
    g, out = grad_out.transpose(1, 2).float(), out.transpose(1, 2).float()
    g, dv, dcorrection = correction_backward(g, out, v.float(), correction)
    return g.transpose(1, 2).to(v.dtype), dv, dcorrection


def apply_dense_backward(
    grad_out, map_storage, v, head_index, correction, dropout, seed, linked, out
):
    if correction is not None:
        out = apply_dense(map_storage, v, head_index, None)
        grad_out, dv_direct, dcorrection = _correction_backward(grad_out, out, v, correction)
    b, h, n, d = v.shape
    grad_out = _unit(grad_out)
    dmap, dv = map_storage.new_empty(map_storage.shape), v.new_empty(v.shape)
    mb, mh, m, pitch = map_storage.shape
    _native.apply_backward(
        v.dtype is torch.bfloat16, (b, h, m, n, n, d), (mb, mh, pitch), _strided(map_storage),
        _strided(v), _heads_first(grad_out), _strided(dmap), _strided(dv), head_index,
        torch.get_num_threads(),
    )  # fmt: skip
    linked_grads = _linked_gradients(grad_out, out, correction, linked)
    dmap = v.new_empty(0) if linked else dmap
    if correction is None:
        return dmap, dv, v.new_empty(0), *linked_grads
    return dmap, dv.add_(dv_direct), dcorrection, *linked_grads


def _linked_gradients(grad_pv, pv, correction, linked):
    """What a linked application sends to its donor: see the reference."""
    absent = pv.new_empty(0)
    if not linked:
        return absent, absent
    dlse = -(grad_pv.float() * pv.float()).sum(-1).transpose(1, 2).contiguous()
    return dlse, absent if correction is None else grad_pv


def apply_factored(
    q, k, lse, bias, scale, v, head_index, correction, dropout=0.0, seed=None, links=()
):
    b, h, n, dv = v.shape
    m, d = q.shape[2:]
    out = v.new_empty(b, m, h, dv)
    bias = None if bias is None else _unit_bias(bias)
    correction = _float(correction)
    lse = lse.contiguous()  # bound to a name, so that its memory lasts
    _native.attention(
        v.dtype is torch.bfloat16, (b, h, m, n, d, dv),
        _strided(q), _strided(k), _strided(v), _maybe(bias), _heads_first(out), None, 0,
        lse.data_ptr(), q.shape[1], True, head_index, _address(correction), scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def apply_factored_backward(
    grad_out, q, k, lse, bias, scale, v, head_index, correction, dropout, seed, linked, need_bias,
    out,
):  # fmt: skip
    if correction is not None:
        out = apply_factored(q, k, lse, bias, scale, v, head_index, None)
        grad_out, dv_direct, dcorrection = _correction_backward(grad_out, out, v, correction)
    lse = lse.contiguous()
    dq, dk, dv, dbias = _backward(
        grad_out, None, None, q, k, lse, bias, scale, v, head_index, need_bias
    )  # fmt: skip
    linked_grads = _linked_gradients(grad_out, out, correction, linked)
    dq, dk, dbias = (v.new_empty(0) if linked else t for t in (dq, dk, dbias))
    if correction is None:
        return dq, dk, dbias, dv, v.new_empty(0), *linked_grads
    return dq, dk, dbias, dv.add_(dv_direct), dcorrection, *linked_grads


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
        pool += (norm_weight, norm_bias, norm_eps)
        return token_pool(x.float() + residual, None, *pool).to(x.dtype)
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
        pool += (norm_weight, norm_bias, norm_eps)
        dx, *others = token_pool_backward(grad_out.float(), x.float() + residual, None, *pool)
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
