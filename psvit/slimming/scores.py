"""Scores by which patches are kept must be numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def check_scores(scores: Tensor, layer: int) -> None:
    """Raises ValueError for a score that is no number, which would be kept or dropped by chance.

    Only where a value can be looked at: not while a graph is traced or captured.

    Args:
        scores: of any shape.
        layer: where they are used, counted from 0.
    """
    if torch.compiler.is_compiling() or scores.device.type == "meta":
        return
    if scores.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if not scores.isfinite().all():
        raise ValueError(
            f"layer {layer + 1}: the attention of the class token to the patches is no number, "
            f"expected numbers to keep patches by"
        )
