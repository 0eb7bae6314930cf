"""Fused token pooling and attention reuse: operations, their reference, and their providers."""

from . import flops as _flops  # noqa: F401  (registers formulas)
from .apply import apply_attention
from .attention import attention
from .choice import explain
from .maps import AttentionMap, DenseMap, FactoredMap, QuantizedMap
from .pooling import token_pool
from .registry import providers, use

__all__ = [
    "AttentionMap",
    "DenseMap",
    "FactoredMap",
    "QuantizedMap",
    "apply_attention",
    "attention",
    "explain",
    "providers",
    "token_pool",
    "use",
]
