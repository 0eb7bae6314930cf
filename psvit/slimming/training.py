"""What Evo-ViT and SiT need to train: a schedule, a second head, a loss on recovered tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Encoder, find
from ..layout import Layout
from ..stack import Stack
from .query_pool import Recovery
from .slow_fast import EvoViT

#: Of the epochs, the part that Evo-ViT trains layer-wise: 200 of 300.
LAYER_WISE = 2 / 3


def begin_epoch(model: nn.Module, epoch: int, epochs: int) -> None:
    """Puts a model that ``evo_vit`` converted into the form of an epoch; leaves others alone.

    In the first two thirds patches are selected in front of every layer from the first selection
    on, and then where the conversion says.

    Args:
        model: in any wrapper.
        epoch: counted from 0.
        epochs: of the whole run.

    Source: Evo-ViT, arXiv 2108.01390, section 3.4 (layer-to-stage training).
    """
    for module in model.modules():
        if isinstance(module, Stack) and isinstance(module.slimming, EvoViT):
            module.slimming.layer_wise = epoch < LAYER_WISE * epochs


class SecondHead(nn.Module):
    """Class scores from what a model's own head doesn't look at: half of Evo-ViT's loss.

    That is the class token where the model averages the patches, as Evo-ViT does, and the average
    of the patches where it takes the class token.

    Args:
        model: timm's, with a class token.

    Source: Evo-ViT, arXiv 2108.01390, section 3.4 (assisted CLS token loss).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prefix = int(model.num_prefix_tokens)
        self.averages = model.global_pool == "token"
        self.norm = nn.LayerNorm(model.embed_dim)
        self.head = nn.Linear(model.embed_dim, model.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of the last layer `(B, N, C)` to class scores `(B, classes)`."""
        seen = tokens[:, self.prefix :].mean(1) if self.averages else tokens[:, 0]
        return self.head(self.norm(seen))


class Recalibration(nn.Module):
    """Distillation of SiT: patches recovered from slimmed tokens, layer by layer, are a teacher's.

    The mean over layers of the mean squared difference. The tokens of a layer are those that the
    next one gets, after a pool that stands between them.

    Args:
        model: converted by ``sit``.
        teacher: of as many layers, patches and channels: best the original.

    Raises:
        ValueError: a teacher of another size.

    Source: SiT, arXiv 2111.12624, section 3.3 (feature recalibration distillation).
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        ours, theirs = find(model), find(teacher)
        sizes = [(len(e.layers), _cells(e), e.convolution.out_channels) for e in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher: got {sizes[1]} layers, patches and channels, expected {sizes[0]} as "
                f"the model, to compare their tokens"
            )
        _, cells, width = sizes[0]
        left = [layout.cells for layout in _layouts(ours)]
        self.recoveries = nn.ModuleList(
            nn.Identity() if count == cells else Recovery(width, count, cells) for count in left
        )
        self._ours, self._theirs = [ours], [theirs]  # in lists: no part of this module

    @contextmanager
    def watching(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Lists that get the patches of each layer of both models as these run, once each."""
        (ours,), (theirs,) = self._ours, self._theirs
        with _watched(ours) as mine, _watched(theirs) as wanted:
            yield mine, wanted

    def forward(self, mine: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """The loss, one number in float32, from what ``watching`` gave."""
        triples = zip(self.recoveries, mine, wanted, strict=True)
        errors = [F.mse_loss(to(x).float(), y.float().detach()) for to, x, y in triples]
        return torch.stack(errors).mean()


@contextmanager
def _watched(encoder: Encoder) -> Iterator[list[Tensor]]:
    """The patches that each layer but the first gets, and those that the last one gives."""
    seen: list[Tensor] = []
    prefix, layers = encoder.prefix, list(encoder.layers.values())
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0][:, prefix:]))
        for layer in layers[1:]
    ]
    last = layers[-1].register_forward_hook(lambda layer, args, out: seen.append(out[:, prefix:]))
    try:
        yield seen
    finally:
        for hook in (*hooks, last):
            hook.remove()


def _layouts(encoder: Encoder) -> list[Layout]:
    """What the tokens are that follow each layer."""
    layout = Layout(encoder.prefix, encoder.grid)
    stack, found = encoder.container, []
    assert isinstance(stack, Stack)
    for before, after in zip(stack.stages, (*stack.stages[1:], stack.stages[-1]), strict=True):
        if after > before:
            layout = stack.pool(before).reduced(layout)
        found.append(layout)
    return found


def _cells(encoder: Encoder) -> int:
    h, w = encoder.grid
    return h * w
