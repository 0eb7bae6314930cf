"""How a case is measured: first its error, then its time beside its baselines in turn.

CPU figures are ratios within one run. Contenders take turns (A B C A B C ...), so that a slow
moment of the machine hits them alike; a speed-up is the median of the ratios of single rounds.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from psvit_kernels import use
from psvit_kernels.registry import PREFERENCE

from .cases import Case, UnavailableError, Work
from .noise import Others

#: A call that takes at least this long is timed by itself; shorter ones in a loop of about twice
#: this length, so that reading the clock costs less than a thousandth.
SINGLE_CALL_NS = 50_000

#: Rounds when none are asked for: as many as fit in the time, within the last two. Where a round
#: takes long, the first will do once four times the time is over.
ROUNDS = (5, 11, 200)
SECONDS = 2.0

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; ``inner`` calls were timed together in each of the rounds.

    The fastest round tells most where others use the machine; bars are held to medians.
    """

    median: float
    p20: float
    p80: float
    fastest: float
    rounds: int
    inner: int


@dataclass(frozen=True)
class Gate:
    """Largest error against float64, of the output where it is worst compared with eager's."""

    error: float
    eager_error: float
    floor: float

    @property
    def open(self) -> bool:
        return self.error <= self.limit

    @property
    def limit(self) -> float:
        return 2 * self.eager_error + self.floor


@dataclass(frozen=True)
class Comparison:
    """Speed-up over one baseline: quantiles of the ratios of single rounds, over ``per``."""

    baseline: str
    speedup: float
    p20: float
    p80: float
    per: float
    must: float | None
    moonshot: float | None

    @property
    def value(self) -> float:
        """What is held against the bars."""
        return self.speedup / self.per

    @property
    def reached(self) -> bool | None:
        return None if self.must is None else self.value >= self.must

    @property
    def moonshot_reached(self) -> bool | None:
        return None if self.moonshot is None else self.value >= self.moonshot


@dataclass
class Row:
    """Everything known of one case. Without ``timings`` it was refused, or can't be run here.

    ``others`` is the share of all cores that other processes used while it was timed.
    """

    case: str
    dtype: str
    status: str = "measured"  # or "refused" or "unavailable"
    reason: str | None = None
    gate: Gate | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    flops: float | None = None
    nbytes: float | None = None
    others: float | None = None


# --- one case -------------------------------------------------------------------------------


def measure(
    case: Case,
    provider: str,
    *,
    rounds: int | None = None,
    seconds: float = SECONDS,
    step: Callable[[float], None] = lambda done: None,
) -> Row:
    """Runs one case with the provider pinned; the speed only if the error allows it.

    Args:
        case: what to run.
        provider: of psvit_kernels; one that can't serve the case makes the row "unavailable".
        rounds: exactly so many; as many as fit in ``seconds`` if None.
        step: called between rounds with the share that is done.
    """
    row = Row(case.name, str(case.dtype).removeprefix("torch."))
    try:
        with use(provider):
            work = case.build()
            row.flops, row.nbytes = work.flops, work.nbytes
            with torch.enable_grad() if case.grad else torch.inference_mode():
                row.gate = check(work, case.dtype)
                if not row.gate.open:
                    row.status, row.reason = "refused", _refusal(row.gate)
                    return row
                contenders = {"psvit": work.psvit} | {n: work.baselines[n] for n in case.bars}
                others = Others()
                times, inner = interleave(contenders, rounds, seconds, step)
                row.others = others()
                row.peak_bytes = {name: peak_bytes(f) for name, f in contenders.items()}
    except UnavailableError as missing:
        row.status, row.reason = "unavailable", str(missing)
        return row
    except ValueError as refused:
        if not str(refused).startswith('provider "'):
            raise
        row.status, row.reason = "unavailable", str(refused)
        return row
    row.timings = {name: _timing(times[name], inner[name]) for name in times}
    row.comparisons = [_compare(name, case, work, times) for name in case.bars]
    return row


def _refusal(gate: Gate) -> str:
    return (
        f"error {gate.error:.2g} is over its limit {gate.limit:.2g} "
        f"(2 x eager's {gate.eager_error:.2g} + {gate.floor:.2g}): no speed is reported"
    )


