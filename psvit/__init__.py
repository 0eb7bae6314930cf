"""PSViT: vision transformers with pooled tokens and shared attention maps."""

from .accelerate import accelerate, restore
from .analyze import Analysis, analyze
from .layout import Layout
from .pooling import GridPool
from .schedule import Schedule
from .stack import record_maps

__all__ = [
    "Analysis",
    "GridPool",
    "Layout",
    "Schedule",
    "accelerate",
    "analyze",
    "record_maps",
    "restore",
]
