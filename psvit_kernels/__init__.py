"""Fused token pooling and attention reuse: operations, their reference, and their providers."""

from . import flops as _flops  # noqa: F401  (registers formulas)
from . import reduce as _reduce  # noqa: F401  (registers an operation)
from .apply import apply_attention
from .attention import attention
from .choice import explain
from .groups import TokenGroups
from .maps import AttentionMap, DenseMap, FactoredMap, QuantizedMap
from .merging import Merged, TokenMatch, match_tokens, merge_tokens, select_tokens
from .pooling import token_pool
from .registry import providers, use

__all__ = [
    "AttentionMap",
    "DenseMap",
    "FactoredMap",
    "Merged",
    "QuantizedMap",
    "TokenGroups",
    "TokenMatch",
    "apply_attention",
    "attention",
    "explain",
    "match_tokens",
    "merge_tokens",
    "providers",
    "select_tokens",
    "token_pool",
    "use",
]
