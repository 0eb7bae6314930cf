"""What an operation does to its result before it is stored, with the derivatives.

The formulas that the reference and the providers share unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """The dtype of accumulation: float64 for float64, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def added(x: Tensor, residual: Tensor | None) -> Tensor:
    """Their sum, wide."""
    return wide(x) if residual is None else wide(x) + wide(residual)


def _per_head(correction: Tensor) -> tuple[Tensor, ...]:
    """alpha, beta, gamma, each (H, 1, 1)."""
    return wide(correction)[:, :, None, None].unbind(1)


def corrected(out: Tensor, v: Tensor, correction: Tensor) -> Tensor:
    """alpha (P V) + beta V + gamma mean(V), three scalars a head; all (B, H, M, d), wide."""
    alpha, beta, gamma = _per_head(correction)
    return alpha * out + beta * v + gamma * v.mean(2, keepdim=True)


def correction_backward(
    g: Tensor, out: Tensor, v: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``corrected`` with respect to P V, to V itself, and to the scalars (H, 3)."""
    alpha, beta, gamma = _per_head(correction)
    mean = v.mean(2, keepdim=True)
    dv = beta * g + gamma * g.sum(2, keepdim=True) / v.shape[2]
    dcorrection = torch.stack([(g * t).sum((0, 2, 3)) for t in (out, v, mean)], dim=1)
    return alpha * g, dv, dcorrection.to(correction.dtype)


def norm_backward(
    g: Tensor, pooled: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of LayerNorm(pooled) with respect to pooled, weight and bias; all wide."""
    aten = torch.ops.aten
    weight = norm_weight.to(pooled.dtype)
    bias = None if norm_bias is None else norm_bias.to(pooled.dtype)
    shape = list(pooled.shape[-1:])
    _, mean, rstd = aten.native_layer_norm(pooled, shape, weight, bias, eps)
    wanted = [True, True, bias is not None]
    return aten.native_layer_norm_backward(
        g.contiguous(), pooled, shape, mean, rstd, weight, bias, wanted
    )


def merge_gradient(
    merge: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    residual: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    grad_tokens: Tensor | None,
    grad_normed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What comes back to merged tokens, themselves and through LayerNorm: `(B, M, C)`, dtype of x.

    And the gradients of the norm's weight and bias, empty where they are absent. ``merge`` is the
    provider's operation: the tokens are merged again, in float32.
    """
    dnorm = [x.new_empty(0) for _ in range(2)]  # no two may be one tensor
    g = grad_tokens
    if norm_weight is not None:
        total = x.float() if residual is None else x.float() + residual
        tokens, _, _ = merge(total, None, *tables, weights, None, None, 0.0)
        dnormed = torch.zeros_like(tokens) if grad_normed is None else grad_normed.float()
        through, *found = norm_backward(dnormed, tokens, norm_weight, norm_bias, norm_eps)
        g = through if g is None else through + g
        for i, (t, d) in enumerate(zip((norm_weight, norm_bias), found, strict=True)):
            if t is not None and d is not None:
                dnorm[i] = d.to(t.dtype)
    if g is None:
        g = x.new_zeros(len(x), tables[2].shape[1] - 1, x.shape[2])
    return g.to(x.dtype).contiguous(), dnorm[0], dnorm[1]
