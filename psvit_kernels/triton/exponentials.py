"""Exponentials and nothing else: how fast a device makes them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

#: Exponentials of each element: so many that loading and storing it counts for nothing.
ROUNDS = 256

#: Eight independent chains a thread hide the latency of one.
_CONFIGS = (triton.Config({"BLOCK": 1024}, num_warps=4),)


def exponentials(x: Tensor) -> Tensor:
    """exp2(-x) of float32, applied ``ROUNDS`` times."""
    x = x.contiguous()
    out = torch.empty_like(x)
    arguments = {"x": x, "out": out, "n": x.numel(), "ROUNDS": ROUNDS}
    launch(
        _exponentials_kernel,
        lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),),
        arguments,
        _CONFIGS,
        (),
    )
    return out


@triton.jit
def _exponentials_kernel(x, out, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    values = tl.load(x + offsets, mask=inside, other=0.0)  # (BLOCK,)
    for _ in range(ROUNDS):
        values = tl.exp2(-values)
    tl.store(out + offsets, values, mask=inside)
