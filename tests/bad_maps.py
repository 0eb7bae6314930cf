"""Maps that can't be made: (call, error, message)."""

from __future__ import annotations

import torch
from inputs import BF16, F64
from right_calls import dense, factored, quantized, strided, t

import psvit_kernels as pk

MAPS = [
    (
        lambda: pk.DenseMap.from_dense([0.5, 0.5]),
        TypeError,
        "probabilities: got list, expected a Tensor of shape (B or 1, H, M, N)",
    ),
    (
        lambda: dense(3, 5, 5),
        ValueError,
        "probabilities: got shape (3, 5, 5), expected (B or 1, H, M, N)",
    ),
    (
        lambda: dense(2, 3, 5, 0),
        ValueError,
        "probabilities: got shape (2, 3, 5, 0), expected at least one column",
    ),
    (
        lambda: dense(2, 3, 5, 5, dtype=torch.uint8),
        TypeError,
        "probabilities: got dtype torch.uint8, expected a floating-point dtype",
    ),
    (
        lambda: pk.DenseMap(t(3, 5, 8), 5),
        ValueError,
        "storage: got shape (3, 5, 8), expected (B or 1, H, M, pitch)",
    ),
    (
        lambda: pk.DenseMap(t(1, 3, 5, 8), 9),
        ValueError,
        "n: got 9 for storage of shape (1, 3, 5, 8), expected 1 to 8, the number of columns that "
        "count",
    ),
    (
        lambda: pk.DenseMap(t(1, 3, 5, 8), 0),
        ValueError,
        "n: got 0 for storage of shape (1, 3, 5, 8), expected 1 to 8, the number of columns that "
        "count",
    ),
    (
        lambda: pk.DenseMap(strided(1, 3, 5, 8), 8),
        ValueError,
        "storage: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: pk.QuantizedMap.from_dense(t(1, 3, 5, 5), "int4"),
        ValueError,
        'code: got \'int4\', expected "uint8" or "e4m3"',
    ),
    (
        lambda: quantized(codes=t(2, 3, 5, 16)),
        TypeError,
        "codes: got (2, 3, 5, 16), torch.float32, expected (B or 1, H, M, pitch), torch.uint8 or "
        "torch.float8_e4m3fn",
    ),
    (
        lambda: quantized(row_scale=t(2, 3, 6)),
        ValueError,
        "row_scale: got shape (2, 3, 6), torch.float32 on cpu, expected (2, 3, 5), torch.float32 "
        "on cpu",
    ),
    (
        lambda: quantized(n=17),
        ValueError,
        "n: got 17 for codes of shape (2, 3, 5, 16), expected 1 to 16, the number of columns that "
        "count",
    ),
    (
        lambda: quantized(dtype=torch.int64),
        TypeError,
        "dtype: got torch.int64, expected a floating-point dtype",
    ),
    (lambda: factored(q=t(3, 5, 16)), ValueError, "q: got shape (3, 5, 16), expected (B, H, M, d)"),
    (
        lambda: factored(k=t(2, 3, 7, 16, dtype=BF16)),
        TypeError,
        "k: got dtype torch.bfloat16, expected torch.float32 as q",
    ),
    (
        lambda: factored(k=t(2, 2, 7, 16)),
        ValueError,
        "k: got shape (2, 2, 7, 16) with heads 2, expected 3 as q",
    ),
    (
        lambda: factored(k=t(2, 3, 7, 8)),
        ValueError,
        "k: got shape (2, 3, 7, 8) with head dim 8, expected 16 as q",
    ),
    (
        lambda: factored(k=strided(2, 3, 7, 16)),
        ValueError,
        "k: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: factored(lse=t(2, 3, 7)),
        ValueError,
        "lse: got shape (2, 3, 7), torch.float32 on cpu, expected (2, 3, 5), torch.float32 on cpu",
    ),
    (
        lambda: factored(lse=t(2, 3, 5, dtype=F64)),
        ValueError,
        "lse: got shape (2, 3, 5), torch.float64 on cpu, expected (2, 3, 5), torch.float32 on cpu",
    ),
    (
        lambda: factored(bias=t(7)),
        ValueError,
        "bias: got shape (7,), expected (B, H, M, N)",
    ),
    (
        lambda: factored(bias=t(1, 3, 5, 7)),
        ValueError,
        "bias: got shape (1, 3, 5, 7), expected (2, 3, 5, 7); expand it",
    ),
]
