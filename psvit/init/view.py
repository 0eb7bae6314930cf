"""A model as its initialisation sees it: projections of each layer, and where its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Layout
from ..pooling import GridPool
from ..stack import Stack
from ..token_map import Pool


@dataclass
class Places:
    """Where the patch tokens of a stage are, and what tells them apart.

    Args:
        grid: (h, w), row-major; (1, n) where the tokens were pooled as a sequence.
        embedding: their position embedding `(N, D)` as a layer's first norm makes it (LayerNorm
            without its factors), float64 on the CPU; None where there is none.
        missing: why there is none.
    """

    grid: tuple[int, int]
    embedding: Tensor | None
    missing: str = ""


@dataclass
class AttentionView:
    """The attention of one layer. Its tensors are views of the model's own parameters.

    Args:
        layer: counted from 0.
        donor: the layer whose map it applies; itself if it attends.
        heads, scale: number of heads, and factor of the scores.
        query, key: `(H d, D)`, None where a sharing layer has none that is used.
        query_bias, key_bias: `(H d,)`, None where there is none.
        value, output: `(H d, D)` and `(D, H d)`.
        places: of its stage.
    """

    layer: int
    donor: int
    heads: int
    scale: float
    query: Tensor | None
    key: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None
    value: Tensor
    output: Tensor
    places: Places

    @property
    def attends(self) -> bool:
        return self.donor == self.layer

    @property
    def width(self) -> int:
        return self.output.shape[0]

    @property
    def head_dim(self) -> int:
        return self.value.shape[0] // self.heads


def attention_views(model: nn.Module, pos_scale: float = 1.0) -> list[AttentionView]:
    """The layers of a model, with its position embedding taken ``pos_scale`` times.

    Raises:
        TypeError: a model that is neither timm's VisionTransformer nor made of psvit's blocks.
        ValueError: one whose maps don't follow from its position embedding and its weights.
    """
    position = _position_embedding(model)
    embed: Any = model.patch_embed
    h, w = embed.grid_size
    rows = position.detach().double().cpu()[0, position.shape[1] - h * w :] * pos_scale
    if not torch.isfinite(rows).all():
        raise ValueError("model: its pos_embed has values that are not finite")
    blocks: Any = model.blocks
    if not isinstance(blocks, Stack):
        places = Places((h, w), _normalised(rows))
        return [_view(layer, layer, block.attn, places) for layer, block in enumerate(blocks)]
    pools = [blocks.pool(i) for i in range(blocks.stages[-1])]
    stages = _stages(rows, Layout(blocks.prefix, (h, w)), pools)
    return [
        _view(layer, donor, blocks.block(layer).attention_layer, stages[stage])
        for layer, (donor, stage) in enumerate(zip(blocks.donors, blocks.stages, strict=True))
    ]


def _position_embedding(model: nn.Module) -> Tensor:
    from timm.models.vision_transformer import Block as TimmBlock

    name = type(model).__name__
    if getattr(model, "rope", None) is not None:
        raise ValueError(
            f"model: got {name} with rotary position embeddings, expected one that is added at "
            f"the input"
        )
    blocks = getattr(model, "blocks", None)
    known = isinstance(blocks, Stack) or (
        isinstance(blocks, nn.Sequential) and all(isinstance(b, TimmBlock) for b in blocks)
    )
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not known or grid is None:
        raise TypeError(
            f"model: got {name}, expected timm's VisionTransformer with its usual blocks, or a "
            f"PSViT model"
        )
    position = getattr(model, "pos_embed", None)
    if position is None:
        raise ValueError(
            f"model: got {name} without a position embedding (pos_embed), expected one: the maps "
            f"are made from it"
        )
    return position


def _stages(rows: Tensor, layout: Layout, pools: Sequence[Pool]) -> list[Places]:
    """The position embedding of each stage: it goes through the pools as the tokens do.

    That is what a pool makes of it only if the pool is linear (norms aside); after a maximum over
    tokens there is nothing that could be said without an image, and a pooled sequence has no grid.
    """
    stages = [Places(_sides(layout), _normalised(rows))]
    missing = ""
    for pool in pools:
        if not isinstance(pool, GridPool):
            missing = missing or "after a pool by content the tokens have no grid"
        elif getattr(pool, "stage_kind", pool.kind) == "max":  # of PSViT models: as a whole
            missing = missing or "after a max pool positions can't be told apart from content"
        elif pool.dims == 1:
            missing = missing or "after a pool of the sequence the tokens have no grid"
        if missing:
            layout = pool.reduced(layout)
            stages.append(Places(_sides(layout), None, missing))
            continue
        like = next(pool.parameters(), rows)
        beside = rows.new_zeros(layout.prefix, rows.shape[1])  # nothing of it gets to the patches
        with torch.no_grad():
            pooled, layout = pool.reduce(torch.cat([beside, rows]).to(like).unsqueeze(0), layout)
        rows = pooled[0, layout.prefix :].double().cpu()
        stages.append(Places(_sides(layout), _normalised(rows)))
    return stages


def _sides(layout: Layout) -> tuple[int, int]:
    h, w = layout.grid if len(layout.grid) == 2 else (1, layout.cells)
    return h, w


def _normalised(rows: Tensor) -> Tensor:
    return F.layer_norm(rows, rows.shape[1:])


def _view(layer: int, donor: int, attention: Any, places: Places) -> AttentionView:
    if not isinstance(getattr(attention, "qkv", None), nn.Linear):
        raise ValueError(
            f"model: layer {layer + 1} has {type(attention).__name__}, expected attention with one "
            f"projection qkv for queries, keys and values"
        )
    attends = donor == layer
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if attends and norm is not None and not isinstance(norm, nn.Identity):
            raise ValueError(
                f"model: layer {layer + 1} has {name} ({type(norm).__name__}), which undoes the "
                f"gain of queries and keys; expected a model without q/k norm"
            )
    inner = attention.proj.in_features
    weight, bias = attention.qkv.weight.detach(), attention.qkv.bias
    parts, biases = weight.split(inner), (None if bias is None else bias.detach().split(inner))
    return AttentionView(
        layer=layer,
        donor=donor,
        heads=attention.num_heads,
        scale=float(attention.scale),
        query=parts[0] if attends else None,
        key=parts[1] if attends else None,
        query_bias=biases[0] if attends and biases else None,
        key_bias=biases[1] if attends and biases else None,
        value=parts[-1],
        output=attention.proj.weight.detach(),
        places=places,
    )


def chosen_layers(views: Sequence[AttentionView], layers: Sequence[int] | None) -> list[int]:
    """The layers that a person chose, in order; all of them for None.

    Raises:
        ValueError: one that the model doesn't have.
    """
    if layers is None:
        return list(range(len(views)))
    for layer in layers:
        if not 0 <= layer < len(views):
            raise ValueError(
                f"layers: got {layer}, expected 0 to {len(views) - 1}: the model has "
                f"{len(views)} layers"
            )
    return sorted(set(layers))


def scale_position_embedding(model: nn.Module, factor: float) -> None:
    """In place, all rows, those of the prefix tokens too."""
    position: Any = model.pos_embed
    position.mul_(factor)
