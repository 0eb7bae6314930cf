"""Calls of ``psvit_kernels`` that are right but for what a test changes."""

from __future__ import annotations

import torch
from inputs import F32

import psvit_kernels as pk


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
