"""What attention and the application of its map have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..epilogue import wide


def heads_last(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, M, d) to contiguous (B, M, H, d): what every attention op returns."""
    return heads.transpose(1, 2).to(dtype).contiguous()


def scores_of(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (wide(q) @ wide(k).transpose(-1, -2)) * scale
    return scores if bias is None else scores + wide(bias)


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor) -> Tensor:
    return torch.exp(scores_of(q, k, bias, scale) - lse.unsqueeze(-1))


def score_gradients(ds: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return ds @ wide(k) * scale, ds.transpose(-1, -2) @ wide(q) * scale
