"""EViT: inattentive patches are fused, between a layer's attention and its MLP."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from psvit_kernels import TokenMatch

from ..attention import MapSlot
from .method import Method
from .scores import check_scores
from .selection import select_patches

if TYPE_CHECKING:
    from ..stack import Flow


class EViT(Method):
    """In some layers the patches that the class token attends to most go on; the rest becomes one.

    Args:
        keep: part of the patches that go on, rounded up. The one token counts as a patch from then
            on.
        layers: where, counted from 1.

    Source: EViT, arXiv 2202.07800, section 3.
    """

    drops = True

    def looks(self, index: int) -> bool:
        return index + 1 in self.layers

    def run(self, flow: Flow, index: int, x: Tensor, slot: MapSlot | None) -> Tensor:
        fuse = None
        if self.looks(index) and self._kept(x.shape[1] - flow.stack.prefix):
            fuse = partial(self._fuse, flow, index, slot)
        return flow.stack.block(index)(x, slot=slot, merge=fuse)

    def counts(self, patches: int, depth: int) -> list[tuple[int, int, int]]:
        found = []
        for i in range(depth):
            kept = self._kept(patches) if self.looks(i) else 0
            left = kept + 1 if kept else patches
            found.append((patches, left, left))
            patches = left
        return found

    def _kept(self, patches: int) -> int:
        """How many of so many patches are kept; 0: all, there is nothing to fuse."""
        kept = math.ceil(self.keep * patches - 1e-9)  # 0.1 * 30 is a little above 3
        return kept if kept < patches else 0

    def _fuse(
        self, flow: Flow, index: int, slot: MapSlot | None, x: Tensor, branch: Tensor,
        norm: nn.Module,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x + branch with some tokens fused, and what the norm makes of it."""
        prefix, before = flow.stack.prefix, flow.layout(index, x)
        scores = self.row(flow, index, slot).mean(1)
        check_scores(scores, index)
        fused = select_patches(scores, self._kept(x.shape[1] - prefix), prefix)
        tokens, normed, after = fused.add_and_reduce(x, branch, norm, before)
        flow.merged[index + 1] = after._replace(sizes=_sizes(before.counted(x), fused.match))
        return tokens, normed


def _sizes(before: Tensor, match: TokenMatch) -> Tensor:
    """How many input tokens each one stands for, which the weights don't tell: the last is fused.

    Args:
        before: the same of the tokens that were matched, `(B, N)`.
        match: of those, to M.
    """
    kept = before.gather(1, match.order[:, : match.tokens - 1])
    return torch.cat([kept, before.sum(1, keepdim=True) - kept.sum(1, keepdim=True)], dim=1)
