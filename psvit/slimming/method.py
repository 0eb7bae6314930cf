"""``Method``: what a stack asks of a method that chooses the tokens of each block by the image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..attention import MapSlot, class_attention

if TYPE_CHECKING:
    from ..stack import Flow


class Method(ABC):
    """Runs the blocks of a stack, each with the tokens that it chooses.

    It holds settings only. What it finds in a pass stays in the ``Flow`` of that pass.

    Args:
        keep: part of the patches.
        layers: where it chooses, counted from 1.
    """

    #: Whether patches lose their tokens.
    drops: bool

    def __init__(self, keep: float, layers: Sequence[int]) -> None:
        self.keep = keep
        self.layers = tuple(layers)

    @abstractmethod
    def looks(self, index: int) -> bool:
        """Whether it needs the keys of a layer (counted from 0), and its class token's query."""

    @abstractmethod
    def run(self, flow: Flow, index: int, x: Tensor, slot: MapSlot | None) -> Tensor:
        """`(B, N, C)` to `(B, M, C)`: the block, and what there is to do about its tokens.

        Args:
            flow: the pass, and what is known in it.
            index: of the block, counted from 0.
            x: tokens.
            slot: of the block's attention; there if the method looks at it.
        """

    @abstractmethod
    def counts(self, patches: int, depth: int) -> list[tuple[int, int, int]]:
        """How many patches (and tokens for several) each layer's attention gets, its MLP, and
        how many there are after it."""

    def row(self, flow: Flow, index: int, slot: MapSlot | None) -> Tensor:
        """What the class token pays to each patch in a block that has run, `(B, H, patches)`."""
        assert slot is not None and slot.query is not None and slot.keys is not None
        scale = flow.stack.block(index).attention_layer.scale
        return class_attention(slot.query, slot.keys, scale, flow.stack.prefix)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(keep={self.keep}, layers={self.layers})"
