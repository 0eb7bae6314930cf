"""Every bad input of ``psvit_kernels`` ends in one error, with this message and nothing run."""

from __future__ import annotations

import math
import re

import pytest
import torch
from inputs import BF16, F16, F32, F64

import psvit_kernels as pk
from psvit_kernels import registry


def t(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.ones(*shape, dtype=dtype, device=device)


def strided(*shape: int) -> torch.Tensor:
    """A tensor whose last dimension has a stride of 2."""
    return t(*shape[:-1], 2 * shape[-1])[..., ::2]


def attend(**changed):
    """A call that is right but for ``changed``."""
    args = {name: t(2, 3, 5, 16) for name in ("q", "k", "v")} | changed
    return pk.attention(args.pop("q"), args.pop("k"), args.pop("v"), **args)


def dense(*shape: int, dtype: torch.dtype = F32) -> pk.DenseMap:
    return pk.DenseMap.from_dense(t(*shape, dtype=dtype))


def factored(**changed) -> pk.FactoredMap:
    args = {"q": t(2, 3, 5, 16), "k": t(2, 3, 7, 16), "lse": t(2, 3, 5), "scale": 0.25}
    return pk.FactoredMap(**args | changed)


def quantized(**changed) -> pk.QuantizedMap:
    args = {"codes": t(2, 3, 5, 16, dtype=torch.uint8), "row_scale": t(2, 3, 5), "n": 5}
    return pk.QuantizedMap(**{**args, "dtype": F32, **changed})


def apply(attn_map=None, v=None, **options):
    attn_map = dense(2, 3, 5, 5) if attn_map is None else attn_map
    return pk.apply_attention(attn_map, t(2, 3, 5, 16) if v is None else v, **options)


def pool(x=None, grid=(4, 5), **options):
    return pk.token_pool(t(2, 20, 6) if x is None else x, grid, **options)


def conv(**changed):
    args = {"kind": "conv", "weight": t(6, 1, 3, 3), "groups": 6} | changed
    return pool(**args)


FORMS = "None, 'dense', 'uint8', 'e4m3', 'factored', 'auto'"

ATTENTION = [
    (lambda: attend(reuses=-1), ValueError, "reuses: got -1, expected 0 or more"),
    (lambda: attend(reuses=1.5), TypeError, "reuses: got 1.5, expected an integer"),
    (lambda: attend(q=[1.0]), TypeError, "q: got list, expected a Tensor of shape (B, H, M, d)"),
    (lambda: attend(k=None), TypeError, "k: got NoneType, expected a Tensor of shape (B, H, N, d)"),
    (lambda: attend(q=t(3, 5, 16)), ValueError, "q: got shape (3, 5, 16), expected (B, H, M, d)"),
    (
        lambda: attend(v=t(2, 3, 5, 4, 4)),
        ValueError,
        "v: got shape (2, 3, 5, 4, 4), expected (B, H, N, d)",
    ),
    (
        lambda: attend(q=t(2, 3, 5, 16, dtype=torch.int64)),
        TypeError,
        "q: got dtype torch.int64, expected a floating-point dtype",
    ),
    (
        lambda: attend(v=t(2, 3, 5, 16, dtype=torch.complex64)),
        TypeError,
        "v: got dtype torch.complex64, expected a floating-point dtype",
    ),
    (
        lambda: attend(k=t(2, 3, 5, 16, dtype=BF16)),
        TypeError,
        "k: got dtype torch.bfloat16, expected torch.float32 as q",
    ),
    (
        lambda: attend(v=t(2, 3, 5, 16, dtype=F64)),
        TypeError,
        "v: got dtype torch.float64, expected torch.float32 as q",
    ),
    (
        lambda: attend(k=t(2, 3, 5, 16, device="meta")),
        ValueError,
        "k: is on device meta, expected cpu as q",
    ),
    (
        lambda: attend(k=t(1, 3, 5, 16)),
        ValueError,
        "k: got shape (1, 3, 5, 16) with batch 1, expected 2 as q",
    ),
    (
        lambda: attend(v=t(2, 4, 5, 16)),
        ValueError,
        "v: got shape (2, 4, 5, 16) with heads 4, expected 3 as q",
    ),
    (
        lambda: attend(k=t(2, 3, 5, 8)),
        ValueError,
        "k: got shape (2, 3, 5, 8) with head dim 8, expected 16 as q",
    ),
    (
        lambda: attend(v=t(2, 3, 6, 16)),
        ValueError,
        "v: got shape (2, 3, 6, 16) with tokens 6, expected 5 as k",
    ),
    (
        lambda: attend(q=t(2, 3, 0, 16)),
        ValueError,
        "q: got shape (2, 3, 0, 16), expected at least one token",
    ),
    (
        lambda: attend(k=t(2, 3, 0, 16), v=t(2, 3, 0, 16)),
        ValueError,
        "k: got shape (2, 3, 0, 16), expected at least one token",
    ),
    (
        lambda: attend(q=t(2, 3, 5, 0), k=t(2, 3, 5, 0)),
        ValueError,
        "q: got shape (2, 3, 5, 0), expected at least one number per head",
    ),
    (
        lambda: attend(v=t(2, 3, 5, 0)),
        ValueError,
        "v: got shape (2, 3, 5, 0), expected at least one number per head",
    ),
    (
        lambda: attend(q=strided(2, 3, 5, 16)),
        ValueError,
        "q: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: attend(v=t(2, 3, 16, 5).transpose(2, 3)),
        ValueError,
        "v: got stride 5 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: attend(k=t(2, 3, 5, 1).expand(2, 3, 5, 16)),
        ValueError,
        "k: got stride 0 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: attend(return_map="sparse"),
        ValueError,
        f"return_map: got 'sparse', expected one of {FORMS}",
    ),
    (
        lambda: attend(return_map=True),
        ValueError,
        f"return_map: got True, expected one of {FORMS}",
    ),
    (lambda: attend(scale="small"), TypeError, "scale: got 'small', expected a number"),
    (lambda: attend(scale=(1, 2)), TypeError, "scale: got (1, 2), expected a number"),
    (lambda: attend(bias=0.5), TypeError, "bias: got float, expected a Tensor or None"),
    (
        lambda: attend(bias=t(5, dtype=torch.bool)),
        TypeError,
        "bias: got dtype torch.bool, expected a tensor to add to the scores; "
        "make one with torch.where(mask, 0.0, -torch.inf)",
    ),
    (
        lambda: attend(bias=t(5, dtype=F16)),
        TypeError,
        "bias: got dtype torch.float16, expected torch.float32 as q",
    ),
    (
        lambda: attend(bias=t(5, device="meta")),
        ValueError,
        "bias: is on device meta, expected cpu as q",
    ),
    (
        lambda: attend(bias=t(4)),
        ValueError,
        "bias: got shape (4,), expected one that broadcasts to (B, H, M, N) = (2, 3, 5, 5)",
    ),
    (
        lambda: attend(bias=t(2, 5, 5)),
        ValueError,
        "bias: got shape (2, 5, 5), expected one that broadcasts to (B, H, M, N) = (2, 3, 5, 5)",
    ),
    (
        lambda: attend(bias=t(1, 1, 1, 1, 5)),
        ValueError,
        "bias: got shape (1, 1, 1, 1, 5), expected one that broadcasts to (B, H, M, N) "
        "= (2, 3, 5, 5)",
    ),
]

APPLY = [
    (
        lambda: apply(dropout=1.0),
        ValueError,
        "dropout: got 1.0, expected a probability from 0 to below 1",
    ),
    (
        lambda: apply(dropout=-0.1),
        ValueError,
        "dropout: got -0.1, expected a probability from 0 to below 1",
    ),
    (lambda: apply(dropout="some"), TypeError, "dropout: got 'some', expected a number"),
    (
        lambda: apply(quantized(), t(2, 3, 5, 16, dtype=BF16)),
        TypeError,
        "v: got dtype torch.bfloat16, expected torch.float32 as the map",
    ),
    (
        lambda: apply(quantized(), t(2, 3, 6, 16)),
        ValueError,
        "v: got shape (2, 3, 6, 16) with tokens 6, expected 5 as the map",
    ),
    (
        lambda: apply(t(2, 3, 5, 5)),
        TypeError,
        "attn_map: got Tensor, expected a DenseMap, QuantizedMap or FactoredMap; "
        "DenseMap.from_dense(probabilities) makes one",
    ),
    (
        lambda: apply(pk.AttentionMap()),
        TypeError,
        "attn_map: got AttentionMap, expected a DenseMap, QuantizedMap or FactoredMap; "
        "DenseMap.from_dense(probabilities) makes one",
    ),
    (
        lambda: pk.apply_attention(dense(2, 3, 5, 5), None),
        TypeError,
        "v: got NoneType, expected a Tensor of shape (B, H, N, d)",
    ),
    (lambda: apply(v=t(2, 5, 48)), ValueError, "v: got shape (2, 5, 48), expected (B, H, N, d)"),
    (
        lambda: apply(v=t(2, 3, 5, 16, dtype=torch.int32)),
        TypeError,
        "v: got dtype torch.int32, expected a floating-point dtype",
    ),
    (
        lambda: apply(v=t(2, 3, 5, 16, dtype=BF16)),
        TypeError,
        "v: got dtype torch.bfloat16, expected torch.float32 as the map",
    ),
    (
        lambda: apply(v=t(2, 3, 5, 16, device="meta")),
        ValueError,
        "v: is on device meta, expected cpu as the map",
    ),
    (
        lambda: apply(v=t(4, 3, 5, 16)),
        ValueError,
        "v: got shape (4, 3, 5, 16) with batch 4, expected 2 as the map",
    ),
    (
        lambda: apply(factored(q=t(1, 3, 5, 16), k=t(1, 3, 7, 16), lse=t(1, 3, 5)), t(2, 3, 7, 8)),
        ValueError,
        "v: got shape (2, 3, 7, 8) with batch 2, expected 1 as the map (factored)",
    ),
    (
        lambda: apply(v=t(2, 3, 6, 16)),
        ValueError,
        "v: got shape (2, 3, 6, 16) with tokens 6, expected 5 as the map",
    ),
    (
        lambda: apply(v=t(2, 3, 8, 16)),  # as wide as the storage, but not as the map
        ValueError,
        "v: got shape (2, 3, 8, 16) with tokens 8, expected 5 as the map",
    ),
    (
        lambda: apply(v=t(2, 3, 5, 0)),
        ValueError,
        "v: got shape (2, 3, 5, 0), expected at least one number per head",
    ),
    (
        lambda: apply(v=strided(2, 3, 5, 16)),
        ValueError,
        "v: got stride 2 on the last dimension, expected 1; call .contiguous() on it",
    ),
    (
        lambda: apply(v=t(2, 4, 5, 16)),
        ValueError,
        "v: got 4 heads, expected 3 as the map, or a head_index",
    ),
    (
        lambda: apply(head_index=[0, 1]),
        ValueError,
        "head_index: got 2 entries, expected 3, one per head",
    ),
    (
        lambda: apply(head_index=[0, 1, 3]),
        ValueError,
        "head_index: got [0, 1, 3], expected entries from 0 to 2",
    ),
    (
        lambda: apply(head_index=[0, -1, 2]),
        ValueError,
        "head_index: got [0, -1, 2], expected entries from 0 to 2",
    ),
    (
        lambda: apply(head_index=[0, 1.5, 2]),
        TypeError,
        "head_index: got [0, 1.5, 2], expected a sequence of integers",
    ),
    (lambda: apply(head_index=1), TypeError, "head_index: got 1, expected a sequence of integers"),
    (
        lambda: apply(correction=[1.0, 0.0, 0.0]),
        TypeError,
        "correction: got list, expected a Tensor of shape (H, 3)",
    ),
    (
        lambda: apply(correction=t(3)),
        ValueError,
        "correction: got shape (3,), expected (H, 3)",
    ),
    (
        lambda: apply(correction=t(2, 3)),
        ValueError,
        "correction: got shape (2, 3), expected (3, 3): alpha, beta, gamma of each head",
    ),
    (
        lambda: apply(correction=t(3, 3, dtype=F64)),
        TypeError,
        "correction: got dtype torch.float64, expected torch.float32",
    ),
    (
        lambda: apply(
            dense(2, 3, 5, 5, dtype=BF16), t(2, 3, 5, 16, dtype=BF16), correction=t(3, 3, dtype=F16)
        ),
        TypeError,
        "correction: got dtype torch.float16, expected torch.float32 or torch.bfloat16",
    ),
    (
        lambda: apply(correction=t(3, 3, device="meta")),
        ValueError,
        "correction: is on device meta, expected cpu as v",
    ),
    (
        lambda: apply(dense(2, 3, 4, 5), correction=t(3, 3)),
        ValueError,
        "correction: got a map of shape (4, 5), expected a square one",
    ),
]

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

PROVIDERS = [
    (
        lambda: pk.use("tpu"),
        ValueError,
        f'provider: got "tpu", expected one of {", ".join(registry.PROVIDERS)}, or auto',
    ),
    (
        lambda: pk.use("CPU"),
        ValueError,
        f'provider: got "CPU", expected one of {", ".join(registry.PROVIDERS)}, or auto',
    ),
]

TABLE = [*ATTENTION, *APPLY, *MAPS, *POOL, *PROVIDERS]


@pytest.mark.parametrize(("call", "error", "message"), TABLE, ids=[row[2] for row in TABLE])
def test_bad_input_raises(call, error, message, monkeypatch):
    def nothing_may_run(op, args):
        raise AssertionError(f"{op} ran")

    monkeypatch.setattr(registry, "choose", nothing_may_run)
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error


def test_right_input_of_the_same_helpers_runs():
    """The table's calls are wrong only in what they change."""
    attend()
    apply()
    apply(factored(), t(2, 3, 7, 16))
    pool()
    conv()


def test_autocast_casts_before_dtypes_are_compared():
    with torch.autocast("cpu", dtype=BF16):
        out, _ = attend(k=t(2, 3, 5, 16, dtype=BF16), bias=t(5, dtype=F64))
    assert out.dtype == BF16


def test_shapes_can_be_asked_for_without_values():
    """On the meta device, as when a model is built before its weights are loaded."""
    q = t(2, 3, 5, 16, device="meta")
    for form in ("dense", "factored"):
        out, m = pk.attention(q, q, q, return_map=form)
        assert out.shape == pk.apply_attention(m, q).shape == (2, 3, 5, 16)
        assert out.device.type == "meta" and m.shape == (2, 3, 5, 5)
    assert pk.token_pool(t(2, 20, 6, device="meta"), (4, 5))[0].shape == (2, 6, 6)


def test_nan_is_no_error(provider):
    out, _ = attend(q=t(2, 3, 5, 16) * math.nan)
    assert bool(out.isnan().all())
    assert bool(apply(v=t(2, 3, 5, 16) * math.nan).isnan().all())
    assert bool(pool(t(2, 20, 6) * math.nan)[0].isnan().all())
