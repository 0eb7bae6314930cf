"""An original and its conversion, run side by side on the same images up to one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psvit_kernels import AttentionMap

from ..attention import MapSlot
from ..block import Block
from ..stack import Flow, find_stack


@dataclass
class LayerPass:
    """What went through one layer of the conversion, and what the original had at the same place.

    M tokens are left at the layer. Where the conversion has pooled by then, the original's tokens
    are put through the same pools.

    Args:
        tokens: before the layer, `(B, M, C)`.
        normed: the attention's input, `(B, M, C)`.
        heads: the output projection's input, `(B, M, H d)`.
        middle: after attention, before the MLP, `(B, M, C)`.
        hidden: the input of the MLP's last linear, `(B, M, hidden)`; None if there is none.
        after: after the layer, `(B, M, C)`.
        middle_target, after_target: the original's ``middle`` and ``after``.
        shared: the map that the layer applies, per head, `(B, H, M, M)`; None if it attends.
    """

    tokens: Tensor
    normed: Tensor
    heads: Tensor
    middle: Tensor
    hidden: Tensor | None
    after: Tensor
    middle_target: Tensor
    after_target: Tensor
    shared: Tensor | None


class Lockstep:
    """Runs both models on a batch, from the same embedded tokens, and stops after a layer.

    Args:
        original: converted to the schedule whose layers all attend, so that both have the same
            kind of blocks, whatever their host.
        converted: a copy of it under another schedule.

    Both are expected in eval mode.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self.model = converted
        self.original = find_stack(original)
        self.converted = find_stack(converted)

    @torch.no_grad()
    def run(self, images: Tensor, layer: int) -> LayerPass:
        """The pass of a batch of images through a layer, counted from 0.

        Args:
            images: `(B, channels, height, width)`, on any device, in any dtype.
        """
        tokens = self.embed(images.to(next(self.model.parameters())))
        middle_target, after_target = self._targets(tokens, layer)
        flow, x = Flow(self.converted), tokens
        for i in range(layer):
            x = flow.run(i, x)
        with _tapped(self.converted.block(layer)) as taps:
            after = flow.run(layer, x)
        shared: AttentionMap | None = taps.get("shared")
        return LayerPass(
            tokens=taps["tokens"],
            normed=taps["normed"],
            heads=taps["heads"],
            middle=taps["middle"],
            hidden=taps.get("hidden"),
            after=after,
            middle_target=middle_target,
            after_target=after_target,
            shared=None if shared is None else shared.dense(),
        )

    def embed(self, images: Tensor) -> Tensor:
        """The tokens that enter the first layer, `(B, N, C)`."""
        hook = self.converted.block(0).register_forward_pre_hook(_stop)
        try:
            self.model(images)
        except _Reached as reached:
            return reached.tokens
        finally:
            hook.remove()
        raise RuntimeError("the model ran without its first layer")

    def _targets(self, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        flow, x = Flow(self.original), tokens
        for i in range(layer):
            x = flow.run(i, x)
        with _tapped(self.original.block(layer)) as taps:
            after = flow.run(layer, x)
        count = tokens.shape[1]
        return self._pooled(taps["middle"], layer, count), self._pooled(after, layer, count)

    def _pooled(self, x: Tensor, layer: int, tokens: int) -> Tensor:
        stack = self.converted
        if stack.stages[layer]:
            layouts = stack.layouts(tokens)
            for i in range(stack.stages[layer]):
                x, _ = stack.pool(i).reduce(x, layouts[i])
        return x


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

    def keep_map(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        taps["normed"] = args[0]
        slot: MapSlot | None = kwargs["slot"]
        if block.attention_layer.shares and slot is not None:
            taps["shared"] = slot.map

    attention = block.attention_layer
    hooks = [
        block.register_forward_pre_hook(keep("tokens")),
        attention.register_forward_pre_hook(keep_map, with_kwargs=True),
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
