"""Which schedules lose least at each cost, where losses and costs of parts are taken to add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ..schedule import ATTEND, POOL, SHARE, Schedule


@dataclass(frozen=True)
class Losses:
    """What single changes of a model lose.

    Args:
        groups: by (first layer, number of layers), counted from 0: all but the first share its
            map. A group of several layers that isn't there isn't allowed; one layer loses nothing.
        pools: by the layer before which tokens are pooled; others aren't allowed.
    """

    groups: Mapping[tuple[int, int], float]
    pools: Mapping[int, float]


#: Pairs of tokens that each layer merges; none if empty.
Counts = tuple[int, ...]


class Scored(NamedTuple):
    """A schedule with its loss and its cost, sums over its parts; less is better."""

    loss: float
    cost: float
    schedule: Schedule
    merge: Counts = ()

    def __str__(self) -> str:
        pairs = f" merging {', '.join(map(str, self.merge))} pairs" if any(self.merge) else ""
        return f"{self.schedule}{pairs}"


class _Beginning(NamedTuple):
    """Of a schedule: its first layers."""

    loss: float
    cost: float
    text: str


def front(
    depth: int, losses: Losses, cost: Callable[[str, int], float], *, pools: int = 1
) -> list[Scored]:
    """The schedules that no other beats in both loss and cost, the dearest first.

    Dynamic programming over the layers: of all beginnings with as many layers and pools, those
    that another beats are dropped, whatever comes after them.

    Args:
        depth: number of layers.
        losses: of groups and pools.
        cost: of a layer, by its kind ("A" or "S") and the number of pools before it.
        pools: at most so many.
    """
    reached: dict[tuple[int, int], list[_Beginning]] = {(0, 0): [_Beginning(0.0, 0.0, "")]}
    lengths = {1, *(length for _, length in losses.groups)}
    for layer in range(depth):
        for stage in range(pools + 1):
            beginnings = unbeaten(reached.pop((layer, stage), []))
            for end, after, more in _groups(layer, stage, lengths, losses, cost, pools):
                if end <= depth:
                    reached.setdefault((end, after), []).extend(
                        _Beginning(b.loss + more.loss, b.cost + more.cost, b.text + more.text)
                        for b in beginnings
                    )
    whole = [b for (end, _), found in reached.items() if end == depth for b in found]
    return [Scored(b.loss, b.cost, Schedule(b.text)) for b in reversed(unbeaten(whole))]


def _groups(
    layer: int,
    stage: int,
    lengths: set[int],
    losses: Losses,
    cost: Callable[[str, int], float],
    pools: int,
) -> Iterator[tuple[int, int, _Beginning]]:
    """What may come next at a layer: (layer after it, its stage, what it adds)."""
    pooled = [(stage, 0.0, "")]
    if layer in losses.pools and stage < pools:
        pooled.append((stage + 1, losses.pools[layer], POOL))
    for after, loss, text in pooled:
        for length in lengths:
            shared = losses.groups.get((layer, length), 0.0 if length == 1 else None)
            if shared is not None:
                price = cost(ATTEND, after) + (length - 1) * cost(SHARE, after)
                kinds = text + ATTEND + SHARE * (length - 1)
                yield layer + length, after, _Beginning(loss + shared, price, kinds)


_Any = TypeVar("_Any", _Beginning, Scored)


def unbeaten(ones: list[_Any]) -> list[_Any]:
    """The cheapest first; costs that differ by their rounding alone are equal."""
    found: list[_Any] = []
    for one in sorted(ones, key=lambda one: (float(f"{one.cost:.9g}"), one.loss, str(one[2]))):
        if not found or one.loss < found[-1].loss:
            found.append(one)
    return found
