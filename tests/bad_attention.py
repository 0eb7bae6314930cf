"""Wrong calls of ``attention`` and ``apply_attention``: (call, error, message)."""

from __future__ import annotations

import torch
from inputs import BF16, F16, F64
from right_calls import apply, attend, dense, factored, quantized, strided, t

import psvit_kernels as pk

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
