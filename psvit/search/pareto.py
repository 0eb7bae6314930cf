"""Which candidates no other one beats in both accuracy and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """Accuracy, 0 to 1, more is better; cost, less is better."""

    accuracy: float
    cost: float

    def dominates(self, other: Score) -> bool:
        """No worse in both, better in one."""
        return self != other and self.accuracy >= other.accuracy and self.cost <= other.cost


def front(scores: Sequence[Score]) -> list[int]:
    """Those that none dominates, the cheapest first; of equal ones the first."""
    found: list[int] = []
    order = sorted(range(len(scores)), key=lambda i: (scores[i].cost, -scores[i].accuracy, i))
    for i in order:
        if not found or scores[i].accuracy > scores[found[-1]].accuracy:
            found.append(i)
    return found


def select(scores: Sequence[Score], count: int) -> list[int]:
    """The best ``count``, best first: by front, and within a front the loneliest first.

    Source: NSGA-II (Deb, Pratap, Agarwal, Meyarivan 2002), sections III-A and III-B.
    """
    chosen: list[int] = []
    rest = list(range(len(scores)))
    while rest and len(chosen) < count:
        best = [i for i in rest if not any(scores[j].dominates(scores[i]) for j in rest)]
        room = _crowding([scores[i] for i in best])
        order = sorted(range(len(best)), key=lambda place: -room[place])
        chosen += [best[place] for place in order]
        rest = [i for i in rest if i not in best]
    return chosen[:count]


def _crowding(scores: Sequence[Score]) -> list[float]:
    """How far apart the neighbours of each are; infinite at the ends."""
    room = [0.0] * len(scores)
    for axis in range(2):
        order = sorted(range(len(scores)), key=lambda i: scores[i][axis])
        low, high = scores[order[0]][axis], scores[order[-1]][axis]
        room[order[0]] = room[order[-1]] = math.inf
        for before, i, after in zip(order, order[1:], order[2:], strict=False):
            room[i] += (scores[after][axis] - scores[before][axis]) / (high - low or 1)
    return room


def reach(scores: Sequence[Score], low: float, high: float) -> float:
    """The best accuracy at most so dear, as the mean over all costs from ``low`` to ``high``.

    It is the area that the front dominates (hypervolume), over the width of the interval; 0 counts
    where nothing is as cheap.
    """
    area, best, cost = 0.0, 0.0, low
    for score in sorted(scores, key=lambda score: score.cost):
        here = min(max(score.cost, low), high)
        area += best * (here - cost)
        cost = here
        best = max(best, score.accuracy)
    return (area + best * (high - cost)) / (high - low) if high > low else best
