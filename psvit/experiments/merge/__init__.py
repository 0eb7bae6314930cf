"""What merging tokens keeps of a trained ViT-Tiny, and what it saves."""

from .plain import Plain
from .run import Settings, check, run

__all__ = ["Plain", "Settings", "check", "run"]
