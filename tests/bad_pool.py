"""Wrong calls of ``token_pool``: (call, error, message)."""

from __future__ import annotations

import torch
from inputs import BF16, F64
from right_calls import conv, pool, strided, t

import psvit_kernels as pk

POOL = [
    (
        lambda: pk.token_pool(None, (4, 5)),
        TypeError,
        "x: got NoneType, expected a Tensor of shape (B, N, C)",
    ),
    (lambda: pool(t(2, 6, 4, 5)), ValueError, "x: got shape (2, 6, 4, 5), expected (B, N, C)"),
    (
        lambda: pool(t(2, 20, 6, dtype=torch.int64)),
        TypeError,
        "x: got dtype torch.int64, expected a floating-point dtype",
    ),
    (
        lambda: pool(strided(2, 20, 6)),
        ValueError,
        "x: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: pool(t(2, 20, 0)),
        ValueError,
        "x: got shape (2, 20, 0), expected at least one channel",
    ),
    (lambda: pool(dims=3), ValueError, "dims: got 3, expected 1 or 2"),
    (lambda: pool(grid=20), TypeError, "grid: got 20, expected a sequence of integers"),
    (
        lambda: pool(grid=(4, 5.0)),
        TypeError,
        "grid: got (4, 5.0), expected a sequence of integers",
    ),
    (
        lambda: pool(grid=(20,)),
        ValueError,
        "grid: got (20,), expected (h, w) of positive sizes for dims=2",
    ),
    (
        lambda: pool(dims=1),
        ValueError,
        "grid: got (4, 5), expected (n,) of positive sizes for dims=1",
    ),
    (
        lambda: pool(grid=(0, 5)),
        ValueError,
        "grid: got (0, 5), expected (h, w) of positive sizes for dims=2",
    ),
    (
        lambda: pool(grid=(-4, -5)),
        ValueError,
        "grid: got (-4, -5), expected (h, w) of positive sizes for dims=2",
    ),
    (
        lambda: pool(grid=(4, 4)),
        ValueError,
        "grid: got (4, 4) with prefix 0 for x of 20 tokens, expected 0 + 4 * 4 = 16 tokens",
    ),
    (
        lambda: pool(prefix=1),
        ValueError,
        "grid: got (4, 5) with prefix 1 for x of 20 tokens, expected 1 + 4 * 5 = 21 tokens",
    ),
    (
        lambda: pool(grid=(19,), dims=1),
        ValueError,
        "grid: got (19,) with prefix 0 for x of 20 tokens, expected 0 + 19 = 19 tokens",
    ),
    (lambda: pool(prefix=-1), ValueError, "prefix: got -1, expected 0 or more"),
    (lambda: pool(prefix=0.0), TypeError, "prefix: got 0.0, expected an integer"),
    (
        lambda: pool(kind="median"),
        ValueError,
        "kind: got 'median', expected one of max, avg, stride, conv",
    ),
    (lambda: pool(kernel=(3, 3)), TypeError, "kernel: got (3, 3), expected an integer"),
    (lambda: pool(stride=1.5), TypeError, "stride: got 1.5, expected an integer"),
    (lambda: pool(padding=None), TypeError, "padding: got None, expected an integer"),
    (lambda: pool(kernel=0), ValueError, "kernel, stride: got 0 and 2, expected 1 or more"),
    (lambda: pool(stride=0), ValueError, "kernel, stride: got 3 and 0, expected 1 or more"),
    (
        lambda: pool(kind="stride", stride=-1),
        ValueError,
        "kernel, stride: got 1 and -1, expected 1 or more",
    ),
    (lambda: pool(padding=-1), ValueError, "padding: got -1 for kernel 3, expected 0 to 1"),
    (lambda: pool(padding=2), ValueError, "padding: got 2 for kernel 3, expected 0 to 1"),
    (
        lambda: pool(kernel=7, padding=1),
        ValueError,
        "kernel: got 7 with padding 1, expected one that fits in grid (4, 5)",
    ),
    (
        lambda: pool(weight=t(6, 1, 3, 3)),
        ValueError,
        'weight, bias: got tensors for kind "max", expected them for "conv"',
    ),
    (
        lambda: pool(kind="avg", bias=t(6)),
        ValueError,
        'weight, bias: got tensors for kind "avg", expected them for "conv"',
    ),
    (
        lambda: pool(residual=1.0),
        TypeError,
        "residual: got float, expected a Tensor of shape (B, N, C)",
    ),
    (
        lambda: pool(residual=t(20, 6)),
        ValueError,
        "residual: got shape (20, 6), expected (B, N, C)",
    ),
    (
        lambda: pool(residual=t(1, 20, 6)),
        ValueError,
        "residual: got shape (1, 20, 6), expected (2, 20, 6) as x",
    ),
    (
        lambda: pool(residual=t(2, 20, 6, dtype=BF16)),
        TypeError,
        "residual: got dtype torch.bfloat16, expected torch.float32 as x",
    ),
    (
        lambda: pool(residual=t(2, 20, 6, device="meta")),
        ValueError,
        "residual: is on device meta, expected cpu as x",
    ),
    (
        lambda: pool(residual=strided(2, 20, 6)),
        ValueError,
        "residual: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: conv(groups=4),
        ValueError,
        "groups: got 4, expected a divisor of the 6 channels of x",
    ),
    (
        lambda: conv(groups=0),
        ValueError,
        "groups: got 0, expected a divisor of the 6 channels of x",
    ),
    (
        lambda: conv(weight=None),
        ValueError,
        'weight: got None, expected shape (C\', 1, 3, 3) for kind "conv"',
    ),
    (
        lambda: conv(weight=t(6, 1, 3)),
        ValueError,
        "weight: got shape (6, 1, 3), expected (C', 1, 3, 3)",
    ),
    (
        lambda: conv(weight=t(6, 1, 3, 3), grid=(20,), dims=1),
        ValueError,
        "weight: got shape (6, 1, 3, 3), expected (C', 1, 3)",
    ),
    (
        lambda: conv(weight=t(6, 2, 3, 3)),
        ValueError,
        "weight: got shape (6, 2, 3, 3), expected (C', 1, 3, 3), C' a multiple of 6",
    ),
    (
        lambda: conv(weight=t(9, 1, 3, 3)),
        ValueError,
        "weight: got shape (9, 1, 3, 3), expected (C', 1, 3, 3), C' a multiple of 6",
    ),
    (
        lambda: conv(weight=t(6, 1, 3, 3, dtype=F64)),
        TypeError,
        "weight: got dtype torch.float64, expected torch.float32",
    ),
    (
        lambda: conv(weight=t(6, 1, 3, 3, device="meta")),
        ValueError,
        "weight: is on device meta, expected cpu as x",
    ),
    (
        lambda: conv(weight=t(12, 1, 3, 3), prefix=1, x=t(2, 21, 6)),
        ValueError,
        "prefix: got 1 with a weight that makes 6 channels into 12; prefix tokens keep their "
        "width: project them on their own and pool with prefix=0",
    ),
    (
        lambda: conv(bias=t(5)),
        ValueError,
        "bias: got shape (5,) with channels 5, expected 6 as weight",
    ),
    (lambda: conv(bias=t(1, 6)), ValueError, "bias: got shape (1, 6), expected (6,)"),
    (
        lambda: conv(bias=t(6, dtype=BF16)),
        TypeError,
        "bias: got dtype torch.bfloat16, expected torch.float32",
    ),
    (
        lambda: pool(norm_bias=t(6)),
        ValueError,
        "norm_weight: got None with a norm_bias, expected both or neither",
    ),
    (
        lambda: pool(norm_weight=t(5)),
        ValueError,
        "norm_weight: got shape (5,) with channels 5, expected 6 as the pooled tokens",
    ),
    (
        lambda: conv(weight=t(12, 1, 3, 3), norm_weight=t(12), norm_bias=t(6)),
        ValueError,
        "norm_bias: got shape (6,) with channels 6, expected 12 as the pooled tokens",
    ),
    (
        lambda: pool(norm_weight=t(6, dtype=F64)),
        TypeError,
        "norm_weight: got dtype torch.float64, expected torch.float32",
    ),
]
