"""``token_pool``: a grid of tokens to a smaller one, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import added, norm_backward, wide


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
    with torch.autocast(image.device.type, enabled=False):  # it would narrow what is wide here
        return F.conv2d(image, weight.to(image.dtype), wide_bias, stride, padding, 1, groups)


def _pool_tokens(x: Tensor, grid: list[int], prefix: int, *pool) -> Tensor:
    """Prefix tokens unchanged, the others pooled: what the normalisation, if any, gets."""
    pooled = _tokens(_pool_image(_image(x[:, prefix:], grid), *pool))
    return torch.cat([x[:, :prefix], pooled], dim=1) if prefix else pooled


def token_pool(
    x: Tensor,
    residual: Tensor | None,
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
    out = _pool_tokens(added(x, residual), grid, prefix, *pool)
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
    residual: Tensor | None,
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
    """Gradients of x (the residual's is the same), weight, bias, norm_weight, norm_bias.

    An empty tensor for what is absent.
    """
    pool = (kind, kernel, stride, padding, weight, bias, groups)
    total, g = added(x, residual), wide(grad_out)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        pooled = _pool_tokens(total, grid, prefix, *pool)
        g, dnorm_weight, dnorm_bias = norm_backward(g, pooled, norm_weight, norm_bias, norm_eps)
    new_grid = _pool_image(_image(total[:, prefix:], grid), *pool).shape[2:]
    dimage, dweight, dbias = _pool_image_backward(
        _image(g[:, prefix:], list(new_grid)), _image(total[:, prefix:], grid), *pool
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
