"""Impulse initialisation: every head starts as one tap of a convolution."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .factors import Plan, draw, factors, plan_values, stacked, write, zero_biases
from .report import Report, is_uniform, report_of, smallest_grid
from .shifts import Offset, Offsets, check_offsets, head_offsets, shift_filter
from .view import AttentionView, attention_views, chosen_layers, scale_position_embedding

Method = Literal["closed_form", "gradient"]

#: Of the gradient method: steps, and their rate relative to the size of a weight.
GRADIENT_STEPS, GRADIENT_RATE = 300, 0.1

#: Where the search for a mass gives up.
LARGEST_GAIN = 1000.0


@torch.no_grad()
def impulse_init_(
    model: nn.Module,
    *,
    method: Method = "closed_form",
    kernel_size: int = 3,
    offsets: Offsets = "fixed",
    pos_scale: float = 18.0,
    gain: float = 7.0,
    target_mass: float | None = None,
    logit_scale: float = 1000.0,
    noise: float = 1.8,
    pinv_rank: int | Literal["head_dim", "full"] = "head_dim",
    init_vo: bool = True,
    zero_qk_bias: bool = False,
    layers: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Initialises attention so that each head looks at one neighbour of each token, in place.

    Only the position embedding (scaled), and in the chosen layers the weights of queries, keys,
    values and output change; biases only with ``zero_qk_bias``. An error changes nothing. All is
    computed in float64 on the CPU and rounded to the parameters' dtype.

    A layer that shares has no queries and keys of its own: its initial map is its donor's, and
    only its values and output are set. A position embedding exists at the input only; the stages
    after a pool get it as the pool makes it, with the pool's weights as they are. That is right
    where pools are linear (avg, stride, conv). After a max pool, or a pool of the sequence, which
    leaves no grid, layers stay as they are, and the report says so.

    Scaling the embedding helps by itself on small data: compare with a default model whose
    ``pos_embed`` is scaled too.

    Args:
        model: timm's VisionTransformer, converted by psvit or not, or a PSViT model.
        method: "closed_form", for an embedding like noise, as timm's is at its start; or
            "gradient", for sines and cosines: queries and keys by gradient descent on the squared
            difference of map and filter.
        kernel_size: side of the filter whose taps the heads are.
        offsets: "fixed", the taps in order, nearest first, the same in every layer; "random", drawn
            for each head; or (dy, dx) of each head, repeating.
        pos_scale: factor of the position embedding.
        gain: Frobenius norm of each head's query and key weights.
        target_mass: instead of ``gain``: the mean attention on its target that each head shall
            have, 0 to 1. Each head gets the norm that gives it.
        logit_scale, noise: score of the target, and standard deviation of the other scores, before
            the weights are brought to their norm (closed form).
        pinv_rank: number of singular values that the embedding's pseudo-inverse keeps (closed
            form); "head_dim" is as many as a head has dimensions.
        init_vo: whether values and output are initialised too, to about -0.4 I as a product.
        zero_qk_bias: whether the biases of queries and keys become zero.
        layers: counted from 0; None: all.
        generator: of all random numbers; equal ones give equal weights.

    Returns:
        The attention on the target in each layer and head.

    Raises:
        TypeError: another model.
        ValueError: q/k norm, rotary or missing position embedding, attention wider or narrower
            than the tokens with ``init_vo``, a mass that a head can't reach, or any other argument
            out of its range.

    Warns:
        UserWarning: heads with fewer dimensions than half of the tokens, whose maps are less
            sharp; fewer heads than taps.

    Source: arXiv 2505.19985 (closed form); arXiv 2404.01139, section 4 (gradient).
    """
    _check_numbers(method, pos_scale, gain, target_mass, logit_scale, noise, pinv_rank)
    views = attention_views(model, pos_scale)
    chosen = chosen_layers(views, layers)
    check_offsets(offsets, kernel_size, smallest_grid(views))
    placed = [layer for layer in chosen if views[layer].places.embedding is not None]
    attending = [layer for layer in placed if views[layer].attends]

    targets = {
        layer: head_offsets(offsets, kernel_size, views[layer].heads, generator)
        for layer in attending
    }
    plan: Plan = {}
    for layer, offsets_of_heads in targets.items():
        view = views[layer]
        if zero_qk_bias:
            view = dataclasses.replace(view, query_bias=None, key_bias=None)
        filters = [shift_filter(view.places.grid, offset) for offset in offsets_of_heads]
        if method == "closed_form":
            rank = _rank(pinv_rank, view)
            heads = _closed_form(view, filters, rank, logit_scale, noise, generator)
        else:
            heads = _by_gradient(view, filters, gain, generator)
        if target_mass is None:
            heads = [(_of_norm(query, gain), _of_norm(key, gain)) for query, key in heads]
        else:
            heads = [
                _with_mass(view, i, head, filters[i], target_mass) for i, head in enumerate(heads)
            ]
        plan[layer, "query"] = stacked([query for query, _ in heads])
        plan[layer, "key"] = stacked([key for _, key in heads])
    if init_vo:
        plan |= plan_values(views, placed, generator)

    taps = kernel_size**2 if isinstance(offsets, str) else len(offsets)
    for text in _doubts([views[layer] for layer in attending], taps):
        warnings.warn(text, stacklevel=3)  # 3: the caller, beyond the decorator
    if zero_qk_bias:
        zero_biases(views, attending)
    write(views, plan)
    scale_position_embedding(model, pos_scale)
    return _report(model, chosen, targets, method)


def _report(
    model: nn.Module, chosen: Sequence[int], targets: dict[int, tuple[Offset, ...]], method: str
) -> Report:
    views = attention_views(model)
    report = report_of(views, chosen, targets)
    remarks = list(report.remarks)
    if any(row.missing for row in report.rows):
        remarks.append("Those layers were left as they were.")
    if method == "closed_form" and any(is_uniform(views[row.layer], row) for row in report.rows):
        remarks.append(
            "The closed form needs a position embedding whose largest singular values are alike, "
            'as noise has; for sines and cosines use method="gradient".'
        )
    return dataclasses.replace(report, remarks=tuple(remarks))


# --- queries and keys -----------------------------------------------------------------------


def _closed_form(
    view: AttentionView,
    filters: Sequence[Tensor],
    rank: int,
    logit_scale: float,
    noise: float,
    generator: torch.Generator | None,
) -> list[tuple[Tensor, Tensor]]:
    """`(D, d)` each: the best product of P+ T P+^T, with P+ the pseudo-inverse of the embedding.

    P+ keeps ``rank`` singular values, P+ = W C with orthonormal columns of W `(D, r)`; so the SVD
    of the small C T C^T is that of the whole.
    """
    assert view.places.embedding is not None
    basis, inverse = _pseudo_inverse(view.places.embedding, rank)
    heads = []
    for target in filters:
        scores = noise * draw(torch.randn, tuple(target.shape), generator)
        scores = torch.where(target == 0, scores, logit_scale)
        queries, keys = factors(inverse @ scores @ inverse.T, view.head_dim)
        heads.append(_filled(basis @ queries, basis @ keys, view.head_dim, generator))
    return heads


def _pseudo_inverse(embedding: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W `(D, r)` and C `(r, N)`, r being at most the numerical rank of the `(N, D)` embedding."""
    left, values, right = torch.linalg.svd(embedding, full_matrices=False)
    smallest = values[0] * max(embedding.shape) * torch.finfo(values.dtype).eps
    rank = min(rank, int((values > smallest).sum()))
    if not rank:
        raise ValueError(
            "model: its pos_embed is the same everywhere, expected one that tells places apart"
        )
    return right[:rank].T, (left[:, :rank] / values[:rank]).T


def _filled(
    queries: Tensor, keys: Tensor, head_dim: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Columns for the dimensions of a head that the map has no use for (few tokens).

    Keys are zero there, so that the map stays; queries are noise, since where both are zero
    neither would ever get a gradient.
    """
    width, used = queries.shape
    if used == head_dim:
        return queries, keys
    spare = draw(torch.randn, (width, head_dim - used), generator)
    spare *= queries.norm() / math.sqrt(queries.numel())
    return torch.cat([queries, spare], 1), torch.cat([keys, torch.zeros_like(spare)], 1)


def _by_gradient(
    view: AttentionView, filters: Sequence[Tensor], gain: float, generator: torch.Generator | None
) -> list[tuple[Tensor, Tensor]]:
    """`(D, d)` each: from noise, by gradient descent on |softmax - filter|^2, the norms held.

    Adam as in the paper, whose 10,000 steps of 1e-4 are fewer and larger ones here, relative to the
    size of a weight.
    """
    places = view.places.embedding
    assert places is not None
    targets = torch.stack(list(filters))
    shape = (view.heads, places.shape[1], view.head_dim)
    weights = [_of_norm(draw(torch.randn, shape, generator), gain) for _ in range(2)]
    size = gain / math.sqrt(shape[1] * shape[2])
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        optimizer = torch.optim.Adam(weights, lr=GRADIENT_RATE * size)
        for _ in range(GRADIENT_STEPS):
            scores = (places @ weights[0]) @ (places @ weights[1]).transpose(1, 2)
            difference = (scores * view.scale).softmax(2) - targets
            optimizer.zero_grad()
            (difference.square() * targets.any(2, keepdim=True)).sum().backward()
            optimizer.step()
            for weight in weights:
                weight.data = _of_norm(weight.data, gain)
    return list(zip(*(weight.detach().unbind() for weight in weights), strict=True))


def _of_norm(weight: Tensor, norm: float) -> Tensor:
    """`(..., D, d)`, each matrix with this Frobenius norm."""
    return weight * (norm / torch.linalg.matrix_norm(weight, keepdim=True))


def _with_mass(
    view: AttentionView, head: int, weights: tuple[Tensor, Tensor], target: Tensor, mass: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys of the least norm that has this mean mass on the target, by bisection."""
    places = view.places.embedding
    assert places is not None
    query, key = (_of_norm(weight, 1.0) for weight in weights)
    biases = []
    for bias in (view.query_bias, view.key_bias):
        known = torch.zeros(view.heads * view.head_dim) if bias is None else bias
        biases.append(known.double().cpu().unflatten(0, (view.heads, -1))[head])
    inside = target.any(1)

    def reached(gain: float) -> float:
        scores = (gain * places @ query + biases[0]) @ (gain * places @ key + biases[1]).T
        found = (scores * view.scale).softmax(1) * target
        return float(found[inside].sum(1).mean())

    low, high = 0.0, 1.0
    while reached(high) < mass:
        low, high = high, 2 * high
        if high > LARGEST_GAIN:
            raise ValueError(
                f"target_mass: got {mass}, but head {head + 1} of layer {view.layer + 1} reaches "
                f"{reached(high):.3f} at most; expected less"
            )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < mass else (low, middle)
    return query * high, key * high


# --- arguments ------------------------------------------------------------------------------


def _rank(pinv_rank: int | str, view: AttentionView) -> int:
    if pinv_rank == "full":
        return view.width
    return view.head_dim if isinstance(pinv_rank, str) else pinv_rank


def _doubts(views: Sequence[AttentionView], taps: int) -> list[str]:
    """What a person should be warned of, each once."""
    texts = []
    for view in views:
        tokens = math.prod(view.places.grid)
        if view.head_dim < tokens / 2:
            texts.append(
                f"heads of {view.head_dim} dimensions for {tokens} tokens, fewer than half as "
                f"many: the maps will be less sharp"
            )
        if view.heads < taps:
            texts.append(
                f"{view.heads} heads in a layer for a filter of {taps} taps: not every tap has a "
                f"head"
            )
    return list(dict.fromkeys(texts))


def _check_numbers(
    method: str,
    pos_scale: float,
    gain: float,
    target_mass: float | None,
    logit_scale: float,
    noise: float,
    pinv_rank: int | str,
) -> None:
    if method not in ("closed_form", "gradient"):
        raise ValueError(f'method: got "{method}", expected "closed_form" or "gradient"')
    positive = {"pos_scale": pos_scale, "gain": gain, "logit_scale": logit_scale}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: got {noise}, expected a number from 0 up")
    if target_mass is not None and not 0 < target_mass < 1:
        raise ValueError(f"target_mass: got {target_mass}, expected between 0 and 1")
    whole = isinstance(pinv_rank, int) and pinv_rank >= 1
    if not whole and pinv_rank not in ("head_dim", "full"):
        raise ValueError(
            f'pinv_rank: got {pinv_rank!r}, expected "head_dim", "full" or a number from 1 up'
        )
