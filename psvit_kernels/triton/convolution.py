"""``token_pool`` by a convolution that is not depthwise: a matrix product over gathered tokens.

Rows of the product are tokens of the result, counted through all images, and its inner dimension
runs over the taps of the window and, in each, over the channels of x: every tile of x is a slice of
token rows, straight from (B, N, C). Prefix tokens pass in the same launch. LayerNorm, and the
gradients, are PyTorch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..epilogue import norm_backward
from ..grid import pooled_grid
from . import configs
from .launch import bucket, launch
from .tiles import padded, precision

Window = tuple[list[int], list[int], list[int]]


def depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """One filter a channel: no product of matrices."""
    return groups == x.shape[2] == weight.shape[0]


def convolve(
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    window: Window,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    """Prefix tokens, then the convolved ones, [B, prefix + h' w', C']."""
    kernel, stride, padding = window
    new_h, new_w = pooled_grid(grid, *window)
    b, width = x.shape[0], weight.shape[0]
    out = x.new_empty(b, prefix + new_h * new_w, width)
    rows = b * out.shape[1]
    inner, outer = x.shape[2] // groups, width // groups
    # Channels last, so that tiles of both factors are read along memory; weights that are kept in
    # torch.channels_last and in the dtype of x are not copied.
    weight = weight.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "out_ptr": out,
        "batch": b,
        "tokens": out.shape[1],
        "prefix": prefix,
        "h": grid[0],
        "w": grid[1],
        "new_w": new_w,
        "width": width,
        "inner": inner,
        "outer": outer,
        "x_stride_b": x.stride(0),
        "x_stride_n": x.stride(1),
        "residual_stride_b": residual_strides[0],
        "residual_stride_n": residual_strides[1],
        "KERNEL": tuple(kernel),
        "STRIDE": tuple(stride),
        "PADDING": tuple(padding),
        "PRECISION": precision(x.dtype),
    }
    launch(
        _convolution_kernel,
        lambda meta: (
            triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(outer, meta["BLOCK_N"]),
            groups,
        ),
        arguments,
        configs.convolution(x.dtype, padded(outer), padded(inner)),
        (bucket(rows), inner, outer, groups, tuple(kernel), tuple(stride)),
    )
    return out


def normalize(
    out: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    if norm_weight is None:
        return out
    norm_bias = None if norm_bias is None else norm_bias.to(out.dtype)
    return F.layer_norm(out, out.shape[-1:], norm_weight.to(out.dtype), norm_bias, eps)


def backward(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    window: Window,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias, dnorm_weight, dnorm_bias = (x.new_empty(0) for _ in range(3))
    if norm_weight is not None:
        out = convolve(x, residual, grid, prefix, window, weight, bias, groups)
        grad, dnw, dnb = norm_backward(
            grad_out.float(), out.float(), norm_weight, norm_bias, norm_eps
        )
        grad_out, dnorm_weight = grad.to(x.dtype), dnw.to(norm_weight.dtype)
        if norm_bias is not None and dnb is not None:
            dnorm_bias = dnb.to(norm_bias.dtype)
    tokens = x if residual is None else x + residual
    new_grid = pooled_grid(grid, *window)
    _, stride, padding = window
    options = (stride, padding, [1, 1], False, [0, 0], groups, [True, True, bias is not None])
    dimage, dweight, db = torch.ops.aten.convolution_backward(
        _image(grad_out[:, prefix:], new_grid),
        _image(tokens[:, prefix:], grid),
        weight.to(x.dtype),
        [weight.shape[0]],
        *options,
    )
    dx = dimage.flatten(2).transpose(1, 2)
    if prefix:
        dx = torch.cat([grad_out[:, :prefix], dx], dim=1)
    if bias is not None:
        dbias = db.to(bias.dtype)
    return dx.contiguous(), dweight.to(weight.dtype), dbias, dnorm_weight, dnorm_bias


def _image(tokens: Tensor, grid: list[int]) -> Tensor:
    """(B, h w, C) to (B, C, h, w): a channels-last view, nothing is copied."""
    return tokens.transpose(1, 2).unflatten(2, grid)


@triton.jit
def _convolution_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr,
    batch, tokens, prefix, h, w, new_w, width, inner, outer,
    x_stride_b, x_stride_n, residual_stride_b, residual_stride_n,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens by BLOCK_N channels of the result, of one group (program id 1): inner channels
    of x to outer channels. Neighbouring programs share the tokens that they read."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    blocks = tl.cdiv(outer, BLOCK_N)
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    image = first // tokens
    token = (first - image * tokens).to(tl.int32) + tl.arange(0, BLOCK_M)
    image, token = image + token // tokens, token % tokens
    group = tl.program_id(1)
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (image < batch)[:, None] & (columns < outer)[None, :]

    cell = token - prefix
    top = cell // new_w * STRIDE[0] - PADDING[0]
    left = cell % new_w * STRIDE[1] - PADDING[1]
    x_rows = x_ptr + image * x_stride_b + group * inner
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = residual_ptr + image * residual_stride_b + group * inner
    weight_rows = weight_ptr + (group * outer + columns).to(tl.int64) * (TAPS * inner)
    steps = tl.cdiv(inner, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, TAPS * steps):
        tap = step // steps
        channels = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        y, x = top + tap // KERNEL[1], left + tap % KERNEL[1]
        in_grid = (y >= 0) & (y < h) & (x >= 0) & (x < w) & (cell >= 0) & (image < batch)
        mask = in_grid[:, None] & (channels < inner)[None, :]
        source = (prefix + y * w + x).to(tl.int64)
        pointers = (x_rows + source * x_stride_n)[:, None] + channels[None, :]
        a = tl.load(pointers, mask=mask, other=0.0)  # (BLOCK_M, BLOCK_K)
        if residual_ptr is not None:
            pointers = (residual_rows + source * residual_stride_n)[:, None] + channels[None, :]
            a = (a.to(tl.float32) + tl.load(pointers, mask=mask, other=0.0)).to(a.dtype)
        mask = (columns < outer)[:, None] & (channels < inner)[None, :]
        pointers = weight_rows[:, None] + (tap * inner + channels)[None, :]
        weight = tl.load(pointers, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(a, tl.trans(weight), acc, input_precision=PRECISION)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * outer + columns, mask=columns < outer, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    # With prefix tokens a convolution keeps its width: the columns are also channels of x.
    columns += group * outer
    passes = (cell < 0) & (image < batch)
    mask = inside & passes[:, None]
    passed = tl.load(
        (x_ptr + image * x_stride_b + token.to(tl.int64) * x_stride_n)[:, None] + columns[None, :],
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    if residual_ptr is not None:
        residual_rows = residual_ptr + image * residual_stride_b
        pointers = (residual_rows + token.to(tl.int64) * residual_stride_n)[:, None]
        passed += tl.load(pointers + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    acc = tl.where(passes[:, None], passed, acc)
    pointers = out_ptr + ((image * tokens + token) * width)[:, None] + columns[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=inside)
