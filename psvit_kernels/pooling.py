"""``token_pool``: fewer tokens, straight on (B, N, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import checks
from .grid import pooled_grid
from .registry import register

KINDS = ("max", "avg", "stride", "conv")


def token_pool(
    x: Tensor,
    grid: Sequence[int],
    *,
    residual: Tensor | None = None,
    prefix: int = 0,
    kind: Literal["max", "avg", "stride", "conv"] = "max",
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    dims: Literal[1, 2] = 2,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, tuple[int, ...]]:
    """Pools a grid (or a sequence) of tokens, without a permute to images and back.

    Args:
        x: tokens, `[B, prefix + h w, C]`, unit stride on the last dimension.
        grid: (h, w) for ``dims=2``, (n,) for ``dims=1``.
        residual: added to x first (prefix tokens too), in the same pass: the sum of a residual
            branch need not be written. Shape, dtype and device of x, unit stride on the last
            dimension. Added in float32; products of half precision in a convolution that isn't
            depthwise take the sum rounded to the dtype of x.
        prefix: leading tokens (cls, distillation, registers) that pass beside the pool. With
            ``dims=1`` and ``prefix=0`` such tokens are inside the sequence and are pooled.
        kind: "max"; "avg" (padding is left out of the count, so constants stay constant);
            "stride" (keeps every ``stride``-th token; kernel and padding play no part); "conv".
        kernel, stride, padding: of the window, in tokens; 2 padding <= kernel.
        weight: for "conv", `[C', C / groups, kernel, kernel]` (`[C', C / groups, kernel]` for
            ``dims=1``), as of ``torch.nn.functional.conv2d``.
        bias: for "conv", `[C']`.
        groups: for "conv".
        norm_weight, norm_bias: `[C']`; if given, LayerNorm over every token of the result (the
            prefix tokens too), in the same pass.
        norm_eps: of that LayerNorm.

    Returns:
        tokens: `[B, prefix + h' w', C']`, contiguous.
        grid: (h', w') or (n',), with h' = (h + 2 padding - kernel) // stride + 1.

    dtypes: float32, bfloat16, float16, float64, weights and biases the same or float32; sums in
    float32 (float64 for float64).

    Raises:
        ValueError: sizes that don't match, a window that doesn't fit, an unknown kind, a strided
            last dimension, prefix tokens beside a "conv" that changes the width.
        TypeError: not a floating-point tensor, mixed dtypes.

    Source: PSViT, arXiv 2108.03428, section 3; PiT, arXiv 2103.16302, for the depthwise pool.
    """
    checks.is_tensor("x", x, 3, "(B, N, C)")
    if dims not in (1, 2):
        raise ValueError(f"dims: got {dims!r}, expected 1 or 2")
    grid = checks.integers("grid", grid)
    prefix = checks.integer("prefix", prefix)
    windows = (("kernel", kernel), ("stride", stride), ("padding", padding))
    kernel, stride, padding = (checks.integer(name, size) for name, size in windows)
    checks.not_empty("x", x, 2, "channel")
    _check_grid(x, grid, prefix, dims)
    checks.unit_last_stride("x", x)
    if residual is not None:
        _check_residual(residual, x)
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "stride":
        kernel, padding = 1, 0
    new_grid = _new_grid(grid, kernel, stride, padding)
    width = x.shape[2]
    if kind == "conv":
        width = _check_conv(x, weight, bias, groups, kernel, dims, prefix)
    elif weight is not None or bias is not None:
        raise ValueError(f'weight, bias: got tensors for kind "{kind}", expected them for "conv"')
    _check_norm(x, norm_weight, norm_bias, width)
    if dims == 1:
        sizes = ([1, grid[0]], [1, kernel], [1, stride], [0, padding])
        weight = None if weight is None else weight.unsqueeze(2)
    else:
        sizes = (list(grid), [kernel, kernel], [stride, stride], [padding, padding])
    grid2d, kernels, strides, paddings = sizes
    out = torch.ops.psvit_kernels.token_pool(
        x, residual, grid2d, prefix, kind, kernels, strides, paddings, weight, bias, groups,
        norm_weight, norm_bias, norm_eps,
    )  # fmt: skip
    return out, new_grid


def _check_grid(x: Tensor, grid: tuple[int, ...], prefix: int, dims: int) -> None:
    if len(grid) != dims or any(n < 1 for n in grid):
        expected = "(h, w)" if dims == 2 else "(n,)"
        raise ValueError(f"grid: got {grid}, expected {expected} of positive sizes for dims={dims}")
    if prefix < 0:
        raise ValueError(f"prefix: got {prefix}, expected 0 or more")
    cells = grid[0] * (grid[1] if dims == 2 else 1)
    if x.shape[1] != prefix + cells:
        sizes = " * ".join(str(n) for n in grid)
        raise ValueError(
            f"grid: got {grid} with prefix {prefix} for x of {x.shape[1]} tokens, "
            f"expected {prefix} + {sizes} = {prefix + cells} tokens"
        )


def _check_residual(residual: Tensor, x: Tensor) -> None:
    checks.is_tensor("residual", residual, 3, "(B, N, C)")
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)}, expected {tuple(x.shape)} as x"
        )
    checks.same_kind("residual", residual, "x", x)
    checks.unit_last_stride("residual", residual)


def _new_grid(grid: tuple[int, ...], kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel, stride: got {kernel} and {stride}, expected 1 or more")
    if padding < 0 or 2 * padding > kernel:
        raise ValueError(f"padding: got {padding} for kernel {kernel}, expected 0 to {kernel // 2}")
    if any(n + 2 * padding < kernel for n in grid):
        raise ValueError(
            f"kernel: got {kernel} with padding {padding}, expected one that fits in grid {grid}"
        )
    windows = ([size] * len(grid) for size in (kernel, stride, padding))
    return tuple(pooled_grid(grid, *windows))


def _check_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    kernel: int,
    dims: int,
    prefix: int,
) -> int:
    """The width C' of the result."""
    c = x.shape[2]
    if groups < 1 or c % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {c} channels of x")
    shape = f"(C', {c // groups}{f', {kernel}' * dims})"
    if weight is None:
        raise ValueError(f'weight: got None, expected shape {shape} for kind "conv"')
    checks.is_tensor("weight", weight, 2 + dims, shape)
    checks.parameter("weight", weight, x.dtype, "x", x)
    if tuple(weight.shape[1:]) != (c // groups, *[kernel] * dims) or weight.shape[0] % groups:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected {shape}, C' a multiple of {groups}"
        )
    width = weight.shape[0]
    if prefix and width != c:
        raise ValueError(
            f"prefix: got {prefix} with a weight that makes {c} channels into {width}; prefix "
            f"tokens keep their width: project them on their own and pool with prefix=0"
        )
    if bias is not None:
        checks.is_tensor("bias", bias, 1, f"({width},)")
        checks.size("bias", bias, 0, "channels", width, "weight")
        checks.parameter("bias", bias, x.dtype, "x", x)
    return width


def _check_norm(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, width: int
) -> None:
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_weight: got None with a norm_bias, expected both or neither")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None:
            checks.is_tensor(name, t, 1, f"({width},)")
            checks.size(name, t, 0, "channels", width, "the pooled tokens")
            checks.parameter(name, t, x.dtype, "x", x)


# --- registration ---------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, Tensor? residual, SymInt[] grid, int prefix, str kind, int[] kernel, int[] stride,"
    " int[] padding, Tensor? weight, Tensor? bias, int groups, Tensor? norm_weight,"
    " Tensor? norm_bias, float norm_eps"
)


