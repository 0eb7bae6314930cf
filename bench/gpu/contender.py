"""What runs in a case: calls, what is pinned around them, and how rows are shown to be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import gate
from .clock import Call
from .providers import serving
from .rows import HEAD_DIM, split

#: Of PyTorch's fused attention, by the last part of a baseline's name.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


QKV = tuple[Tensor, Tensor, Tensor]


def fused_qkv(b: int, h: int, n: int, dtype: torch.dtype, device: str) -> QKV:
    """Views of one (B, N, 3, H, d) projection."""
    fused = torch.randn(b, n, 3, h, HEAD_DIM, dtype=dtype, device=device)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    return q, k, v


@dataclass
class Contender:
    """A call for each set of inputs, and what is pinned around them."""

    calls: Sequence[Call]
    pinned: Callable[[], AbstractContextManager] = nullcontext


@dataclass
class Subject(Contender):
    """Something of psvit.

    Args:
        check: raises AssertionError if it is wrong.
        map_nbytes: of the map that it stores or reads.
        facts: what else the file shall say of the row.
    """

    check: Callable[[], gate.Error] = gate.Error
    map_nbytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """How to make what runs in a case: subjects by form, whoever serves them; baselines by name."""

    subjects: Mapping[str, Callable[[], Subject]]
    baselines: Mapping[str, Callable[[], Contender]]
    automatic: Callable[[], dict[str, Any]] | None = None

    def subject(self, row: str) -> Subject:
        """Pinned to the provider of the row."""
        form, provider = split(row)
        pinned = partial(serving, provider)
        with pinned():
            return replace(self.subjects[form](), pinned=pinned)


def compiled(function: Callable) -> Callable:
    """For the shapes that it meets, as a person who wants speed compiles it."""
    return torch.compile(function, dynamic=False)
