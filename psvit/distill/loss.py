"""How far a converted model is from its original: class scores, and tokens after each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import kl_divergence, logits_of
from ..stack import find_stack


class Distance:
    """KL of the classes, and the mean over layers of the tokens' relative squared difference.

    Args:
        original: converted to the schedule whose layers all attend.
        converted: under another schedule. Where it has pooled, the original's tokens are put
            through the same pools.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self.original, self.converted = original, converted

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two, each one number; gradients flow into the converted model alone."""
        with torch.no_grad(), _outputs(self.original) as wanted:
            reference = logits_of(self.original(images)).float()
        with _outputs(self.converted) as found:
            scores = logits_of(self.converted(images)).float()
        pairs = zip(found, self._pooled(wanted), strict=True)
        errors = [(x - y).square().mean() / y.square().mean() for x, y in pairs]
        return kl_divergence(scores, reference), torch.stack(errors).mean()

    def _pooled(self, wanted: list[Tensor]) -> Iterator[Tensor]:
        stack = find_stack(self.converted)
        layouts = stack.layouts(wanted[0].shape[1]) if stack.schedule.pools else []
        for layer, x in enumerate(wanted):
            for i in range(stack.stages[layer]):
                x, _ = stack.pool(i).reduce(x, layouts[i])
            yield x.float()


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each layer gives, in order, during the ``with`` block."""
    stack = find_stack(model)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output.float())

    hooks = [stack.block(i).register_forward_hook(keep) for i in range(len(stack))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
