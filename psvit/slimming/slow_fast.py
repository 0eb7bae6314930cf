"""Evo-ViT: some patches go through each block, the others take over how those change."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..attention import MapSlot
from ..token_map import IndexMap
from .method import Method
from .scores import check_scores
from .selection import select_patches, slow_and_fast, updated_scores

if TYPE_CHECKING:
    from ..stack import Flow

#: Of a new row of attention in the scores.
PART = 0.5


class Known(NamedTuple):
    """What is known when a block begins: scores of the patches, and which of them are slow."""

    scores: Tensor | None = None
    selected: IndexMap | None = None


class EvoViT(Method):
    """Blocks work on the patches that matter and on one token for the rest; no patch is lost.

    The score of a patch is what the class token pays to it, summed over heads: that of the layer
    before the first selection, then half of it and half of each new row, for those that are in the
    map. It is a constant: no gradient goes through it.

    Args:
        keep: part of the patches that go through the blocks, rounded down, at least one.
        layers: before which patches are selected anew, counted from 1, from 2 up. A selection
            lasts until the next one: all of them from the first on is Evo-ViT's layer-wise form,
            the first of each stage its stage-wise form.

    Source: Evo-ViT, arXiv 2108.01390, section 3.
    """

    drops = False

    #: Whether patches are selected anew in front of every layer from the first selection on.
    layer_wise = False

    def looks(self, index: int) -> bool:
        return self.layers[0] - 2 <= index and (self.layer_wise or index < self.layers[-1] - 1)

    def run(self, flow: Flow, index: int, x: Tensor, slot: MapSlot | None) -> Tensor:
        block = partial(flow.stack.block(index), slot=slot)
        scores, selected = flow.known.get(index, Known())
        patches = x.shape[1] - flow.stack.prefix
        if self._selects(index) and self._kept(patches) < patches:
            assert scores is not None
            check_scores(scores, index)
            selected = select_patches(scores, self._kept(patches), flow.stack.prefix)
        out = block(x) if selected is None else slow_and_fast(block, x, selected)
        if self.looks(index):
            row = self.row(flow, index, slot).sum(1).detach()
            scores = row if selected is None else updated_scores(scores, row, selected, PART)
        flow.known[index + 1] = Known(scores, selected)
        return out

    def counts(self, patches: int, depth: int) -> list[tuple[int, int, int]]:
        kept = self._kept(patches)
        slow = kept + 1 if kept < patches else patches
        first = self.layers[0] - 1
        works = [patches if i < first else slow for i in range(depth)]
        return [(work, work, patches) for work in works]

    def _selects(self, index: int) -> bool:
        return index + 1 in self.layers or (self.layer_wise and index + 1 > self.layers[0])

    def _kept(self, patches: int) -> int:
        return max(1, math.floor(self.keep * patches + 1e-9))  # 0.29 * 100 is a little below 29
