"""What a model costs under a schedule: FLOPs and parameters, layer by layer, from formulas.

A multiply-add counts as 2; as in ``torch.utils.flop_counter`` only products count. With N tokens,
width C and H d = D: a linear layer costs 2 N times the elements of its weight, Q K^T and P V cost
2 N^2 D each; a layer that shares has neither Q, K nor Q K^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from . import adapters
from .layout import Layout
from .merging import merge_counts, tokens_left
from .pooling import GridPool, Kind
from .schedule import Schedule
from .stack import Stack
from .token_map import Pool


class LayerCost(NamedTuple):
    """One row: the patch embedding, a layer (with the pool before it), or all the rest.

    Args:
        name: "embedding", the number of the layer counted from 1, or "rest".
        kind: "A", "S", or "" for what is no layer.
        tokens: that it works on, for one image, before it merges some; 1 for the rest, which sees
            the class token or the mean of the others.
        flops: of one image.
        params: that take part.
    """

    name: str
    kind: str
    tokens: int
    flops: int
    params: int


def layer_costs(
    model: nn.Module,
    schedule: str | Schedule,
    *,
    pool: Kind = "max",
    dims: Literal[1, 2] = 2,
    merge: int | Sequence[int] = 0,
) -> list[LayerCost]:
    """What each part of a model costs for one image of the size that the model is set up for.

    Args:
        model: converted or not; one that ``accelerate`` knows.
        schedule: what it shall run under, whatever it runs under now. If that is the schedule the
            model has, its own pools are taken, and its method of slimming.
        pool, dims, merge: as for ``accelerate``; finding what to merge or to keep isn't counted.

    Raises:
        ValueError: as ``accelerate``.
    """
    encoder = adapters.find(model)
    schedule = Schedule.parse(schedule, depth=len(encoder.layers), carried=True)
    pools = _pools(encoder, schedule, pool, dims)
    layout = Layout(encoder.prefix, tuple(encoder.grid))
    convolution = encoder.convolution
    weights = sum(p.numel() for p in convolution.parameters())
    flops = 2 * layout.cells * convolution.weight.numel()
    rows = [LayerCost("embedding", "", layout.tokens, flops, weights)]
    slimmed = _slimmed(encoder, schedule)
    counts, gone = merge_counts(merge, schedule), 0
    for i, layer in enumerate(encoder.layers.values()):
        flops = params = 0
        if i in schedule.pools:
            before = pools[schedule.pools.index(i)]
            params += sum(p.numel() for p in before.parameters())
            flops += before.flops(layout)
            layout = before.reduced(layout)
        kind, tokens = schedule.kinds[i], layout.tokens - gone
        (left,) = tokens_left(tokens, encoder.prefix, counts[i : i + 1])
        gone += tokens - left
        if slimmed is not None:
            tokens, left, after = slimmed[i]
            gone = layout.tokens - after
        layer_flops, layer_params = _layer(layer, encoder.names.attention, kind, tokens, left)
        rows.append(LayerCost(str(i + 1), kind, tokens, flops + layer_flops, params + layer_params))
    rows.append(_rest(model, encoder, layout.tokens - gone))
    return rows


def _slimmed(encoder: adapters.Encoder, schedule: Schedule) -> list[list[int]] | None:
    """Tokens of each layer's attention, of its MLP and after it, if a method chooses them."""
    stack = encoder.container
    if not isinstance(stack, Stack) or stack.slimming is None or stack.schedule != schedule:
        return None
    h, w = encoder.grid
    counts = stack.slimming.counts(h * w, schedule.depth)
    return [[encoder.prefix + patches for patches in layer] for layer in counts]


def _pools(
    encoder: adapters.Encoder, schedule: Schedule, kind: Kind, dims: Literal[1, 2]
) -> Sequence[Pool]:
    stack = encoder.container
    if isinstance(stack, Stack) and stack.schedule == schedule:
        return [stack.pool(i) for i in range(len(schedule.pools))]
    width = encoder.convolution.out_channels
    return [GridPool(kind, dims=dims, width=width) for _ in schedule.pools]


#: Parameters with Q, K and V in equal parts, and those of Q and K alone.
_FUSED = ("qkv.weight", "qkv.bias", "in_proj_weight", "in_proj_bias")
_QUERY_KEY = ("q_proj.", "k_proj.", "q_norm.", "k_norm.")


def _layer(layer: nn.Module, attention: str, kind: str, tokens: int, left: int) -> tuple[int, int]:
    """FLOPs and parameters; each parameter with two dimensions is the weight of a linear layer.

    What isn't the attention gets the tokens that are left when some have been merged.
    """
    host = getattr(layer, attention)
    stripped = getattr(host, "stripped", False)
    flops = params = width = 0
    for name, parameter in layer.named_parameters():
        count = parameter.numel()
        part = name.removeprefix(f"{attention}.") if name.startswith(f"{attention}.") else ""
        if part in _FUSED:
            count = count if stripped else count // 3
            width = count // parameter.shape[-1] if parameter.dim() == 2 else width
            count *= 1 if kind == "S" else 3
        elif part.startswith(_QUERY_KEY) and kind == "S":
            continue
        if part == "v_proj.weight":
            width = parameter.shape[0]
        params += count
        rows = tokens if part else left
        flops += 2 * rows * count if parameter.dim() == 2 else 0
    products = 2 if kind == "A" else 1
    return flops + products * 2 * tokens**2 * width, params


def _rest(model: nn.Module, encoder: adapters.Encoder, tokens: int) -> LayerCost:
    """Linear layers outside the encoder see one token, but for those the adapter names."""
    root = encoder.host if hasattr(model, "text_model") else model
    inside = {id(m) for m in (*encoder.container.modules(), *encoder.convolution.modules())}
    flops = 0
    for module, cost in encoder.heads:
        flops += cost(tokens)
        inside |= {id(m) for m in module.modules()}
    for module in root.modules():
        if isinstance(module, nn.Linear) and id(module) not in inside:
            flops += 2 * module.weight.numel()
    counted = (*encoder.container.parameters(), *encoder.convolution.parameters())
    params = {id(p): p.numel() for p in root.parameters()}
    for parameter in counted:
        params.pop(id(parameter), None)
    return LayerCost("rest", "", 1, flops, sum(params.values()))
