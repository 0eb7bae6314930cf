"""A converted model learns from its original: no labels."""

from .run import Distillation, distill

__all__ = ["Distillation", "distill"]
