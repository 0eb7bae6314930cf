"""An original and its conversion, run side by side on the same images up to one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import MapSlot
from ..block import Block
from ..layout import Layout
from ..stack import Flow, Stack, find_stack

#: Bytes of tokens that are kept from one fit to the next.
TOKEN_BUDGET = 512 * 2**20


@dataclass
class LayerPass:
    """What went through one layer of the conversion, and what the original had at the same place.

    M tokens are left at the layer, L after it, fewer if it merges some. Where the conversion has
    pooled or merged by then, the original's tokens are put through the same pools, and those that
    are one token in the conversion are averaged.

    Args:
        tokens: before the layer, `(B, M, C)`.
        normed: the attention's input, `(B, M, C)`.
        heads: the output projection's input, `(B, M, H d)`.
        middle: after attention, before the MLP, `(B, L, C)`.
        hidden: the input of the MLP's last linear, `(B, L, hidden)`; None if there is none.
        after: after the layer, `(B, L, C)`.
        middle_target: what the tokens are after the original's attention, `(B, M, C)`.
        after_target: after the original's layer, `(B, L, C)`.
        map: what the layer applies, per head, `(B, H, M, M)`.
    """

    tokens: Tensor
    normed: Tensor
    heads: Tensor
    middle: Tensor
    hidden: Tensor | None
    after: Tensor
    middle_target: Tensor
    after_target: Tensor
    map: Tensor


class GroupPass(NamedTuple):
    """What enters a group of the conversion, and what the original has after each of its layers.

    Args:
        tokens: before the group's first layer and any pool there, `(B, N, C)`.
        goals: the original's prefix tokens after each layer of the group, `(B, prefix, C)`.
        layouts: of the conversion's stages.
        merged: what the tokens are, if layers before have merged some.
    """

    tokens: Tensor
    goals: list[Tensor]
    layouts: list[Layout]
    merged: Layout | None

    def outputs(self, stack: Stack, group: Sequence[int]) -> list[Tensor]:
        """What each layer of the group gives in the conversion."""
        flow, x, found = _flow(stack, self.layouts, group[0], self.merged), self.tokens, []
        for layer in group:
            x = flow.run(layer, x)
            found.append(x)
        return found


class _Streams(NamedTuple):
    """The tokens of both models that enter a layer, what they are in each stage, and what those of
    the conversion are, if some were merged."""

    layer: int
    original: Tensor
    converted: Tensor
    layouts: list[Layout]
    merged: Layout | None

    @property
    def nbytes(self) -> int:
        same = self.original is self.converted
        return self.original.nbytes + (0 if same else self.converted.nbytes)


class Lockstep:
    """Runs both models on a batch, from the same embedded tokens, and stops after a layer.

    What enters the group of a layer (its donor and those that share with it) is kept for the next
    call with the same batch, which may ask for that group or a later one: weights that precede it
    must not have changed by then.

    Args:
        original: converted to the schedule whose layers all attend, so that both have the same
            kind of blocks, whatever their host.
        converted: a copy of it under another schedule.
        budget: bytes of tokens to keep; the others are computed again.

    Both are expected in eval mode.
    """

    def __init__(
        self, original: nn.Module, converted: nn.Module, budget: int = TOKEN_BUDGET
    ) -> None:
        self.model = converted
        self.original = find_stack(original)
        self.converted = find_stack(converted)
        self.budget = budget
        schedule, merge = self.converted.schedule, self.converted.merge
        # Layers before it are as in the original, and nobody shares their maps.
        changed = (
            g[0]
            for g in schedule.groups
            if len(g) > 1 or g[0] in schedule.pools or any(merge[i] for i in g)
        )
        self.first_changed = next(changed, schedule.depth)
        self._kept: dict[int, _Streams] = {}

    @torch.no_grad()
    def run(self, images: Tensor, layer: int, place: int | None = None) -> LayerPass:
        """The pass of a batch of images through a layer, counted from 0.

        Args:
            images: `(B, channels, height, width)`, on any device, in any dtype.
            place: the number of the batch, if it will be asked for again.
        """
        donor = self.converted.donors[layer]
        streams = self._advanced(images, donor, place)
        flow = _flow(self.converted, streams.layouts, donor, streams.merged)
        x, slot = streams.converted, flow.slots.setdefault(donor, MapSlot())
        slot.reuses = max(slot.reuses, 1)
        for i in range(donor, layer):
            x = flow.run(i, x)
        with _tapped(self.converted.block(layer)) as taps:
            after = flow.run(layer, x)
        middle_target, after_target = self._targets(streams, layer, flow.merged)
        return LayerPass(
            tokens=taps["tokens"],
            normed=taps["normed"],
            heads=taps["heads"],
            middle=taps["middle"],
            hidden=taps.get("hidden"),
            after=after,
            middle_target=middle_target,
            after_target=after_target,
            map=taps["map"],
        )

    @torch.no_grad()
    def group(self, images: Tensor, group: Sequence[int]) -> GroupPass:
        """The pass of a batch of images up to a group: a donor and the layers that share its map.

        Args:
            images: as for ``run``.
            group: of the conversion's schedule.
        """
        streams = self._advanced(images, group[0], None)
        flow, x, goals = Flow(self.original), streams.original, []
        for layer in group:
            x = flow.run(layer, x)
            goals.append(x[:, : self.converted.prefix])
        return GroupPass(streams.converted, goals, streams.layouts, streams.merged)

    def _advanced(self, images: Tensor, layer: int, place: int | None) -> _Streams:
        before = None if place is None else self._kept.pop(place, None)
        if before is None or before.layer > layer:
            tokens = self.embed(images)
            pools = self.converted.schedule.pools
            layouts = self.converted.layouts(tokens.shape[1]) if pools else []
            before = _Streams(0, tokens, tokens, layouts, None)
        original, converted = before.original, before.converted
        flow = Flow(self.original)
        changed = _flow(self.converted, before.layouts, before.layer, before.merged)
        for i in range(before.layer, layer):
            original = flow.run(i, original)
            converted = original if i < self.first_changed else changed.run(i, converted)
        merged = changed.merged.get(layer)
        streams = _Streams(layer, original, converted, before.layouts, merged)
        kept = sum(other.nbytes for other in self._kept.values())
        if place is not None and kept + streams.nbytes <= self.budget:
            self._kept[place] = streams
        return streams

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The tokens that enter the first layer, `(B, N, C)`.

        Raises:
            ValueError: images that the model refuses.
        """
        hook = self.converted.block(0).register_forward_pre_hook(_stop)
        try:
            self.model(images.to(next(self.model.parameters())))
        except _Reached as reached:
            return reached.tokens
        except (AssertionError, RuntimeError, ValueError) as error:
            shape = tuple(images.shape[1:])
            raise ValueError(
                f"images: got {shape} each, which the model refuses: {error}"
            ) from error
        finally:
            hook.remove()
        raise RuntimeError("the model ran without its first layer")

    def _targets(
        self, streams: _Streams, layer: int, merged: Mapping[int, Layout]
    ) -> tuple[Tensor, Tensor]:
        flow, x = Flow(self.original), streams.original
        for i in range(streams.layer, layer):
            x = flow.run(i, x)
        with _tapped(self.original.block(layer)) as taps:
            after = flow.run(layer, x)
        found = []
        for x, entering in ((taps["middle"], layer), (after, layer + 1)):
            for i in range(self.converted.stages[layer]):
                x, _ = self.converted.pool(i).reduce(x, streams.layouts[i])
            last = streams.layouts[self.converted.stages[layer]] if streams.layouts else None
            found.append(_averaged(x, last, merged[entering]) if entering in merged else x)
        return found[0], found[1]


