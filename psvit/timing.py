"""Latency of several functions, measured so that they can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, the 20th and 80th percentile, and the number of calls."""

    median: float
    p20: float
    p80: float
    calls: int

    def to_dict(self) -> dict[str, float]:
        return {
            "median_ms": round(self.median, 4),
            "p20_ms": round(self.p20, 4),
            "p80_ms": round(self.p80, 4),
            "calls": self.calls,
        }


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 200),
    step: Callable[[], object] = lambda: None,
) -> dict[str, Latency]:
    """Calls all functions in turn, round after round, so that a slow moment hits them alike.

    Args:
        functions: what to time, by name. Each is called twice before the first round.
        seconds: stop after about this much time.
        rounds: at least and at most so many calls of each.
        step: called after each round, for a progress bar.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for function in functions.values():
            function()
            function()
        end = time.perf_counter() + seconds
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() > end:
                break
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
            step()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Latency:
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return Latency(float(median), float(p20), float(p80), len(values))
