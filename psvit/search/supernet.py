"""One network that holds the weights of every candidate of a space."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..models import PSViT
from ..schedule import SHARE
from .space import Candidate, SearchSpace


class Supernet(nn.Module):
    """The largest candidate; every other one is made of slices of its parameters.

    A layer stands for the layers at its place in its stage. Narrower candidates take the first
    channels of each parameter, in a fused projection the first heads of each of Q, K and V. A layer
    that shares takes the V rows alone, so Q and K are trained by the candidates in which it
    attends.

    Args:
        space: whose candidates it holds.
        device: of the parameters.

    Source: PSViT, arXiv 2108.03428, section 3; AutoFormer, arXiv 2107.00651, for the slices.
    """

    def __init__(self, space: SearchSpace, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.space = space
        self.largest = space.model(space.largest, device=device)

    def forward(self, x: Tensor, candidate: Candidate) -> Tensor:
        """Images `(B, in_chans, height, width)` to the candidate's class scores.

        Gradients flow into the slices that the candidate uses, and nowhere else.

        Raises:
            ValueError: a candidate outside of the space.
        """
        return functional_call(skeleton(self.space, candidate), self.slices(candidate), (x,))

    def slices(self, candidate: Candidate) -> dict[str, Tensor]:
        """The candidate's parameters by the names that they have in its own model.

        Raises:
            ValueError: a candidate outside of the space.
        """
        wanted = skeleton(self.space, candidate).named_parameters()
        own = dict(self.largest.named_parameters())
        places = self._places(candidate)
        kinds = candidate.schedule.kinds
        found = {}
        for name, parameter in wanted:
            container, _, rest = name.partition(".")
            layer, _, inside = rest.partition(".")
            if container != "blocks" or not layer.isdecimal():
                found[name] = _corner(own[name], parameter.shape)
                continue
            whole = own[f"blocks.{places[int(layer)]}.{inside}"]
            if inside.startswith("attn.qkv."):
                found[name] = _heads(whole, parameter.shape, kinds[int(layer)] == SHARE)
            else:
                found[name] = _corner(whole, parameter.shape)
        return found

    def extract(self, candidate: Candidate) -> PSViT:
        """The candidate as a model of its own, which has copies of the weights.

        Raises:
            ValueError: a candidate outside of the space.
        """
        slices = self.slices(candidate)
        model = self.space.model(candidate, device=next(iter(slices.values())).device)
        model.load_state_dict(slices)
        return model.train(self.training)

    def _places(self, candidate: Candidate) -> list[int]:
        """For each layer of a candidate the layer of the largest that it is."""
        stages = zip(candidate.schedule.stages, self.largest.schedule.stages, strict=True)
        return [place for few, all_ in stages for place in all_[: len(few)]]


@lru_cache(maxsize=1024)
def skeleton(space: SearchSpace, candidate: Candidate) -> PSViT:
    """A candidate's model without memory for its weights.

    Raises:
        ValueError: a candidate outside of the space.
    """
    if candidate not in space:
        raise ValueError(f"candidate: got {candidate}, expected one of the space")
    # There are no weights to initialise: the mode that draws them fastest will do.
    return space.model(candidate, device="meta", weight_init="moco")


def _corner(whole: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Its first rows, columns, ... in memory as an own parameter would be: equal to the bit."""
    return whole[tuple(map(slice, shape))].contiguous()


def _heads(whole: Tensor, shape: torch.Size, shares: bool) -> Tensor:
    """Of a projection with Q, K and V in equal parts the first heads of each, or of V alone."""
    parts = whole.unflatten(0, (3, -1))
    parts = parts[2:] if shares else parts
    return _corner(parts, (len(parts), shape[0] // len(parts), *shape[1:])).flatten(0, 1)
