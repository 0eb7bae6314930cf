"""Evolution of candidates under a limit, and random search beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from ..schedule import Schedule
from .pareto import Score, front, select
from .space import Candidate, SearchSpace

#: Draws in a row that bring nothing new, after which a generation stays smaller.
_TRIES = 300


class RandomSearch:
    """Evaluates random candidates under a limit, generation by generation.

    The first of all is the smallest candidate. What is found depends on the generators that it is
    given, the accuracies and the costs alone.

    Args:
        space: what to choose from.
        accuracy: of a candidate, 0 to 1; asked once for each.
        cost: of a candidate.
        limit: the highest cost allowed, no less than that of the smallest candidate.
        population: candidates evaluated in each generation.
    """

    def __init__(
        self,
        space: SearchSpace,
        accuracy: Callable[[Candidate], float],
        cost: Callable[[Candidate], float],
        limit: float,
        population: int,
    ) -> None:
        self.space = space
        self.accuracy = accuracy
        self.cost = cost
        self.limit = limit
        self.population = population
        self.evaluated: dict[Candidate, Score] = {}
        self.done = 0

    def generation(self, rng: Random, step: Callable[[], object] = lambda: None) -> None:
        """Proposes candidates that are new and within the limit, and evaluates them.

        They are fewer than ``population`` where hardly any are left. ``step`` is called after each.
        """
        for candidate, cost in self._new(rng).items():
            self.evaluated[candidate] = Score(self.accuracy(candidate), cost)
            step()
        self.done += 1

    def front(self) -> list[Candidate]:
        """Of all evaluated those that none dominates, the cheapest first."""
        candidates = list(self.evaluated)
        return [candidates[i] for i in front(list(self.evaluated.values()))]

    def state_dict(self) -> dict[str, Any]:
        """Plain values: all that the next generation depends on, but for its generator."""
        rows = [[c.schedule.text, *c.widths, *score] for c, score in self.evaluated.items()]
        return {"done": self.done, "evaluated": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]
        self.evaluated = {
            Candidate(Schedule(text), tuple(widths)): Score(accuracy, cost)
            for text, *widths, accuracy, cost in state["evaluated"]
        }

    def _proposed(self, rng: Random) -> Candidate:
        return self.space.sample(rng)

    def _new(self, rng: Random) -> dict[Candidate, float]:
        """With their costs."""
        found: dict[Candidate, float] = {}
        if not self.evaluated:
            found[self.space.smallest] = self.cost(self.space.smallest)
        vain = 0
        while len(found) < self.population and vain < _TRIES:
            candidate = self._proposed(rng)
            vain += 1
            if candidate in self.evaluated or candidate in found:
                continue
            cost = self.cost(candidate)
            if cost <= self.limit:
                found[candidate] = cost
                vain = 0
        return found


class Evolution(RandomSearch):
    """Keeps the best of each generation, and breeds the next from them.

    The first generation is random. Then the ``population`` best of all evaluated (by Pareto front
    of accuracy against cost, lonely ones first) are parents: two tournaments of two choose a pair,
    a child takes each stage from one of them and is mutated. Children over the limit are rejected.

    Source: NSGA-II (Deb, Pratap, Agarwal, Meyarivan 2002); for supernets: single path one-shot,
    arXiv 1904.00420, section 3.4.
    """

    _parents: tuple[Candidate, ...] = ()

    def generation(self, rng: Random, step: Callable[[], object] = lambda: None) -> None:
        candidates = list(self.evaluated)
        best = select(list(self.evaluated.values()), self.population)
        self._parents = tuple(candidates[i] for i in best)
        super().generation(rng, step)

    def _proposed(self, rng: Random) -> Candidate:
        if not self._parents:
            return super()._proposed(rng)
        a, b = self._parent(rng), self._parent(rng)
        return self.space.mutate(self.space.crossover(a, b, rng), rng)

    def _parent(self, rng: Random) -> Candidate:
        """The better of two: parents stand in order."""
        return self._parents[min(rng.randrange(len(self._parents)) for _ in range(2))]
