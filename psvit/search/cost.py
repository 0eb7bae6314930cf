"""What a candidate costs in FLOPs, and the limit that a person sets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..console import short
from ..cost import layer_costs
from .space import Candidate, SearchSpace
from .supernet import skeleton

Measure = Literal["flops", "latency"]

_UNITS: dict[Measure, dict[str, float]] = {
    "flops": {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
_FORM = re.compile(r"\s*(flops|latency)\s*<=\s*(\d+\.?\d*|\.\d+)\s*(\w*)\s*")


def flops(space: SearchSpace, candidate: Candidate) -> int:
    """Of one image, a multiply-add counted as 2: see ``psvit.cost``.

    Raises:
        ValueError: a candidate outside of the space.
    """
    return sum(row.flops for row in layer_costs(skeleton(space, candidate), candidate.schedule))


@dataclass(frozen=True)
class Limit:
    """The most that a candidate may cost.

    Args:
        measure: "flops" of one image, or "latency" in milliseconds.
        value: in FLOPs or milliseconds; with ``relative`` a part of what the largest candidate
            costs.
    """

    measure: Measure
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """From ``flops<=0.5`` (half of the largest candidate's), ``flops<=40M``, ``latency<=3ms``.

        Raises:
            ValueError: anything else.
        """
        form = _FORM.fullmatch(text)
        measure: Measure = "latency" if form and form[1] == "latency" else "flops"
        if form is None or form[3] not in ("", *_UNITS[measure]):
            raise ValueError(
                f'limit: got "{text}", expected for example "flops<=0.5" (of the largest '
                f'candidate), "flops<=40M", "latency<=0.5" or "latency<=3ms"'
            )
        value, unit = float(form[2]), form[3]
        if not unit and not 0 < value <= 1:
            raise ValueError(
                f'limit: got "{text}", expected a part of the largest candidate up to 1, or a unit '
                f"({', '.join(_UNITS[measure])})"
            )
        return cls(measure, value * _UNITS[measure].get(unit, 1.0), relative=not unit)

    def of(self, space: SearchSpace, cost: Callable[[Candidate], float]) -> float:
        """In FLOPs or milliseconds.

        Raises:
            ValueError: the smallest candidate of the space costs more.
        """
        most = self.value * cost(space.largest) if self.relative else self.value
        least = cost(space.smallest)
        if least > most:
            raise ValueError(
                f"limit: got {self.measure} up to {self.show(most)}, but the smallest candidate "
                f"({space.smallest}) costs {self.show(least)} and the largest "
                f"{self.show(cost(space.largest))}"
            )
        return most

    def show(self, cost: float) -> str:
        """A cost with its unit, for people."""
        return short(cost) if self.measure == "flops" else f"{cost:.3g} ms"
