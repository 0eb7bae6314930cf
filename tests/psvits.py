"""Small PSViTs with random weights, presets without any, and what they compute written out."""

from __future__ import annotations

import hosts
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("timm")

import psvit
from psvit.models.pool import StagePool

SCHEDULE = "AAS|ASA|AS"
WIDTHS = (16, 24, 40)
DIMS = pytest.mark.parametrize("dims", [1, 2])


def small(schedule: str = SCHEDULE, widths=WIDTHS, **options) -> psvit.PSViT:
    """On a grid of 8 x 8, every weight random."""
    sizes = dict(img_size=32, patch_size=4, head_dim=8, num_classes=5)
    return hosts.randomised(psvit.PSViT(schedule, widths, **(sizes | options)))


def preset(name: str, **options) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        return psvit.create_model(name, **options).eval()


def plain(model: psvit.PSViT, x: Tensor) -> Tensor:
    """A PSViT with convolutional pools from its weights alone, in PyTorch's own functions."""
    one_d = model.has_class_token
    patch = model.patch_embed.proj
    image = F.conv2d(x, patch.weight, patch.bias, patch.stride)
    h, w = image.shape[-2:]
    x = image.flatten(2).transpose(1, 2)
    if one_d:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    x = x + model.pos_embed
    layer = pools = 0
    for character in str(model.schedule):
        if character == "|":
            pool = model.blocks.pools[pools]
            x, (h, w) = _plain_pool(pool, x, (h, w))
            pools += 1
            continue
        block = model.blocks[layer]
        layer += 1
        y = block.norm1(x)
        fused = block.attn.qkv(y)
        heads = block.attn.num_heads
        parts = [p.unflatten(2, (heads, -1)).transpose(1, 2) for p in fused.split(x.shape[2], 2)]
        if character == "A":
            probabilities = (parts[0] @ parts[1].mT * parts[0].shape[-1] ** -0.5).softmax(-1)
        x = x + block.attn.proj((probabilities @ parts[-1]).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    if one_d:
        return model.head(model.norm(x)[:, 0])
    return model.head(model.fc_norm(x.mean(1)))


def _plain_pool(pool: StagePool, x: Tensor, grid: tuple[int, int]):
    x = x.transpose(1, 2)
    conv = pool.conv
    if pool.dims == 1:
        x = F.max_pool1d(F.conv1d(x, conv.weight, conv.bias, 1, 1), 3, 2, 1)
    else:
        x = F.conv2d(x.unflatten(2, grid), conv.weight, conv.bias, 2, 1)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2)
    return pool.norm(x.transpose(1, 2)), grid
