"""Which head of a stored map each head of V uses, as kernels read it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def donors(head_index: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, copied there once."""
    return torch.tensor(head_index, dtype=torch.int32, device=device)
