"""``merge_tokens``: weighted means of tokens, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import added, norm_backward, wide


def _sums(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Of the rows (B, N, C) of each merged token their sum, (B, M, C)."""
    b, n, c = rows.shape
    sorted_rows = rows.gather(1, order.unsqueeze(2).expand(b, n, c))
    lengths = starts.diff(append=starts.new_full((b, 1), n)).flatten()  # the last are dropped
    sums = torch.segment_reduce(sorted_rows.flatten(0, 1), "sum", lengths=lengths, axis=0)
    return sums.unflatten(0, (b, -1))[:, :-1]


def _weights(weights: Tensor | None, x: Tensor) -> Tensor:
    return wide(x).new_ones(x.shape[:2]) if weights is None else weights.to(wide(x).dtype)


def _merged(
    x: Tensor, residual: Tensor | None, order: Tensor, starts: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted means, and the sums of the weights."""
    w = _weights(weights, x).unsqueeze(2)
    sizes = _sums(w, order, starts)
    return _sums(w * added(x, residual), order, starts) / sizes, sizes.squeeze(2).contiguous()


def merge_tokens(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_m = sum w_n x_n / sum w_n over the tokens n that become m; the sums of w; LayerNorm(y)."""
    tokens, sizes = _merged(x, residual, order, starts, weights)
    normed = x.new_empty(0)
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(tokens.dtype)
        shape = tokens.shape[-1:]
        normed = F.layer_norm(tokens, shape, norm_weight.to(tokens.dtype), bias, norm_eps)
    return tokens.to(x.dtype), sizes, normed.to(x.dtype)


def merge_tokens_backward(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    sizes: Tensor,
    grad_tokens: Tensor | None,
    grad_sizes: Tensor | None,
    grad_normed: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx_n = w_n / s_m dy_m and dw_n = (x_n - y_m) dy_m / s_m + ds_m, where n becomes m.

    Gradients of x (the residual's is the same), weights, norm_weight, norm_bias; an empty tensor
    for what is absent or not asked for.
    """
    tokens, _ = _merged(x, residual, order, starts, weights)
    g = torch.zeros_like(tokens) if grad_tokens is None else wide(grad_tokens)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        dnormed = torch.zeros_like(tokens) if grad_normed is None else wide(grad_normed)
        through, dnorm_weight, dnorm_bias = norm_backward(
            dnormed, tokens, norm_weight, norm_bias, norm_eps
        )
        g = g + through
    kept, at = into >= 0, into.clamp(min=0)

    def of_input(t: Tensor) -> Tensor:
        """What belongs to the merged token that each token becomes a part of."""
        return t.gather(1, at.unsqueeze(2).expand(*at.shape, t.shape[2]))

    size, g = of_input(sizes.unsqueeze(2)), of_input(g)
    share = torch.where(kept, _weights(weights, x), 0).unsqueeze(2) / size
    dx = torch.where(kept.unsqueeze(2), share * g, 0)
    dweights = None
    if need_weights:
        dweights = ((added(x, residual) - of_input(tokens)) * g / size).sum(2)
        if grad_sizes is not None:
            dweights = dweights + of_input(wide(grad_sizes).unsqueeze(2)).squeeze(2)
        dweights = torch.where(kept, dweights, 0)
    found = (dx, dweights, dnorm_weight, dnorm_bias)
    inputs = (x, weights, norm_weight, norm_bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if t is None or d is None else d.to(t.dtype).contiguous()
        for d, t in zip(found, inputs, strict=True)
    )
