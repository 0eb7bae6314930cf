"""The executable specification: plain PyTorch, any floating dtype up to float64, any device.

Half-precision inputs are computed in float32 and rounded once at the end. Gradients are written
out as formulas, so that this file can be read as the definition of every operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .epilogue import corrected, correction_backward, norm_backward
from .epilogue import wide as _wide
from .maps import row_pitch


def missing() -> str | None:
    """Why this provider can't be used on this machine: PyTorch is always there."""
    return None


def supports(op: str, args: tuple) -> str | None:
    return None


def _merge(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, M, d) to contiguous (B, M, H, d): what every attention op returns."""
    return heads.transpose(1, 2).to(dtype).contiguous()


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (_wide(q) @ _wide(k).transpose(-1, -2)) * scale
    return scores if bias is None else scores + _wide(bias)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor) -> Tensor:
    return torch.exp(_scores(q, k, bias, scale) - lse.unsqueeze(-1))


# --- attention ------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dense_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """O = P V with P = softmax(scale Q K^T + bias); P itself if asked for; log-sum-exp of rows."""
    scores = _scores(q, k, bias, scale)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.softmax(scores, dim=-1)
    out = _merge(p @ _wide(v), q.dtype)
    if not dense_map:
        return out, q.new_empty(0), lse
    n = k.shape[2]
    return out, F.pad(p.to(q.dtype), (0, row_pitch(n, q.element_size()) - n)), lse


def attention_backward(
    grad_out: Tensor,
    grad_map: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    map_storage: Tensor,
    lse: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dP = dO V^T + the map's own gradient; dS = P (dP - rowsum(P dP)); then dQ, dK, dV, dbias.

    ``grad_out`` is (B, M, H, d), as the op returned it; ``grad_map`` is in the map's storage.
    """
    n = k.shape[2]
    p = _probabilities(q, k, bias, scale, lse)
    if map_storage.numel():
        p = _wide(map_storage[..., :n])
    g = _wide(grad_out).transpose(1, 2)
    dp = g @ _wide(v).transpose(-1, -2)
    if grad_map is not None:
        dp = dp + _wide(grad_map[..., :n])
    dq, dk, ds = _softmax_backward(p, dp, q, k, scale)
    dv = p.transpose(-1, -2) @ g
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias


