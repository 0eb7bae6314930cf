"""Merging of similar tokens in a trained model, between a layer's attention and its MLP."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psvit_kernels import match_tokens, merge_tokens

from .schedule import Schedule


class Merged(NamedTuple):
    """What the tokens of a batch are, once some were merged.

    Args:
        sizes: how many tokens each one stands for, `(B, M)`.
        into: for each token that the first of the layers got, the one it is a part of now; int64
            `(B, N)`.
    """

    sizes: Tensor
    into: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Merged:
        """Tokens `(B, N, C)` that are what they were."""
        b, n, _ = x.shape
        itself = torch.arange(n, device=x.device).repeat(b, 1)
        return cls(torch.ones(b, n, device=x.device), itself)

    def upsample(self, y: Tensor, prefix: int) -> Tensor:
        """What belongs to merged patches, at the places of the patches: `(B, M - prefix, C)` to
        `(B, N - prefix, C)`, each a copy of that of the token it is a part of."""
        into = self.into[:, prefix:, None] - prefix
        return y.gather(1, into.expand(-1, -1, y.shape[2]))

    def bias(self, like: Tensor) -> Tensor:
        """The log of the sizes, to add to the scores of keys, `(B, 1, 1, M)`.

        Source: Token Merging, arXiv 2210.09461, section 3 (proportional attention).
        """
        return self.sizes.log().to(like.dtype)[:, None, None, :]


def add_and_merge(
    x: Tensor,
    branch: Tensor,
    norm: nn.Module,
    keys: Tensor,
    r: int,
    prefix: int,
    before: Merged | None,
) -> tuple[Tensor, Tensor, Merged]:
    """x + branch with r pairs of tokens merged, what the norm makes of that, and what they are.

    Args:
        x, branch: `(B, N, C)`.
        norm: of the MLP; a LayerNorm without hooks is part of the same pass.
        keys: of the attention, `(B, H, N, d)`: tokens whose keys are alike are merged.
        r: pairs.
        prefix: tokens that stay as they are.
        before: what the N tokens are; None: themselves.

    Source: Token Merging, arXiv 2210.09461, section 3.
    """
    match = match_tokens(keys, r, prefix=prefix)
    weights = None if before is None else before.sizes
    branch = branch.to(x.dtype)  # of another one under autocast
    hooked = bool(norm._forward_hooks or norm._forward_pre_hooks)  # those are somebody's
    if isinstance(norm, nn.LayerNorm) and not hooked:
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        tokens, sizes, normed = merge_tokens(
            x, match, weights, residual=branch, norm_weight=weight, norm_bias=bias, norm_eps=eps
        )
    else:
        tokens, sizes, normed = merge_tokens(x, match, weights, residual=branch)
    into = match.into if before is None else match.into.gather(1, before.into)
    return tokens, norm(tokens) if normed is None else normed, Merged(sizes, into)


def merge_counts(merge: int | Sequence[int], schedule: Schedule) -> tuple[int, ...]:
    """Pairs to merge in each layer.

    One number goes to every layer where tokens may be merged: after the last pool, which needs a
    grid, and after the last layer with the same map, whose tokens are those of the map.

    Raises:
        ValueError: a negative number, another number of layers, or tokens that are merged where
            they may not be; the message names the layer, counted from 1.
        TypeError: not integers.
    """
    first = schedule.pools[-1] if schedule.pools else 0
    last = {group[-1] for group in schedule.groups}
    if isinstance(merge, numbers.Integral):
        each = int(merge)
        counts = [each if i >= first and i in last else 0 for i in range(schedule.depth)]
    else:
        counts = _integers(merge)
    if len(counts) != schedule.depth:
        raise ValueError(f"merge: got {len(counts)} numbers, expected {schedule.depth} as layers")
    for i, r in enumerate(counts):
        if r < 0:
            raise ValueError(f"merge: got {r} in layer {i + 1}, expected 0 or more")
        if r and i < first:
            raise ValueError(
                f"merge: got {r} in layer {i + 1}, expected 0 before the pool in front of layer "
                f"{first + 1}: merged tokens have no grid"
            )
        if r and i not in last:
            raise ValueError(
                f"merge: got {r} in layer {i + 1}, expected 0: layer {i + 2} shares its map, which "
                f"is of the tokens before"
            )
    return tuple(counts)


def tokens_left(tokens: int, prefix: int, counts: Sequence[int]) -> list[int]:
    """How many tokens each layer's MLP gets: at most half of those after the prefix can go."""
    found = []
    for r in counts:
        tokens -= min(r, (tokens - prefix) // 2)
        found.append(tokens)
    return found


def _integers(merge: object) -> list[int]:
    if not isinstance(merge, Sequence) or not all(isinstance(r, numbers.Integral) for r in merge):
        raise TypeError(f"merge: got {merge!r}, expected an integer or one for each layer")
    return [int(r) for r in merge]
