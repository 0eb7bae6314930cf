"""The Triton provider: its kernels, and in ``provider.py`` what of them serves a call."""

from __future__ import annotations

import os
from functools import cache

import torch


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; in the interpreter, that of those that kernels are made for."""
    return (9, 0) if interpreting() else torch.cuda.get_device_capability(device)
