"""Latency of several functions, measured so that they can be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Key = TypeVar("Key")


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


def unsteady(latencies: Iterable[Mapping[str, float]]) -> str | None:
    """A remark if latencies (by their ``to_dict``) say that the machine was busy, or None."""
    spread = max(latency["p80_ms"] / latency["p20_ms"] for latency in latencies)
    if spread < 1.5:
        return None
    return (
        f"Latencies varied by {spread:.1f}x within the run (80th over 20th percentile): other work "
        "keeps this machine busy, so measure again when it is quiet, or with --threads 1."
    )


def interleaved(
    functions: Mapping[Key, Callable[[], object]],
    *,
    seconds: float = 5.0,
    rounds: tuple[int, int] = (5, 300),
    step: Callable[[float], object] = lambda part: None,
) -> dict[Key, Latency]:
    """Calls all functions in turn, round after round, so that a slow moment hits them alike.

    Args:
        functions: what to time, by name. Each is called twice before the first round.
        seconds: stop after about this much time.
        rounds: at least and at most so many calls of each.
        step: called after each round with the part of the work that it was, for a progress bar.
    """
    times: dict[Key, list[float]] = {name: [] for name in functions}
    done = 0.0
    with torch.inference_mode():
        for function in functions.values():
            function()
            function()
        begin = time.perf_counter()
        for count in range(1, rounds[1] + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
            elapsed = (time.perf_counter() - begin) / max(seconds, 1e-9)
            before, done = done, max(count / rounds[1], min(count / rounds[0], elapsed, 1))
            step(done - before)
            if done >= 1:
                break
    return {name: _summary(values) for name, values in times.items()}


def waiting(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function, after which all that it began on a GPU is done."""
    if device.type != "cuda":
        return function

    def call() -> None:
        function()
        torch.cuda.synchronize(device)

    return call


def _summary(values: list[float]) -> Latency:
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return Latency(float(median), float(p20), float(p80), len(values))
