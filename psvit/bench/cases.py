"""What is timed: each case is one thing that psvit does, and what people write without it.

A case says its contenders by name without allocating anything; ``build`` makes the inputs. All
contenders of a case compute the same function of the same random inputs, or, where one of them
returns less (SDPA returns no map), a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch


class UnavailableError(Exception):
    """A case that can't be run here; the message says why."""


@dataclass(frozen=True)
class Bar:
    """A speed-up to reach: median of (time of the baseline / time of psvit) / ``Work.per``."""

    must: float | None = None
    moonshot: float | None = None


@dataclass
class Work:
    """A case with its inputs made.

    Args:
        psvit: the thing measured; returns a tensor or a tuple of tensors, comparable to ``exact``.
        baselines: the same, by name.
        exact: makes the results in float64.
        eager: what plain PyTorch gives in the dtype of the case: its error is the measure.
        flops: multiplications and additions of matrix products, the fewest that will do.
        nbytes: each input once, each output once, no padding.
        per: what each speed-up is divided by before it meets its bar (ratio of FLOPs of models).
    """

    psvit: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    exact: Callable[[], Any]
    eager: Callable[[], Any]
    flops: float | None
    nbytes: float | None
    per: float = 1.0


@dataclass(frozen=True)
class Case:
    """One row of the table: a name, bars by baseline, and how to make the inputs."""

    name: str
    dtype: torch.dtype
    bars: dict[str, Bar]
    build: Callable[[], Work]
    grad: bool = False

    @property
    def contenders(self) -> tuple[str, ...]:
        return ("psvit", *self.bars)


def select(pattern: str | None, cases: Sequence[Case] | None = None) -> list[Case]:
    """Cases whose name matches a glob, or contains the text if it has no wildcard; all for None.

    Raises:
        ValueError: no case matches.
    """
    cases = all_cases() if cases is None else list(cases)
    if pattern is None:
        return cases
    glob = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    chosen = [case for case in cases if fnmatchcase(case.name, glob)]
    if not chosen:
        families = ", ".join(dict.fromkeys(case.name.split("/")[0] for case in cases))
        raise ValueError(
            f'--cases: got "{pattern}", which no case matches; expected a glob or a part of a '
            f"name such as {cases[0].name}; families: {families}"
        )
    return chosen


def all_cases() -> list[Case]:
    """Every case, in the order of the table: float32 with its bars, then what has none."""
    from .cores import core_cases
    from .merging import merge_case
    from .model import model_cases

    first, last = ([*core_cases(t), merge_case(t)] for t in (torch.float32, torch.bfloat16))
    return [*first, *model_cases(), *last]