@contextmanager
def entered(stack: Stack, layer: int, tokens: Tensor) -> Iterator[None]:
    """Until it ends, layers before the given one, counted from 0, don't run: it gets these tokens.

    With the number of layers: what comes after the last one.
    """
    skipped = [stack.block(i) for i in range(layer)]
    for block in skipped:
        block.forward = lambda x, **options: x  # type: ignore[assignment]
    skipped[-1].forward = lambda x, **options: tokens  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in skipped:
            del block.forward


def _flow(stack: Stack, layouts: list[Layout], layer: int, merged: Layout | None) -> Flow:
    """A pass that begins at a layer."""
    flow = Flow(stack)
    if layouts:  # the tokens may be fewer than those that the layouts are of
        flow.layouts = layouts
    if merged is not None:
        flow.merged[layer] = merged
    return flow


def _averaged(x: Tensor, before: Layout | None, merged: Layout) -> Tensor:
    """Of tokens `(B, N, C)` the means of those that are one token now, weighted by their sizes."""
    assert merged.into is not None and isinstance(merged.sizes, Tensor)
    sizes = x.new_ones(x.shape[:2]) if before is None else before.counted(x)
    sums = x.new_zeros(len(x), merged.tokens, x.shape[2])
    into = merged.into.unsqueeze(2).expand_as(x)
    return sums.scatter_add(1, into, x * sizes.unsqueeze(2)) / merged.sizes.unsqueeze(2)


class _Reached(Exception):
    """Ends a forward pass at the first layer."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


@contextmanager
def _tapped(block: Block) -> Iterator[dict[str, Any]]:
    """What enters the parts of a block, by name, during the ``with`` block."""
    taps: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            taps[name] = args[0]

        return hook

    def keep_map(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
        taps["normed"] = args[0]
        slot: MapSlot | None = kwargs["slot"]
        if slot is not None and slot.map is not None:
            taps["map"] = slot.map.dense()

    attention = block.attention_layer
    hooks = [
        block.register_forward_pre_hook(keep("tokens")),
        attention.register_forward_hook(keep_map, with_kwargs=True),
        attention.output_projection.register_forward_pre_hook(keep("heads")),
        getattr(block, block.names.norm2).register_forward_pre_hook(keep("middle")),
    ]
    if block.last_linear is not None:
        hooks.append(block.last_linear.register_forward_pre_hook(keep("hidden")))
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()
