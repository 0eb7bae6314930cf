"""PSViT: vision transformers with pooled tokens and shared attention maps."""

from . import init, slimming
from .accelerate import accelerate, restore
from .analyze import Analysis, analyze
from .calibrate import calibrate
from .distill import Distillation, distill
from .layout import Layout
from .models import create_model
from .models.registration import register_when_imported
from .planning.plan import Plan
from .planning.run import plan
from .pooling import GridPool
from .schedule import Schedule
from .stack import record_maps, record_merges

register_when_imported()

__all__ = [
    "Analysis",
    "Distillation",
    "GridPool",
    "Layout",
    "PSViT",
    "Plan",
    "Schedule",
    "accelerate",
    "analyze",
    "calibrate",
    "create_model",
    "distill",
    "init",
    "plan",
    "record_maps",
    "record_merges",
    "restore",
    "slimming",
]


def __getattr__(name: str) -> object:
    if name == "PSViT":  # its parts come from timm: imported when asked for
        from .models import PSViT

        return PSViT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
