"""``TokenMap``: fewer tokens from many, and back; ``IndexMap``, the one that an image decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from psvit_kernels import TokenGroups, TokenMatch, merge_tokens

from .layout import Layout


class TokenMap(ABC):
    """A map from N tokens to M, for all channels the same.

    Forms: ``GridPool`` (a regular grid), ``IndexMap`` (each token becomes a part of one), and
    ``QueryPool`` (soft weights, learned).
    """

    @abstractmethod
    def reduce(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """`(B, N, C)` to `(B, M, C)`, N tokens being as ``layout`` says; and what the M are."""

    @abstractmethod
    def expand(self, y: Tensor, layout: Layout) -> Tensor:
        """`(B, M, C)` to `(B, N, C)`: the adjoint of ``reduce``, or what a method has instead."""


class Pool(nn.Module, TokenMap):
    """A token map that is a module, and leaves as many tokens of any image: between two layers."""

    @abstractmethod
    def reduced(self, layout: Layout) -> Layout:
        """What the tokens are once they were pooled."""

    @abstractmethod
    def flops(self, layout: Layout) -> int:
        """Of the products of pooling one image, a multiply-add counted as 2."""


class IndexMap(TokenMap):
    """Each output token is a weighted mean of the tokens assigned to it; each input belongs to one.

    Args:
        match: which tokens become which; none is dropped.
        weights: of the tokens, `(B, N)`; None: all 1.

    Source: Token Merging, arXiv 2210.09461, section 3.
    """

    def __init__(self, match: TokenMatch, weights: Tensor | None = None) -> None:
        self.match = match
        self.weights = weights

    def reduce(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        merged = merge_tokens(x, self.match, self.weights)
        return merged.tokens, layout.merged(self.match.into, merged.sizes)

    def add_and_reduce(
        self, x: Tensor, branch: Tensor, norm: nn.Module, layout: Layout
    ) -> tuple[Tensor, Tensor, Layout]:
        """``reduce`` of x + branch, what a norm makes of that, and what the tokens are.

        A LayerNorm without hooks is part of the same pass.
        """
        branch = branch.to(x.dtype)  # of another one under autocast
        hooked = bool(norm._forward_hooks or norm._forward_pre_hooks)  # those are somebody's
        fused: dict[str, Any] = {}
        if isinstance(norm, nn.LayerNorm) and not hooked:
            fused = {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
        tokens, sizes, normed = merge_tokens(x, self.match, self.weights, residual=branch, **fused)
        after = layout.merged(self.match.into, sizes)
        return tokens, norm(tokens) if normed is None else normed, after

    def expand(self, y: Tensor, layout: Layout) -> Tensor:
        """The adjoint of ``reduce``. (``Layout.on_grid`` copies: there constants stay.)"""
        into = self.match.into
        share = 1 / self._sums().gather(1, into)
        if self.weights is not None:
            share = share * self.weights
        return y.gather(1, into.unsqueeze(2).expand(-1, -1, y.shape[2])) * share.unsqueeze(2).to(y)

    def groups(self, sums: Tensor) -> TokenGroups:
        """The same map, as ``AttentionMap.reduce`` takes it.

        Args:
            sums: of the weights that each token is made of, `(B, M)`.
        """
        return TokenGroups.of(self.match, self.weights, sums)

    def _sums(self) -> Tensor:
        """Of the weights that each token is made of, `(B, M)`."""
        into = self.match.into
        dtype = torch.float32 if self.weights is None else self.weights.dtype
        each = torch.ones(*into.shape, 1, dtype=dtype, device=into.device)
        return merge_tokens(each, self.match, self.weights).sizes