def _timing(times: np.ndarray, inner: int) -> Timing:
    p20, median, p80, fastest = (float(t) / 1e3 for t in np.percentile(times, (20, 50, 80, 0)))
    return Timing(median, p20, p80, fastest, len(times), inner)


def _compare(name: str, case: Case, work: Work, times: Mapping[str, np.ndarray]) -> Comparison:
    p20, median, p80 = np.percentile(times[name] / times["psvit"], (20, 50, 80))
    bar = case.bars[name]
    return Comparison(name, float(median), float(p20), float(p80), work.per, bar.must, bar.moonshot)


def interleave(
    contenders: Mapping[str, Function],
    rounds: int | None = None,
    seconds: float = SECONDS,
    step: Callable[[float], None] = lambda done: None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Nanoseconds of one call in each round, by contender, and the calls in each sample."""
    inner = {}
    for name, function in contenders.items():
        function()
        function()
        lasts = _sample(function, 3)
        inner[name] = 1 if lasts >= SINGLE_CALL_NS else int(2 * SINGLE_CALL_NS // lasts) + 1
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.monotonic()
    with _no_collection():
        for done in itertools.count(1):
            for name, function in contenders.items():
                times[name].append(_sample(function, inner[name]))
            share = done / rounds if rounds else _share(done, (time.monotonic() - start) / seconds)
            step(min(share, 1.0))
            if share >= 1:
                break
    return {name: np.array(values) for name, values in times.items()}, inner


def _share(done: int, spent: float) -> float:
    """How much of the rounds is done, after so many and so much of the time."""
    few, enough, most = ROUNDS
    return max(min(spent, done / enough), min(spent / 4, done / few), done / most)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _sample(function: Function, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return max(time.perf_counter_ns() - start, 1) / calls


# --- error ----------------------------------------------------------------------------------


def check(work: Work, dtype: torch.dtype) -> Gate:
    """The output where psvit is worst, compared with what eager's error allows it."""
    exact = _tensors(work.exact())
    psvit, eager = (_tensors(function()) for function in (work.psvit, work.eager))
    gates = [_gate(*outputs, dtype) for outputs in zip(psvit, eager, exact, strict=True)]
    return max(gates, key=_severity)


def _severity(gate: Gate) -> float:
    if gate.error == 0:
        return 0.0
    share = gate.error / gate.limit if gate.limit else float("inf")
    return share if share == share else float("inf")


def _gate(psvit: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> Gate:
    if psvit.shape != exact.shape:
        raise AssertionError(f"shapes differ: {tuple(psvit.shape)} and {tuple(exact.shape)}")
    error, eager_error = ((t.double() - exact).abs().max().item() for t in (psvit, eager))
    return Gate(error, eager_error, torch.finfo(dtype).eps * exact.abs().max().item())


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# --- memory ---------------------------------------------------------------------------------


def peak_bytes(function: Function) -> int | None:
    """Most memory that PyTorch's allocator held for one call beyond its inputs, its results among
    it; None if this PyTorch can't tell. Scratch that a compiled kernel gets elsewhere is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to stderr
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            result = function()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
    except (AttributeError, RuntimeError):
        return None
    del result
    return peak


# --- what is pinned -------------------------------------------------------------------------


@contextmanager
def pinned_sdpa() -> Iterator[str]:
    """Forces one backend of PyTorch's fused attention, and gives its name."""
    x = torch.zeros(1, 1, 2, 8)
    name, backend = "flash", SDPBackend.FLASH_ATTENTION
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        name, backend = "math", SDPBackend.MATH
    with sdpa_kernel(backend):
        yield name


def best_provider() -> tuple[str, str | None]:
    """The compiled provider, or the reference and the reason why it has to serve."""
    from psvit_kernels import attention

    x = torch.zeros(1, 1, 4, 8)
    compiled = PREFERENCE["cpu"][0]
    try:
        with use(compiled):
            partial(attention, return_map="dense")(x, x, x)
    except ValueError as reason:
        return "reference", str(reason)
    return compiled, None
