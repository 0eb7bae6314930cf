"""Merging tokens: which join which, and their means, against plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from psvit_kernels import match_tokens, merge_tokens

from .cases import Bar, Case, Work

PLAIN = "plain PyTorch"


def plain_merge(x: Tensor, keys: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Token Merging with a class token, as the paper describes it, on whole tensors.

    Args:
        x: tokens, `(B, N, C)`.
        keys: of the attention, `(B, H, N, d)`.
        sizes: how many tokens each one stands for, `(B, N)`.
        r: pairs to merge.
    """
    unit = F.normalize(keys.mean(1), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token stays
    best, partner = scores.max(2)
    ranked = best.argsort(dim=1, descending=True)
    joins, stays = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    partner = partner.gather(1, joins)

    def summed(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        wide = (-1, -1, t.shape[2])
        moved, kept = (even.gather(1, at.unsqueeze(2).expand(wide)) for at in (joins, stays))
        odd = odd.scatter_add(1, partner.unsqueeze(2).expand(wide), moved)
        return torch.cat([kept, odd], 1)

    weights = sizes.unsqueeze(2)
    merged = summed(weights)
    return summed(x * weights) / merged, merged.squeeze(2)


def merge_case(
    dtype: torch.dtype, batch: int = 8, tokens: int = 197, heads: int = 6, depth: int = 64
) -> Case:
    """Matching by the keys of a fused projection, and merging with sizes, at r = 13."""
    r, width = 13, heads * depth

    def build() -> Work:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
        qkv = torch.randn(batch, tokens, 3, heads, depth, generator=generator).to(dtype)
        keys = qkv.permute(2, 0, 3, 1, 4)[1]
        sizes = 1 + torch.randint(3, (batch, tokens), generator=generator).to(dtype)

        def fused(x: Tensor, keys: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
            merged = merge_tokens(x, match_tokens(keys, r, prefix=1), sizes)
            return merged.tokens, merged.sizes

        scores = tokens // 2 * (tokens // 2) * depth
        left = batch * (tokens - r) * width
        return Work(
            psvit=lambda: fused(x, keys, sizes),
            baselines={PLAIN: lambda: plain_merge(x, keys, sizes, r)},
            exact=lambda: plain_merge(x.double(), keys.double(), sizes.double(), r),
            eager=lambda: plain_merge(x, keys, sizes, r),
            flops=2.0 * batch * scores,
            nbytes=float((keys.numel() + x.numel() + left) * x.element_size()),
        )

    bars = {PLAIN: Bar(4.0) if dtype == torch.float32 else Bar()}
    name = f"merge/{batch}x{tokens}x{width}/{str(dtype).removeprefix('torch.')}"
    return Case(name, dtype, bars, build)
