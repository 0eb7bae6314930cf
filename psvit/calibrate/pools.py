"""A learned pool for a trained model: of each cell one token, blended with the cell's average.

An average alone has a smaller norm than tokens have and blurs what tells them apart; a token alone
forgets its neighbours. A blend of both, scaled to the tokens' root mean square, is a depthwise
convolution with the same taps for every channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..outputs import logits_of, relative_errors
from ..pooling import GridPool
from ..schedule import ATTEND, POOL, Schedule
from ..stack import Stack, find_stack
from .images import Images
from .lockstep import Lockstep, entered
from .report import PoolFit

#: Parts that a cell's average may have in the blend; the first while the token is chosen.
AVERAGES = (0.35, 0.5, 0.2)
#: Images that it is chosen by, at most.
MOST_IMAGES = 256


@dataclass(frozen=True)
class Blend:
    """Taps of a pool with windows of 3 and stride 2; a cell is 2 tokens along each axis.

    Args:
        token: its place in the cell, 0 or 1 along each axis.
        average: part of the cell's average, 0 to 1; the rest is the token's.
    """

    token: tuple[int, ...]
    average: float

    def taps(self) -> Tensor:
        """`(3,)` for a pool of the sequence, `(3, 3)` for one of the grid; they sum to 1."""
        taps = torch.zeros((3,) * len(self.token))
        cell = (slice(1, 3),) * len(self.token)  # a window starts one token before its cell
        taps[cell] = self.average / taps[cell].numel()
        taps[tuple(1 + place for place in self.token)] += 1 - self.average
        return taps


def tries(dims: int) -> int:
    """How often the images are run for one pool, at most."""
    return 2**dims + len(AVERAGES) - 1


@torch.no_grad()
def fit_pools(
    convert: Callable[[Schedule], nn.Module],
    original: nn.Module,
    stack: Stack,
    images: Images,
    step: Callable[[float], object],
) -> list[PoolFit]:
    """Chooses the learned pools of a stack, in order, each with those before it in place.

    Of a few blends it takes the one whose outputs are nearest to the original's, while every layer
    attends.

    Args:
        convert: makes a copy of the model under another schedule, all else as for ``stack``.
        original: the model, converted to a schedule whose layers all attend, in eval mode.
        stack: of the conversion; its pools are written.
        images: at most ``MOST_IMAGES`` of them are run, ``tries`` times for each pool.
        step: called with the number of images that were run.
    """
    few = list(images.first(MOST_IMAGES))
    found = []
    for number, layer in enumerate(stack.schedule.pools):
        pooled = convert(_attending(stack.schedule, number + 1)).eval()
        for i in range(number):
            find_stack(pooled).pool(i).load_state_dict(stack.pool(i).state_dict())
        trial = _Trial(original, pooled, layer, few, step)
        found.append(trial.best())
        stack.pool(number).load_state_dict(trial.pool.state_dict())
    return found


def _attending(schedule: Schedule, pools: int) -> Schedule:
    """A schedule with the first pools of another, of whose layers none shares."""
    edges = (0, *schedule.pools[:pools], schedule.depth)
    return Schedule(POOL.join(ATTEND * (b - a) for a, b in itertools.pairwise(edges)))


class _Trial:
    """A converted model whose last pool, before a layer, is tried with several blends."""

    def __init__(
        self,
        original: nn.Module,
        pooled: nn.Module,
        layer: int,
        images: list[Tensor],
        step: Callable[[float], object],
    ) -> None:
        self.model, self.layer, self.images, self.step = pooled, layer, images, step
        stack = find_stack(pooled)
        pool = stack.pool(len(stack.pools) - 1)
        assert isinstance(pool, GridPool)
        self.pool = pool
        lockstep = Lockstep(original, pooled)
        seen = [lockstep.group(few, (layer,)) for few in images]
        self.tokens, self.layout = [one.tokens for one in seen], seen[0].layouts[-2]
        self.wanted = torch.cat([self._scores(original, few) for few in images])

    def best(self) -> PoolFit:
        """What was chosen; the pool has it then."""
        # Where the grid is odd, the second token of its last cell is padding.
        places = [range(2 - n % 2) for n in self.pool.grid(self.layout)]
        tokens = itertools.product(*places)
        token = min((self._tried(Blend(t, AVERAGES[0])) for t in tokens), key=_error)
        rest = [self._tried(Blend(token.token, average)) for average in AVERAGES[1:]]
        best = min(token, *rest, key=_error)
        self._put(Blend(best.token, best.average))
        return best

    def _tried(self, blend: Blend) -> PoolFit:
        scale, scores = self._put(blend), []
        for few, tokens in zip(self.images, self.tokens, strict=True):
            with entered(find_stack(self.model), self.layer, tokens):
                scores.append(self._scores(self.model, few))
            self.step(len(few))
        error = float(relative_errors(torch.cat(scores), self.wanted).mean())
        return PoolFit(self.layer, blend.token, blend.average, scale, error)

    def _put(self, blend: Blend) -> float:
        """Sets the pool's taps, and tells what they sum to."""
        weight = self.pool.weight
        assert weight is not None
        weight.copy_(blend.taps())
        prefix, tokens = self.layout.prefix, self.tokens[0]
        pooled, _ = self.pool.reduce(tokens, self.layout)
        before, after = (x[:, prefix:].double().square().mean() for x in (tokens, pooled))
        scale = float((before / after).sqrt())
        weight.mul_(scale)
        return scale

    def _scores(self, model: nn.Module, images: Tensor) -> Tensor:
        return logits_of(model(images.to(next(self.model.parameters())))).double()


def _error(fit: PoolFit) -> float:
    return fit.error
