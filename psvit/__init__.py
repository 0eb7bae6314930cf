"""PSViT: vision transformers with pooled tokens and shared attention maps."""

from .accelerate import accelerate, restore
from .layout import Layout
from .pooling import GridPool
from .schedule import Schedule
from .stack import record_maps

__all__ = ["GridPool", "Layout", "Schedule", "accelerate", "record_maps", "restore"]
