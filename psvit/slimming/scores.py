"""How much the class token attends to each patch: the score by which patches are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """The row of the class token in the map, for patches: softmax(scale q_0 K^T).

    Takes O(H N d): the map isn't made.

    Args:
        q: queries, `(B, H, N or 1, d)`; the first one is that of the class token.
        k: keys, `(B, H, N, d)`.
        scale: of the scores.
        prefix: leading tokens that are no patches.

    Returns:
        `(B, H, N - prefix)`, float32 (float64 for float64).

    Source: EViT, arXiv 2202.07800, section 3.2; Evo-ViT, arXiv 2108.01390, section 3.2.
    """
    scores = (scale * q[:, :, :1]) @ k.transpose(2, 3)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide)[:, :, 0, prefix:]


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
