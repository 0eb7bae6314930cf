"""A transformer layer over a host's own norms, attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Attention, MapSlot
from .host import adopt, hand_back

Merge = Callable[[Tensor, Tensor, nn.Module], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class BlockNames:
    """What the children of a host's layer are called, by the part they play.

    ``after_attention`` and ``after_mlp`` are applied to a branch in that order before it is added
    to the tokens: layer scale, dropout, drop path.
    """

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: str
    after_mlp: tuple[str, ...]


class Block(nn.Module):
    """x <- x + after_attention(attention(norm1(x))); x <- x + after_mlp(mlp(norm2(x))).

    It holds the children of a host's layer by reference, in their order and under their names;
    only the attention is another module, which has the same parameters.

    Args:
        host: the host's layer.
        names: what its children are called.
        attention: what stands for its attention.
        donor: the layer whose map it applies, counted from 0.
    """

    def __init__(
        self, host: nn.Module, names: BlockNames, attention: Attention, donor: int
    ) -> None:
        # Not super(): an adapter may put a host's class behind this one, for isinstance's sake.
        nn.Module.__init__(self)
        adopt(self, host)
        self._modules[names.attention] = attention
        if attention.stripped:  # else the host's own would keep alive what was dropped
            host._modules[names.attention] = None
        self.names = names
        self.layer = attention.layer
        self.donor = donor

    @property
    def attention_layer(self) -> Attention:
        """The attention, whatever the host calls it."""
        found = getattr(self, self.names.attention)
        assert isinstance(found, Attention)
        return found

    @property
    def last_linear(self) -> nn.Linear | None:
        """The last linear of the MLP, if it has one that makes tokens of the block's width."""
        width = self.attention_layer.output_projection.out_features
        linears = [m for m in getattr(self, self.names.mlp).modules() if type(m) is nn.Linear]
        return linears[-1] if linears and linears[-1].out_features == width else None

    def forward(
        self,
        x: Tensor,
        slot: MapSlot | None = None,
        bias: Tensor | None = None,
        merge: Merge | None = None,
    ) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`, or fewer tokens if some are merged.

        Hooks on a block get tokens and give tokens, as on the host's layer.

        Args:
            x: tokens.
            slot, bias: for ``Attention``.
            merge: makes of the tokens and of what the attention adds to them the tokens that the
                MLP adds to, and what the norm makes of those. None: their sum.
        """
        names = self.names
        y = self.attention_layer(getattr(self, names.norm1)(x), slot=slot, bias=bias)
        for name in names.after_attention:
            y = getattr(self, name)(y)
        norm = getattr(self, names.norm2)
        if merge is None:
            x = x + y
            y = norm(x)
        else:
            x, y = merge(x, y, norm)
        y = getattr(self, names.mlp)(y)
        for name in names.after_mlp:
            y = getattr(self, name)(y)
        return x + y

    def restored(self) -> nn.Module:
        """The host's layer, its parameters and children as they are now."""
        host = hand_back(self)
        host._modules[self.names.attention] = self.attention_layer.restored()
        return host

    def extra_repr(self) -> str:
        if self.donor == self.layer:
            return f"layer {self.layer + 1}: A"
        return f"layer {self.layer + 1}: S, the map of layer {self.donor + 1}"
