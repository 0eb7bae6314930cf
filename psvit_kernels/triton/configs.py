"""Block sizes, warps and stages that each kernel is tried with; the first of a list is the default.

Nothing here has been measured yet: the defaults come from counting registers and shared memory.
"""

from __future__ import annotations

import torch
from triton import Config

# --- attention ------------------------------------------------------------------------------


def attention_short(dtype: torch.dtype, d: int) -> list[Config]:
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 16}, num_warps=4, num_stages=1)]
    return [
        Config({"BLOCK_M": 64}, num_warps=4, num_stages=1),
        Config({"BLOCK_M": 128}, num_warps=8, num_stages=1),
    ]


def attention_stream(dtype: torch.dtype, d: int) -> list[Config]:
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2)]
    return [
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    ]


# --- apply_attention ------------------------------------------------------------------------


def apply_stored(dtype: torch.dtype, itemsize: int) -> list[Config]:
    """Many rows a block, so that V is fetched from the L2 cache seldom."""
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3)]
    return [
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 256, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=4),
    ]


def apply_factored(dtype: torch.dtype, d: int) -> list[Config]:
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2)]
    return [
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    ]
