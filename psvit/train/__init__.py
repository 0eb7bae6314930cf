"""Training PSViTs and any model of timm: ``psvit train``, and the same from Python.

The parts are timm's and PyTorch's: optimiser, learning rate, augmentation, mixup, averaged weights,
data parallelism. What is here puts them together, so that a run survives what stops it.
"""

from .config import Config
from .loop import LossError, train

__all__ = ["Config", "LossError", "train"]
