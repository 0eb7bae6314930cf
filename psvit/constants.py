"""Tensors that every pass needs and no image changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def made_once(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function of plain values that makes tensors, each once: a copy from host to device waits
    for the device, and can't be captured in a CUDA graph.

    To a compiler what it makes is a constant, on the device already.

    Args:
        make: from hashable values (numbers, tuples, a dtype, a device) to a tensor, or a tuple of
            tensors.
    """
    made: dict[tuple, Made] = {}

    @torch.compiler.assume_constant_result
    def kept(*values: Any) -> Made:
        if values not in made:
            with torch.inference_mode(False):  # one made in inference mode is no good elsewhere
                made[values] = make(*values)
        return made[values]

    def once(*values: Any) -> Made:
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            return make(*values)  # an export without Dynamo: no real tensor, not to be kept
        return kept(*values)

    return once
