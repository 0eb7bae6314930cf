"""Weights from products: what is wanted is a product of two weights, and its SVD gives the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .view import AttentionView

#: New values by the layer's number and the name of the tensor in its ``AttentionView``.
Plan = dict[tuple[int, str], Tensor]


def factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L and R with L R^T the nearest product of this rank, `(D, rank)` each, equally long."""
    left, values, right = torch.linalg.svd(product)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].T * root


def value_and_output(width: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Weights of value and output whose product is B^T, `(D, D)` float64 each.

    B = 0.4 U - 0.4 I with U uniform, of mean 0 and variance 1/D.

    Source: arXiv 2305.09828 (mimetic initialisation), as arXiv 2505.19985 uses it.
    """
    uniform = (2 * draw(torch.rand, (width, width), generator) - 1) * (3 / width) ** 0.5
    left, right = factors(0.4 * uniform - 0.4 * torch.eye(width, dtype=torch.float64), width)
    return left.T, right


def draw(distribution: object, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """``torch.rand`` or ``torch.randn`` in float64, on the CPU whatever the generator's device."""
    device = "cpu" if generator is None else generator.device
    drawn = distribution(shape, dtype=torch.float64, device=device, generator=generator)  # type: ignore[operator]
    return drawn.cpu()


def plan_values(
    views: Sequence[AttentionView], layers: Sequence[int], generator: torch.Generator | None
) -> Plan:
    """Values and output of these layers.

    Raises:
        ValueError: a layer whose heads together are wider or narrower than its tokens.
    """
    plan: Plan = {}
    for layer in layers:
        view = views[layer]
        inner = view.value.shape[0]
        if inner != view.width:
            raise ValueError(
                f"init_vo: got True for layer {layer + 1}, whose attention is {inner} wide with "
                f"tokens of {view.width}; expected equal widths, or init_vo=False"
            )
        plan[layer, "value"], plan[layer, "output"] = value_and_output(view.width, generator)
    return plan


def write(views: Sequence[AttentionView], plan: Mapping[tuple[int, str], Tensor]) -> None:
    """Into the model's own parameters, in their dtype and on their device."""
    for (layer, name), tensor in plan.items():
        getattr(views[layer], name).copy_(tensor)


def zero_biases(views: Sequence[AttentionView], layers: Sequence[int]) -> None:
    """Those of queries and keys."""
    for layer in layers:
        for bias in (views[layer].query_bias, views[layer].key_bias):
            if bias is not None:
                bias.zero_()


def stacked(heads: Sequence[Tensor]) -> Tensor:
    """Weights `(H d, D)` of a linear layer, from one `(D, d)` matrix a head."""
    return torch.cat([head.T for head in heads])
