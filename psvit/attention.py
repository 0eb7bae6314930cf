"""Attention that computes a map and lets later layers apply it, or applies an earlier layer's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from psvit_kernels import AttentionMap, TokenGroups, apply_attention, attention

from .host import adopt, hand_back


class MapSlot:
    """Where the layers of one group hand on their map during one forward pass, and only then.

    A stack makes it anew for each pass and gives it to each layer as an argument; no module keeps
    it.

    Args:
        record: called with each layer's `(B, H, N, N)` probabilities, if somebody wants them.
        reuses: how many layers apply the map after the one that computes it.
        merges: whether tokens are merged or selected by the keys of that layer, or by how much
            of them its first query sees.
        followed: whether a map of fewer tokens is made of it.
    """

    def __init__(
        self,
        record: Callable[[Tensor], object] | None = None,
        reuses: int = 0,
        merges: bool = False,
        followed: bool = False,
    ) -> None:
        self.map: AttentionMap | None = None
        self.keys: Tensor | None = None
        self.query: Tensor | None = None
        self.reuses = reuses
        self.record = record
        self.merges = merges
        self.followed = followed

    @property
    def wants_map(self) -> bool:
        return self.reuses > 0 or self.followed or self.record is not None

    def followed_by(self, groups: TokenGroups, mean: Callable[[Tensor], Tensor]) -> MapSlot:
        """For the layers that come after the tokens of the map became fewer.

        Args:
            groups: which of them became which.
            mean: makes tokens `(B, M, C)` of `(B, N, C)`; for the keys, if somebody wants them.
        """
        assert self.map is not None
        after = MapSlot(self.record, merges=self.merges)
        after.map = self.map.reduce(groups)
        if self.keys is not None:
            after.keys = mean(self.keys if self.keys.dim() == 3 else self.keys.mean(1))
        return after


class Attention(nn.Module, ABC):
    """Self-attention over a host's own projections, which it holds by reference under their names.

    An adapter says in a subclass where the projections are: ``project``, ``project_values``,
    ``values``, ``finish``, ``output_projection``, ``unused`` and ``strip``.

    Args:
        host: the host's attention module.
        shares: whether this layer applies the map of an earlier one: then Q and K are neither
            computed nor trained (where they are parameters of their own, ``requires_grad`` is
            taken from them, so that data-parallel training doesn't wait for their gradients).
        layer: its place, counted from 0, for messages.
        heads, scale: number of heads, and factor of the scores.
    """

    def __init__(
        self, host: nn.Module, *, shares: bool, layer: int, heads: int, scale: float
    ) -> None:
        nn.Module.__init__(self)
        adopt(self, host)
        self.shares = shares
        self.layer = layer
        self.num_heads = heads
        self.scale = scale
        self.stripped = False
        self._trainable: dict[str, bool] = {}
        if shares:
            self._freeze()

    def forward(self, x: Tensor, slot: MapSlot | None = None, bias: Tensor | None = None) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`.

        Args:
            x: normalised tokens.
            slot: of this layer's group. A layer that attends puts its map there, a layer that
                shares takes it from there. None: nobody else wants the map.
            bias: added to the scores, broadcastable to `(B, H, N, N)`; a sharing layer's map has
                its donor's in it already.

        Raises:
            RuntimeError: a sharing layer without its donor's map.
        """
        p = self.attention_dropout if self.training else 0.0
        if self.shares:
            shared = self._shared_map(slot)
            out = apply_attention(shared, self.project_values(x), dropout=p)
            attn_map: AttentionMap | None = shared
        else:
            q, k, v = self.project(x)
            wanted = p > 0 or (slot is not None and slot.wants_map)
            form: Literal["dense"] | None = "dense" if wanted else None
            reuses = 0 if slot is None else slot.reuses
            bias = None if bias is None else bias.to(q.dtype)
            out, attn_map = attention(
                q, k, v, scale=self.scale, bias=bias, return_map=form, reuses=reuses
            )
            if p:
                assert attn_map is not None
                out = apply_attention(attn_map, v, dropout=p)
            if slot is not None and slot.merges:
                slot.keys, slot.query = k, q[:, :, :1]
        if slot is not None:
            slot.map = attn_map
            if slot.record is not None and attn_map is not None:
                slot.record(attn_map.dense())
        return self.finish(out.transpose(1, 2).flatten(2), x)

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(B, H, N, d)` each."""

    @abstractmethod
    def project_values(self, x: Tensor) -> Tensor:
        """Values alone, `(B, H, N, d)`."""

    @property
    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """Weight `(H d, C)` and bias `(H d,)` of V: the parameters, or views of their rows."""

    @abstractmethod
    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """What the host does with the merged heads, `(B, N, H d)`, to make `(B, N, C)` of them."""

    @property
    @abstractmethod
    def output_projection(self) -> nn.Linear:
        """The linear that makes `(B, N, C)` of the heads."""

    @property
    def finishes_linearly(self) -> bool:
        """Whether ``finish`` is the output projection (and dropout) alone."""
        return True

    @property
    @abstractmethod
    def attention_dropout(self) -> float:
        """Probability with which an element of the map is dropped, where it is applied."""

    @property
    @abstractmethod
    def unused(self) -> tuple[str, ...]:
        """Names of the children that a sharing layer doesn't need at all."""

    def strip(self) -> None:
        """Drops the parameters that a sharing layer doesn't need. Not to be undone."""
        self.stripped = True
        self._trainable = {}
        self._host = ()
        for name in self.unused:
            delattr(self, name)

    def restored(self) -> nn.Module:
        """The host's attention module, its parameters as they are now."""
        host = hand_back(self)
        parameters = dict(host.named_parameters())
        for name, trainable in self._trainable.items():
            parameters[name].requires_grad_(trainable)
        return host

    def extra_repr(self) -> str:
        does = "shares a map" if self.shares else "attends"
        return f"{does}, heads={self.num_heads}" + (", stripped" if self.stripped else "")

    def _freeze(self) -> None:
        for child in self.unused:
            for name, parameter in getattr(self, child).named_parameters(prefix=child):
                self._trainable[name] = parameter.requires_grad
                parameter.requires_grad_(False)

    def _shared_map(self, slot: MapSlot | None) -> AttentionMap:
        if slot is None or slot.map is None:
            raise RuntimeError(
                f"layer {self.layer + 1} shares the map of an earlier layer, which is not there: "
                f"call the whole stack (or the steps that iterating over it gives, in order); "
                f"to checkpoint it layer by layer, pass use_reentrant=False"
            )
        return slot.map


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H d)` to a `(B, H, N, d)` view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def class_attention(
    q: Tensor, k: Tensor, scale: float, prefix: int, bias: Tensor | None = None
) -> Tensor:
    """The row of the class token in the map, for patches: softmax(scale q_0 K^T + bias).

    Takes O(H N d): the map isn't made.

    Args:
        q: queries, `(B, H, N or 1, d)`; the first one is that of the class token.
        k: keys, `(B, H, N, d)`.
        scale: of the scores.
        prefix: leading tokens that are no patches.
        bias: None, or broadcastable to `(B, H, 1, N)`.

    Returns:
        `(B, H, N - prefix)`, float32 (float64 for float64).

    Source: EViT, arXiv 2202.07800, section 3.2; Evo-ViT, arXiv 2108.01390, section 3.2.
    """
    scores = (scale * q[:, :, :1]) @ k.transpose(2, 3)
    scores = scores if bias is None else scores + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide)[:, :, 0, prefix:]