def _softmax_backward(
    p: Tensor, dp: Tensor, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return ds @ _wide(k) * scale, ds.transpose(-1, -2) @ _wide(q) * scale, ds


# --- apply_attention ------------------------------------------------------------------------


def _apply_backward(
    grad_out: Tensor, p: Tensor, v: Tensor, head_index: list[int] | None, correction: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dP in the donor's shape, dV and the scalars' gradient of O = corrected(P[head_index] V)."""
    donor = p.shape
    if head_index is not None:
        p = p[:, head_index]
    wide_v, g = _wide(v), _wide(grad_out).transpose(1, 2)
    dv_direct, dcorrection = v.new_zeros(()), v.new_empty(0)
    if correction is not None:
        g, dv_direct, dcorrection = correction_backward(g, p @ wide_v, wide_v, correction)
    dp = g @ wide_v.transpose(-1, -2)
    dv = p.transpose(-1, -2) @ g + dv_direct
    dp = dp.sum_to_size(donor[0], *dp.shape[1:])
    if head_index is not None:
        index = torch.tensor(head_index, device=p.device)
        dp = dp.new_zeros(donor).index_add(1, index, dp)
    return dp, dv, dcorrection


def _apply(p: Tensor, v: Tensor, head_index: list[int] | None, correction: Tensor | None) -> Tensor:
    """(B, M, H, d) from wide probabilities."""
    if head_index is not None:
        p = p[:, head_index]
    out = p @ _wide(v)
    if correction is not None:
        out = corrected(out, _wide(v), correction)
    return _merge(out, v.dtype)


def apply_dense(
    map_storage: Tensor, v: Tensor, head_index: list[int] | None, correction: Tensor | None
) -> Tensor:
    return _apply(_wide(map_storage[..., : v.shape[2]]), v, head_index, correction)


def apply_dense_backward(
    grad_out: Tensor,
    map_storage: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = v.shape[2]
    p = _wide(map_storage[..., :n])
    dp, dv, dcorrection = _apply_backward(grad_out, p, v, head_index, correction)
    dmap = F.pad(dp.to(map_storage.dtype), (0, map_storage.shape[-1] - n))
    return dmap, dv.to(v.dtype), dcorrection


def apply_factored(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
) -> Tensor:
    return _apply(_probabilities(q, k, bias, scale, lse), v, head_index, correction)


def apply_factored_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients reach q and k through the whole softmax: lse is a function of them."""
    p = _probabilities(q, k, bias, scale, lse)
    dp, dv, dcorrection = _apply_backward(grad_out, p, v, head_index, correction)
    dq, dk, ds = _softmax_backward(p, dp, q, k, scale)
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dbias, dv.to(v.dtype), dcorrection


# --- token_pool -----------------------------------------------------------------------------


def _image(tokens: Tensor, grid: list[int]) -> Tensor:
    """(B, h w, C) to (B, C, h, w): a channels-last view, nothing is copied."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def _pool_image(
    image: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    if kind == "max":
        return F.max_pool2d(image, kernel, stride, padding)
    if kind == "avg":
        return F.avg_pool2d(image, kernel, stride, padding, count_include_pad=False)
    if kind == "stride":
        return image[:, :, :: stride[0], :: stride[1]]
    assert weight is not None
    wide_bias = None if bias is None else bias.to(image.dtype)
    return F.conv2d(image, weight.to(image.dtype), wide_bias, stride, padding, 1, groups)


def _pool_tokens(wide: Tensor, grid: list[int], prefix: int, *pool) -> Tensor:
    """Prefix tokens unchanged, the others pooled: what the normalisation, if any, gets."""
    pooled = _tokens(_pool_image(_image(wide[:, prefix:], grid), *pool))
    return torch.cat([wide[:, :prefix], pooled], dim=1) if prefix else pooled


def token_pool(
    x: Tensor,
    grid: list[int],
    prefix: int,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    pool = (kind, kernel, stride, padding, weight, bias, groups)
    out = _pool_tokens(_wide(x), grid, prefix, *pool)
    if norm_weight is not None:
        wide_bias = None if norm_bias is None else norm_bias.to(out.dtype)
        out = F.layer_norm(out, out.shape[-1:], norm_weight.to(out.dtype), wide_bias, norm_eps)
    return out.to(x.dtype).contiguous()


def _pool_image_backward(
    g: Tensor,
    image: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    aten = torch.ops.aten
    if kind == "max":
        _, index = aten.max_pool2d_with_indices(image, kernel, stride, padding)
        window = (kernel, stride, padding, [1, 1], False)
        return aten.max_pool2d_with_indices_backward(g, image, *window, index), None, None
    if kind == "avg":
        counted = (False, False, None)  # no ceil_mode, padding left out, no divisor of its own
        dx = aten.avg_pool2d_backward(g, image, kernel, stride, padding, *counted)
        return dx, None, None
    if kind == "stride":
        dx = torch.zeros_like(image)
        dx[:, :, :: stride[0], :: stride[1]] = g
        return dx, None, None
    assert weight is not None
    conv = (stride, padding, [1, 1], False, [0, 0], groups, [True, True, bias is not None])
    return aten.convolution_backward(
        g, image, weight.to(image.dtype), None if bias is None else list(bias.shape), *conv
    )


def token_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    grid: list[int],
    prefix: int,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, norm_weight, norm_bias; an empty tensor for what is absent."""
    pool = (kind, kernel, stride, padding, weight, bias, groups)
    wide, g = _wide(x), _wide(grad_out)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        pooled = _pool_tokens(wide, grid, prefix, *pool)
        g, dnorm_weight, dnorm_bias = norm_backward(g, pooled, norm_weight, norm_bias, norm_eps)
    new_grid = _pool_image(_image(wide[:, prefix:], grid), *pool).shape[2:]
    dimage, dweight, dbias = _pool_image_backward(
        _image(g[:, prefix:], list(new_grid)), _image(wide[:, prefix:], grid), *pool
    )
    dx = _tokens(dimage)
    if prefix:
        dx = torch.cat([g[:, :prefix], dx], dim=1)
    found = (dx, dweight, dbias, dnorm_weight, dnorm_bias)
    inputs = (x, weight, bias, norm_weight, norm_bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if t is None or d is None else d.to(t.dtype).contiguous()
        for d, t in zip(found, inputs, strict=True)
    )
