"""Correctness before speed: the project's bar, on the device, on the inputs that are timed.

The bar itself is that of the tests (``tests/accuracy.py``): per element at most twice eager's error
in the same dtype plus a floor of rounding. Oracles in float64 are made for a few batches at a
time, which keeps their memory small.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic as _deterministic

Results = dict[str, Tensor]

deterministic: Any = _deterministic  # its setting is a property of the module

#: Bytes of one float64 map of a chunk; an oracle holds about ten of that size.
CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class Error:
    """Largest absolute errors against float64: psvit's, and eager PyTorch's."""

    psvit: float = 0.0
    eager: float = 0.0


@dataclass(frozen=True)
class Oracle:
    """What results of some batches should be, what eager PyTorch makes of the same inputs, and
    the magnitudes of which errors are fractions (see ``tests/accuracy.py``)."""

    exact: Results
    eager: Results
    magnitude: Results


def check(run: Callable[[], Results], oracle: Callable[[slice], Oracle], step: int) -> Error:
    """Runs psvit into memory that is NaN, and holds every element against the bar.

    It runs twice: where PyTorch fills fresh memory, kernels keep to the first of their
    configurations; the one that is timed gets back memory that was filled here.

    Args:
        run: results of psvit by name, batch first.
        oracle: the same for a slice of the batch.
        step: batches at a time.

    Raises:
        AssertionError: psvit misses the bar; says where and by how much.
    """
    with nan_in_fresh_memory():
        first = run()
    for spoilt in run().values():
        spoilt.fill_(math.nan)
    del spoilt
    return hold((first, run()), oracle, step)


def hold(runs: Sequence[Results], oracle: Callable[[slice], Oracle], step: int) -> Error:
    """Every element of the results of some runs against the bar; as ``check``."""
    error = Error()
    batch = len(next(iter(runs[0].values())))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        expected = oracle(part)
        for results in runs:
            error = _worse(error, {name: t[part] for name, t in results.items()}, expected)
    return error


def _worse(error: Error, got: Results, oracle: Oracle) -> Error:
    of_tests("accuracy").assert_all_accurate(got, oracle.exact, oracle.eager, oracle.magnitude)
    return Error(
        max(error.psvit, _largest(got, oracle.exact)),
        max(error.eager, _largest(oracle.eager, oracle.exact)),
    )


def _largest(got: Results, exact: Results) -> float:
    return max((got[name].double() - exact[name]).abs().max().item() for name in exact)


def chunk(b: int, h: int, n: int) -> int:
    """Batches whose maps in float64 fit in CHUNK_BYTES; one at least."""
    return min(b, max(1, math.floor(CHUNK_BYTES / (8 * h * n * n))))


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty and its like start as NaN, so that what a kernel forgets to write shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def of_tests(name: str) -> ModuleType:
    """``tests/NAME.py`` of this checkout."""
    folder = str(Path(__file__).resolve().parents[2] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
