"""Systems that learn which tokens to keep: EViT, Evo-ViT and SiT."""

from .query_pool import QueryPool, Recovery
from .scores import class_attention
from .selection import Selection, select_patches, slow_and_fast, updated_scores

__all__ = [
    "QueryPool",
    "Recovery",
    "Selection",
    "class_attention",
    "select_patches",
    "slow_and_fast",
    "updated_scores",
]
