"""The executable specification: plain PyTorch, any floating dtype up to float64, any device.

Half-precision inputs are computed in float32 and rounded once at the end. Gradients are written
out as formulas, so that these files can be read as the definition of every operation.
"""

from __future__ import annotations

from .apply import (
    apply_dense,
    apply_dense_backward,
    apply_factored,
    apply_factored_backward,
    apply_quantized,
    apply_quantized_backward,
)
from .attention import attention, attention_backward, attention_quantized
from .match import match_tokens, select_tokens
from .merge import merge_tokens, merge_tokens_backward
from .pool import token_pool, token_pool_backward
from .reduce import reduce_map

__all__ = [
    "apply_dense",
    "apply_dense_backward",
    "apply_factored",
    "apply_factored_backward",
    "apply_quantized",
    "apply_quantized_backward",
    "attention",
    "attention_backward",
    "attention_quantized",
    "match_tokens",
    "merge_tokens",
    "merge_tokens_backward",
    "reduce_map",
    "select_tokens",
    "token_pool",
    "token_pool_backward",
]


def missing() -> str | None:
    """Why this provider can't be used on this machine: PyTorch is always there."""
    return None


def supports(op: str, args: tuple) -> str | None:
    return None
