"""``attention``: its output, the map that somebody wants to keep, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codes
from ..epilogue import wide
from ..maps import padded_codes, row_pitch
from .scores import heads_last, probabilities, score_gradients, scores_of


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dense_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """O = P V with P = softmax(scale Q K^T + bias); P itself if asked for; log-sum-exp of rows."""
    scores = scores_of(q, k, bias, scale)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.softmax(scores, dim=-1)
    out = heads_last(p @ wide(v), q.dtype)
    if not dense_map:
        return out, q.new_empty(0), lse
    n = k.shape[2]
    return out, F.pad(p.to(q.dtype), (0, row_pitch(n, q.element_size()) - n)), lse


def attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, code: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``attention``, whose output stays exact, and P in 8 bits with a scale per row."""
    scores = scores_of(q, k, bias, scale)
    out, _, lse = attention(q, k, v, bias, scale, False)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    coded, row_scale = padded_codes(codes.encode(e, code))
    return out, coded, torch.where(lse.isfinite(), row_scale, torch.nan), lse


def attention_backward(
    grad_out: Tensor,
    grad_map: Tensor | None,
    grad_lse: Tensor | None,
    group_grads: list[Tensor],
    group_values: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    map_storage: Tensor,
    lse: Tensor,
    out: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS = P (dP - rowsum(P dP) + sum_l dO_l V_l^T + dlse); then dQ, dK, dV, dbias.

    dP = dO V^T + the map's own gradient. What the layers that share the map sent back, (dO_l, V_l)
    and their part of the gradient of the log-sum-exp, comes in the lists and in ``grad_lse``.
    ``grad_out`` is (B, M, H, d), as the op returned it; ``grad_map`` is in the map's storage.
    """
    n = k.shape[2]
    p = probabilities(q, k, bias, scale, lse)
    if map_storage.numel():
        p = wide(map_storage[..., :n])
    g = wide(grad_out).transpose(1, 2)
    dp = g @ wide(v).transpose(-1, -2)
    if grad_map is not None:
        dp = dp + wide(grad_map[..., :n])
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    for group_grad, values in zip(group_grads, group_values, strict=True):
        ds = ds + p * (wide(group_grad).transpose(1, 2) @ wide(values).transpose(-1, -2))
    if grad_lse is not None:
        ds = ds + p * grad_lse.unsqueeze(-1)
    dq, dk = score_gradients(ds, q, k, scale)
    dv = p.transpose(-1, -2) @ g
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias
