"""A converted model learns from its original: no labels."""

from .run import distill
from .student import Distillation

__all__ = ["Distillation", "distill"]
