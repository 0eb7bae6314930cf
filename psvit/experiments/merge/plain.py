"""Token Merging in plain PyTorch: what ours is compared with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...bench.merging import plain_merge


class Plain(nn.Module):
    """timm's ViT with a class token, Token Merging written in plain PyTorch.

    Better than usual: what size there is goes as a mask to PyTorch's fused attention.

    Args:
        model: timm's, plain: no layer scale, no norm of queries and keys.
        r: pairs that every layer merges.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, images: Tensor) -> Tensor:
        """Class scores `(B, classes)`."""
        model: Any = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes, mask = x.new_ones(x.shape[:2]), None
        for block in model.blocks:
            attn = block.attn
            fused = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1))
            q, k, v = fused.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attn.proj(out.transpose(1, 2).flatten(2))
            x, sizes = plain_merge(x, k, sizes, min(self.r, (x.shape[1] - 1) // 2))
            mask = sizes.log()[:, None, None]
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))
