"""One character a layer: which layers attend, which share a map, and where tokens are pooled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from .cost import LayerCost
    from .pooling import Kind

ATTEND, SHARE, POOL = "A", "S", "|"


@dataclass(frozen=True, repr=False)
class Schedule:
    """What each layer of a vision transformer does, read left to right.

    ``A`` attends; ``S`` shares the map of the nearest ``A`` before it; ``|`` pools the tokens
    between two layers. An ``S`` may not reach across a pool, unless maps are carried over.
    Schedules are immutable, hashable, equal if their text is equal, and print as their text.

    Args:
        text: for example ``"AASA|ASSS"``: eight layers, four of them sharing, one pool.
        carried: whether an ``S`` may stand after a pool: it applies what the pool makes of the map,
            which the pools "avg" and "stride" can (``GridPool.groups``).

    Raises:
        ValueError: a text that is no schedule; the message names the layer, counted from 1.
        TypeError: not a string.

    Source: PSViT, arXiv 2108.03428, section 3.
    """

    text: str
    carried: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.text, self.carried)

    @classmethod
    def parse(
        cls, text: str | Schedule, depth: int | None = None, *, carried: bool = False
    ) -> Schedule:
        """A schedule from its text, held against the depth of a model if one is given.

        Raises:
            ValueError: a text that is no schedule, or one of another depth.
            TypeError: neither a string nor a schedule.
        """
        if isinstance(text, cls):
            _check(text.text, carried)
        schedule = text if isinstance(text, cls) else cls(text, carried)  # type: ignore[arg-type]
        if depth is not None and schedule.depth != depth:
            raise ValueError(
                f'schedule "{schedule}": has {_count(schedule.depth, "layer")}, '
                f"expected {depth} as the model"
            )
        return schedule

    @classmethod
    def enumerate(
        cls, depth: int, *, pools: int | None = None, shared: int | None = None
    ) -> Iterator[Schedule]:
        """Every valid schedule of a depth, each once, fewest pools and sharing layers first.

        Args:
            depth: number of layers.
            pools: only those with so many pools; None: any number.
            shared: only those with so many sharing layers; None: any number.
        """
        if depth < 1:
            raise ValueError(f"depth: got {depth}, expected 1 or more")
        for count in range(depth) if pools is None else (pools,):
            for places in itertools.combinations(range(1, depth), count):
                free = [i for i in range(1, depth) if i not in places]
                for sharing in range(len(free) + 1) if shared is None else (shared,):
                    for layers in itertools.combinations(free, sharing):
                        yield cls(_text(depth, places, layers))

    @cached_property
    def kinds(self) -> str:
        """``A`` or ``S`` of each layer."""
        return self.text.replace(POOL, "")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.kinds)

    @cached_property
    def pools(self) -> tuple[int, ...]:
        """Layers before which tokens are pooled, counted from 0."""
        return tuple(itertools.accumulate(map(len, self.text.split(POOL)[:-1])))

    @cached_property
    def donors(self) -> tuple[int, ...]:
        """For each layer the layer whose map it applies, counted from 0: its own if it attends."""
        attending = (i if kind == ATTEND else 0 for i, kind in enumerate(self.kinds))
        return tuple(itertools.accumulate(attending, max))

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Layers that see the same tokens, counted from 0."""
        edges = (0, *self.pools, self.depth)
        return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(edges))

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Each attending layer with those that share its map, counted from 0."""
        return tuple(
            tuple(i for i, donor in enumerate(self.donors) if donor == first)
            for first in sorted(set(self.donors))
        )

    @property
    def shared(self) -> int:
        """Number of sharing layers."""
        return self.kinds.count(SHARE)

    @property
    def is_plain(self) -> bool:
        """True if every layer attends and no tokens are pooled: an ordinary transformer."""
        return self.text == ATTEND * self.depth

    def rows(
        self,
        model: nn.Module,
        *,
        pool: Kind = "max",
        dims: Literal[1, 2] = 2,
        merge: int | Sequence[int] = 0,
    ) -> list[LayerCost]:
        """Cost of each layer of ``model`` under this schedule: see ``psvit.cost.layer_costs``."""
        from .cost import layer_costs

        return layer_costs(model, self, pool=pool, dims=dims, merge=merge)

    def flops(
        self,
        model: nn.Module,
        *,
        pool: Kind = "max",
        dims: Literal[1, 2] = 2,
        merge: int | Sequence[int] = 0,
    ) -> int:
        """FLOPs of one image through ``model`` under this schedule, a multiply-add counted as 2."""
        return sum(row.flops for row in self.rows(model, pool=pool, dims=dims, merge=merge))

    def params(self, model: nn.Module, *, pool: Kind = "max", dims: Literal[1, 2] = 2) -> int:
        """Parameters of ``model`` that take part: without Q and K of the sharing layers."""
        return sum(row.params for row in self.rows(model, pool=pool, dims=dims))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f'Schedule("{self.text}")'


def _text(depth: int, pools: tuple[int, ...], sharing: tuple[int, ...]) -> str:
    return "".join(POOL * (i in pools) + (SHARE if i in sharing else ATTEND) for i in range(depth))


def _check(text: str, carried: bool) -> None:
    if not isinstance(text, str):
        raise TypeError(f'schedule: got {type(text).__name__}, expected a string as "AASA|ASSS"')

    def fail(what: str) -> ValueError:
        return ValueError(f'schedule "{text}": {what}')

    if not text:
        raise fail("is empty; expected one A or S for each layer")
    for place, character in enumerate(text, 1):
        if character not in (ATTEND, SHARE, POOL):
            raise fail(
                f'character {place} is "{character}", expected A (attend), S (share) or | (pool)'
            )
    if text.startswith(POOL) or text.endswith(POOL):
        where = "starts" if text.startswith(POOL) else "ends"
        raise fail(f"{where} with a pool; a pool stands between two layers")
    layer = 0
    for before, character in zip(POOL + text, text, strict=False):
        layer += character != POOL
        if before == character == POOL:
            raise fail(f"has two pools after layer {layer}; expected a layer between them")
        if before == POOL and character == SHARE and layer == 1:
            raise fail("layer 1 shares, but none attends before it; start with A")
        if before == POOL and character == SHARE and not carried:
            raise fail(f"layer {layer} shares across a pool; start each stage with A")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
