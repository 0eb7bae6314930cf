"""Methods that choose or make the tokens of each layer by the image: EViT, Evo-ViT, SiT."""

from ..attention import class_attention
from .convert import evit, evo_vit, sit
from .query_pool import QueryPool, Recovery
from .selection import select_patches, slow_and_fast, updated_scores
from .training import Recalibration, SecondHead, begin_epoch

__all__ = [
    "QueryPool",
    "Recalibration",
    "Recovery",
    "SecondHead",
    "begin_epoch",
    "class_attention",
    "evit",
    "evo_vit",
    "select_patches",
    "sit",
    "slow_and_fast",
    "updated_scores",
]