def _fake(x, residual, grid, prefix, kind, kernel, stride, padding, weight, *rest):
    h, w = pooled_grid(grid, kernel, stride, padding)
    width = x.shape[2] if weight is None else weight.shape[0]
    return x.new_empty(x.shape[0], prefix + h * w, width)


def _fake_backward(
    grad_out, x, residual, grid, prefix, kind, kernel, stride, padding, weight, bias, groups,
    norm_weight, norm_bias, norm_eps,
):  # fmt: skip
    inputs = (x, weight, bias, norm_weight, norm_bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    x, residual, *ctx.window, weight, bias, ctx.groups, norm_weight, norm_bias, eps = inputs
    ctx.norm_eps = eps
    ctx.save_for_backward(x, residual, weight, bias, norm_weight, norm_bias)


def _backward(ctx, grad_out):
    x, residual, weight, bias, norm_weight, norm_bias = ctx.saved_tensors
    grads = torch.ops.psvit_kernels.token_pool_backward(
        grad_out, x, residual, *ctx.window, weight, bias, ctx.groups, norm_weight, norm_bias,
        ctx.norm_eps,
    )  # fmt: skip
    given = (x, weight, bias, norm_weight, norm_bias)
    dx, dw, db, dnw, dnb = (None if t is None else g for t, g in zip(given, grads, strict=True))
    # A sum's gradient is that of each of its terms: one tensor, written once.
    dresidual = None if residual is None else dx
    return dx, dresidual, *[None] * len(ctx.window), dw, db, None, dnw, dnb, None


register(
    f"token_pool_backward(Tensor grad_out, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
register(f"token_pool({_ARGUMENTS}) -> Tensor", _fake, _backward, _setup_context)
