"""How many tokens each layer of a trained model merges: found by running it on images."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from .. import adapters
from ..merging import tokens_left
from ..schedule import ATTEND, Schedule
from ..stack import find_stack
from .costs import Conversion
from .front import Counts, Scored
from .merged_costs import MergedFLOPs
from .score import Held

#: Parts of the original's cost at which it is found out what merging loses.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: How much of the class token's attention protects a patch: as much as loses least.
PROTECT = (0.05, 0.1, 0.2)
#: The one at which the shape is searched, if a budget names none.
MIDDLE = 0.6
#: Neighbouring layers, so many groups of them (0: each layer alone), that are tried with more
#: merging, and with less, by a factor.
MOVES = ((4, 1.6), (4, 1.25), (6, 1.3), (0, 1.3))


@dataclass(frozen=True)
class Merging:
    """How merging is spread over the layers of a model, and what it loses.

    Args:
        shape: how much of it each layer does, in any unit.
        protect: as for ``psvit.accelerate``.
        costs, errors: error of the class scores at parts of the original's cost, ascending, while
            every layer attends.
    """

    shape: tuple[float, ...]
    protect: float
    costs: tuple[float, ...]
    errors: tuple[float, ...]

    def error(self, part: float) -> float:
        """Where merging leaves so much of the cost: between those known, on a line."""
        return float(np.interp(part, self.costs, self.errors))


class MergeSearch:
    """Runs a model, all of whose layers attend, with merging.

    Args:
        model: the original.
        how: it is converted.
        images: on which scores are compared.
        cost: of a schedule with merging.
    """

    def __init__(self, model: nn.Module, how: Conversion, images: Held, cost: MergedFLOPs) -> None:
        self.schedule = Schedule(ATTEND * len(adapters.find(model).layers))
        self.trial = how.apply(model, self.schedule)
        self.images, self.cost = images, cost
        self.protect = PROTECT if adapters.find(model).has_class_token else ()
        self.trials = len(moves(self.schedule.depth)) + 1 + len(self.protect) + len(LEVELS)

    def run(self, bound: float, step: Callable[[float], object]) -> Merging:
        """The shape that loses least at one cost, and what it loses at others.

        Args:
            bound: part of the original's cost.
            step: called with 1 after each of ``trials``.
        """

        stack = find_stack(self.trial)

        def error(shape: Sequence[float], bound: float) -> Scored:
            counts = scaled(self.schedule, shape, self.cost, bound)
            stack.merge = counts
            found = self.images.score(self.trial).error
            step(1)
            return Scored(found, self.cost(self.schedule, counts), self.schedule, counts)

        shape = (1.0,) * self.schedule.depth
        best, protect = error(shape, bound), stack.protect
        for part in self.protect:
            stack.protect = part
            tried = error(shape, bound)
            if tried.loss < best.loss:
                best, protect = tried, part
        stack.protect = protect
        for layers, factor in moves(self.schedule.depth):
            other = tuple(w * factor if i in layers else w for i, w in enumerate(shape))
            tried = error(other, bound)
            if tried.loss < best.loss:
                shape, best = other, tried
        found = {one.cost: one.loss for one in (best, *(error(shape, part) for part in LEVELS))}
        costs, errors = zip(*sorted({**found, 1.0: 0.0}.items()), strict=True)
        return Merging(shape, protect, costs, errors)


def moves(depth: int) -> list[tuple[range, float]]:
    """Layers, and the factor by which more is merged there: what the search tries, in order."""
    found = []
    for groups, factor in MOVES:
        edges = [round(i * depth / (groups or depth)) for i in range((groups or depth) + 1)]
        windows = [range(a, b) for a, b in itertools.pairwise(edges) if a < b]
        found += [(window, f) for window in windows for f in (factor, 1 / factor)]
    return found


def scaled(schedule: Schedule, shape: Sequence[float], cost: MergedFLOPs, bound: float) -> Counts:
    """The fewest pairs, spread over the layers as a shape says, that leave so much of the cost.

    As many as can be merged, where even that leaves more. None before the last pool.
    """
    first = schedule.pools[-1] if schedule.pools else 0
    parts = [weight if layer >= first else 0.0 for layer, weight in enumerate(shape)]
    patches = cost.patches(schedule)
    spread = partial(_spread, parts, patches)
    most = patches * schedule.depth
    return spread(
        bisect_left(range(most), True, key=lambda pairs: cost(schedule, spread(pairs)) <= bound)
    )


def _spread(parts: Sequence[float], patches: int, pairs: int) -> Counts:
    """So many pairs in all, as near to the parts as integers can be; at most half in a layer."""
    sums = [round(pairs * part / sum(parts)) for part in itertools.accumulate(parts)]
    counts = [b - a for a, b in itertools.pairwise([0, *sums])]
    left = tokens_left(patches, 0, counts)
    return tuple(a - b for a, b in itertools.pairwise([patches, *left]))


def combined(
    found: Sequence[Scored], merging: Merging, cost: MergedFLOPs, bound: float, count: int
) -> list[Scored]:
    """Of schedules that cost more than a bound those that, merging too, should lose least.

    What they lose is taken to add up: a schedule, and the merging that leaves so much of its cost.
    So many meet the bound, if there are; with them come those that should lose less but don't.
    """

    def predicted(one: Scored) -> float:
        return one.loss + merging.error(bound / one.cost)

    made: list[Scored] = []
    for one in sorted((one for one in found if one.cost > bound), key=predicted):
        counts = scaled(one.schedule, merging.shape, cost, bound)
        made.append(Scored(predicted(one), cost(one.schedule, counts), one.schedule, counts))
        # After a late pool there is too little to merge.
        if sum(other.cost <= bound for other in made) == count:
            break
    return made
