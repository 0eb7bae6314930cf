"""The Triton provider: float32, bfloat16 and float16 on a GPU, or in Triton's interpreter.

Triton is imported when the first call is served, not before: that takes a second, and a machine
without a GPU needs none of it. With TRITON_INTERPRET=1 in the environment the kernels run on CPU
tensors, slowly, for those who change them: force the provider then.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from . import capability, interpreting

MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)  # the oldest that the kernels have been compiled with
E4M3_CAPABILITY = (8, 9)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Where each operation is.
_FILES = {
    "attention": "attention",
    "attention_quantized": "attention",
    "attention_backward": "attention_backward",
    "apply_dense": "apply",
    "apply_quantized": "apply",
    "apply_factored": "apply",
    "apply_dense_backward": "apply_backward",
    "apply_quantized_backward": "apply_backward",
    "apply_factored_backward": "apply_backward",
    "token_pool": "pool",
    "token_pool_backward": "pool_backward",
    "match_tokens": "merge",
    "merge_tokens": "merge",
    "merge_tokens_backward": "merge",
    "reduce_map": "reduce_map",
}

#: Which arguments have a head dim last; the first of them tells the dtype.
_HEADS = {
    "attention": (0, 1, 2),
    "attention_quantized": (0, 1, 2),
    "attention_backward": (5, 6, 7),
    "apply_dense": (1,),
    "apply_quantized": (2,),
    "apply_factored": (0, 1, 5),
    "apply_dense_backward": (2,),
    "apply_quantized_backward": (3,),
    "apply_factored_backward": (1, 2, 6),
    "token_pool": (),
    "token_pool_backward": (),
    "match_tokens": (0,),
    "merge_tokens": (),
    "merge_tokens_backward": (),
    "reduce_map": (),
}


@cache
def missing() -> str | None:
    """Why this provider can't be used on this machine, or None."""
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no GPU that PyTorch can use"
    version = import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version}, older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    return None


def supports(op: str, args: tuple) -> str | None:
    reason = missing()
    if reason is not None:
        return reason
    if op not in _FILES:
        return "no kernel"
    if op == "merge_tokens_backward" and args[-1]:
        return "gradients of weights"
    heads = [args[i] for i in _HEADS[op]]
    first: Tensor = heads[0] if heads else args[0]
    if first.dtype not in _DTYPES:
        return f"dtype {first.dtype}, not one of {', '.join(str(t) for t in _DTYPES)}"
    if interpreting():
        if first.dtype is torch.bfloat16:
            return "dtype torch.bfloat16, whose products Triton's interpreter gets wrong"
    elif first.device.type != "cuda":
        return f"device {first.device.type}, not cuda"
    elif torch.version.cuda:
        found = capability(first.device)
        if found < MIN_CAPABILITY:
            return f"compute capability {found}, below {MIN_CAPABILITY}"
        if found < E4M3_CAPABILITY and _has_e4m3(args):
            return f"compute capability {found}, below {E4M3_CAPABILITY}, which e4m3 needs"
    widest = max((t.shape[3] for t in heads), default=0)
    return f"head dim {widest} > {MAX_HEAD_DIM}" if widest > MAX_HEAD_DIM else None


def _has_e4m3(args: tuple) -> bool:
    kinds = (a.dtype if isinstance(a, Tensor) else a for a in args)
    return any(kind is torch.float8_e4m3fn for kind in kinds)


def __getattr__(name: str) -> Any:
    """The operations, from the files that import Triton."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_FILES[name]}", __package__), name)
    return globals().setdefault(name, found)
