"""The peer of impulse initialisation, and the control that has its norms alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .factors import Plan, draw, factors, plan_values, stacked, write, zero_biases
from .report import Report, measure, report_of
from .shifts import NEAREST
from .view import AttentionView, attention_views, chosen_layers, scale_position_embedding


@torch.no_grad()
def mimetic_init_(
    model: nn.Module,
    *,
    pos_scale: float = 1.0,
    init_vo: bool = True,
    zero_qk_bias: bool = False,
    layers: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Initialises attention as trained models have it: queries look at equal keys, in place.

    In each head, query and key weights are the factors of 0.7 Z + 0.7 I, cut to the head's
    dimensions, with Z normal of variance 1/D; values and output as ``impulse_init_`` has them. It
    asks nothing of the position embedding and sets every layer, after any pool. What changes
    otherwise, what sharing layers start with, and all arguments are as in ``impulse_init_``.

    Args:
        pos_scale: factor of the position embedding; 18 for a fair comparison with
            ``impulse_init_``.

    Returns:
        The attention of each token on itself, which is what is wanted here.

    Raises:
        TypeError, ValueError: as ``impulse_init_``.

    Source: arXiv 2305.09828, section 3.
    """
    if not (math.isfinite(pos_scale) and pos_scale > 0):
        raise ValueError(f"pos_scale: got {pos_scale}, expected a number above 0")
    views = attention_views(model)
    chosen = chosen_layers(views, layers)
    attending = [layer for layer in chosen if views[layer].attends]
    plan: Plan = {}
    for layer in attending:
        view = views[layer]
        heads = [_near_identity(view.width, view.head_dim, generator) for _ in range(view.heads)]
        plan[layer, "query"] = stacked([query for query, _ in heads])
        plan[layer, "key"] = stacked([key for _, key in heads])
    if init_vo:
        plan |= plan_values(views, chosen, generator)
    if zero_qk_bias:
        zero_biases(views, attending)
    write(views, plan)
    scale_position_embedding(model, pos_scale)
    views = attention_views(model)
    return report_of(views, chosen, {i: NEAREST[:1] * views[i].heads for i in attending})


def _near_identity(
    width: int, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    normal = draw(torch.randn, (width, width), generator) / math.sqrt(width)
    return factors(0.7 * normal + 0.7 * torch.eye(width, dtype=torch.float64), rank)


@torch.no_grad()
def norm_match_(
    model: nn.Module, reference: nn.Module, *, layers: Sequence[int] | None = None
) -> Report:
    """Gives a model the norms that another has, and keeps its own directions, in place.

    The control of any initialisation: what a default model gains from it would have come from the
    size of weights alone. Frobenius norms are matched of the position embedding, of each head's
    query and key weights, and of value and output weights as wholes.

    Args:
        model: what changes.
        reference: an initialised model of the same architecture.
        layers: counted from 0; None: all.

    Returns:
        The attention on the targets of ``impulse_init_``'s default, for comparison.

    Raises:
        TypeError: a model that ``impulse_init_`` doesn't know.
        ValueError: another architecture, or weights that are all zero and have no direction.
    """
    views, others = attention_views(model), attention_views(reference)
    chosen = chosen_layers(views, layers)
    _check_alike(views, others)
    plan: Plan = {}
    for layer in chosen:
        for name in ("query", "key", "value", "output"):
            own, wanted = getattr(views[layer], name), getattr(others[layer], name)
            if own is not None:
                heads = views[layer].heads if name in ("query", "key") else 1
                plan[layer, name] = _matched(own, wanted, heads, f"{name} of layer {layer + 1}")
    position = _matched(model.pos_embed, reference.pos_embed, 1, "pos_embed")  # type: ignore[arg-type]
    write(views, plan)
    model.pos_embed.copy_(position)  # type: ignore[operator,union-attr]
    return measure(model)


def _matched(own: Tensor, wanted: Tensor, heads: int, name: str) -> Tensor:
    parts = own.double().cpu().reshape(heads, -1)
    norms = wanted.double().cpu().reshape(heads, -1).norm(dim=1, keepdim=True)
    sizes = parts.norm(dim=1, keepdim=True)
    if not sizes.all():
        raise ValueError(f"model: {name} is all zero, expected weights with a direction")
    return (parts * (norms / sizes)).reshape(own.shape)


def _check_alike(views: Sequence[AttentionView], others: Sequence[AttentionView]) -> None:
    def shapes(every: Sequence[AttentionView]) -> list[tuple]:
        return [(v.donor, v.heads, tuple(v.value.shape), v.places.grid) for v in every]

    if shapes(views) != shapes(others):
        raise ValueError(
            "reference: got another depth, width, number of heads, grid or schedule than the "
            "model's, expected the same"
        )
