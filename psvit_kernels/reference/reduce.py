"""``reduce_map``: an attention map follows tokens that become fewer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import wide
from ..maps import row_pitch


def _matrix(order: Tensor, starts: Tensor, values: Tensor, n: int) -> Tensor:
    """Groups as a matrix `[B or 1, 1, M, N]`."""
    b, m = starts.shape[0], starts.shape[1] - 1
    entries = torch.arange(order.shape[1], device=order.device).expand(order.shape).contiguous()
    group = torch.searchsorted(starts[:, 1:].contiguous(), entries, right=True)  # M: in none
    matrix = values.new_zeros(b, (m + 1) * n).scatter_add(1, group * n + order, values)
    return matrix.view(b, 1, m + 1, n)[:, :, :m]


def reduce_map(
    storage: Tensor, n: int, order: Tensor, starts: Tensor, means: Tensor, shares: Tensor | None
) -> Tensor:
    """P' = R P U^T: rows are means over the members of a group, columns sums of their shares."""
    shares = torch.ones_like(means) if shares is None else shares
    p = wide(storage[..., :n])
    rows, columns = (_matrix(order, starts, t.to(p.dtype), n) for t in (means, shares))
    p = (rows @ p @ columns.transpose(-1, -2)).to(storage.dtype)
    return F.pad(p, (0, row_pitch(p.shape[-1], storage.element_size()) - p.shape[-1]))
