"""Registers ``reduce_map``, which ``AttentionMap.reduce`` calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import TokenGroups
from .maps import row_pitch
from .registry import register


def _fake(storage, n, order, starts, means, shares):
    b, h, _, _ = storage.shape
    m = starts.shape[1] - 1
    return storage.new_empty(max(b, order.shape[0]), h, m, row_pitch(m, storage.itemsize))


def _setup_context(ctx, inputs, output):
    storage, ctx.n, *tables = inputs
    ctx.shape = storage.shape
    ctx.save_for_backward(*tables)


def _backward(ctx, grad):
    """P' = R P U^T has the gradient R^T dP' U, which is a map reduced by other groups."""
    groups = TokenGroups(*ctx.saved_tensors)
    n, pitch = ctx.n, ctx.shape[3]
    back = _transposed(groups, n)
    dp = torch.ops.psvit_kernels.reduce_map(grad, groups.tokens, *back)[..., :n]
    return F.pad(dp.sum_to_size(*ctx.shape[:3], n), (0, pitch - n)), None, None, None, None, None


def _transposed(groups: TokenGroups, n: int) -> TokenGroups:
    """Of n tokens, group by token what is group by group: the tables of the transposed matrices."""
    order, starts, means, shares = groups
    entries = torch.arange(order.shape[1], device=order.device).expand(order.shape).contiguous()
    group = torch.searchsorted(starts[:, 1:].contiguous(), entries, right=True)
    outside = group == groups.tokens
    token, sorting = order.sort(dim=1, stable=True)
    tokens = torch.arange(n + 1, device=order.device).expand(len(order), n + 1)

    def by_token(t: Tensor) -> Tensor:
        return t.masked_fill(outside, 0).gather(1, sorting)

    shares = torch.ones_like(means) if shares is None else shares
    ends = torch.searchsorted(token.contiguous(), tokens.contiguous())
    return TokenGroups(by_token(group), ends, by_token(means), by_token(shares))


register(
    "reduce_map(Tensor storage, SymInt n, Tensor order, Tensor starts, Tensor means,"
    " Tensor? shares) -> Tensor",
    _fake,
    _backward,
    _setup_context,
)
