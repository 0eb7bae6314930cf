"""A session on one device: case after case, correctness first, results written after each.

The file holds every row from the start, as "not measured". What ends the session early, the end of
its time or of its process, leaves the rows that were not reached as they are.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from . import rows
from .clock import Call, Sampler
from .contender import Contender, Subject, Work
from .providers import is_refusal
from .rows import Case
from .work import build

SCHEMA = 1
KIND = "psvit gpu bench"
FILE = "gpu.json"

NOT_MEASURED, MEASURED = "not measured", "measured"
WRONG, ERROR, REFUSED = "FAILED correctness", "error", "refused"

#: Of a row of new kernels that ``trial`` has not let through.
UNTRIED = "not tried in a process of its own: the time for that was over"

#: Rounds of a case: so many at least, more while they fit in the seconds.
ROUNDS = (50, 200)
SECONDS = 1.0

#: No case starts when less of the budget is left: about what a case takes whose kernels are new.
RESERVE = 30.0

METHOD = (
    "contenders take turns; captured: one CUDA graph of several calls on distinct inputs, cold "
    "cache, device events; wall: a loop over the same calls; a sample is the mean of its calls; "
    "medians with p20 and p80; a speed-up is the median of the ratios of single rounds"
)


class Clock(Protocol):
    """What a session asks of a device; see ``CudaClock``."""

    name: str

    def sets(self, nbytes: float) -> int: ...
    def warm_up(self, calls: Sequence[Call]) -> None: ...
    def captured(self, calls: Sequence[Call]) -> Sampler: ...
    def wall(self, calls: Sequence[Call]) -> Sampler: ...
    def peak_bytes(self, call: Call) -> int | None: ...
    def launches(self, call: Call) -> list[str] | None: ...
    def check_health(self) -> None: ...
    def release(self) -> None: ...


Record = dict[str, Any]


class DeviceLostError(Exception):
    """The device no longer answers in this process; another process may go on."""


class Store:
    """The results in a file that is whole at every moment."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.data: Record = {}

    def create(self, cases: Sequence[Case]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.data = {"schema": SCHEMA, "kind": KIND, "method": METHOD}
        self.data["cases"] = {case.name: blank(case) for case in cases}
        self.save()

    def load(self) -> None:
        self.data = json.loads(self.file.read_text())

    def save(self) -> None:
        unfinished = self.file.with_suffix(f".{os.getpid()}.unfinished")
        try:
            unfinished.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
            os.replace(unfinished, self.file)
        finally:
            unfinished.unlink(missing_ok=True)

    def case(self, name: str) -> Record:
        return self.data["cases"][name]


def blank(case: Case) -> Record:
    """A case of which nothing is known yet."""
    empty = {"status": NOT_MEASURED, "reason": None}
    described = {"kind": case.kind, "shape": list(case.shape), "dtype": case.dtype}
    return empty | described | {"rows": {name: dict(empty) for name in case.rows}}


def run(
    store: Store,
    cases: Sequence[Case],
    clock: Clock,
    *,
    device: str,
    deadline: float,
    reserve: float = RESERVE,
    rounds: tuple[int, int] = ROUNDS,
    say: Callable[[str], None] = print,
) -> None:
    """Measures the cases that nobody has tried yet, until the time is over.

    Args:
        deadline: on the clock of ``time.time``.
        reserve: seconds that must be left for a case to start.

    Raises:
        DeviceLostError: what was measured is stored, and so is who must not be tried again.
    """
    for case in cases:
        record = store.case(case.name)
        if record["status"] != NOT_MEASURED:
            continue
        began = time.time()
        if began > deadline - reserve:
            record["reason"] = "the time was over"
            store.save()
            continue
        record.update(status="running", began=began)
        store.save()
        try:
            _attempt(case, clock, device, rounds, record)
        finally:
            del record["began"]
            record["seconds"] = round(time.time() - began, 1)
            store.save()
            say(_progress(case, record))


def _attempt(
    case: Case, clock: Clock, device: str, rounds: tuple[int, int], record: Record
) -> None:
    """Whatever goes wrong is this case's own, unless it takes the device along."""
    try:
        measure(case, clock, device, rounds, record)
        record["status"] = "done"
    except DeviceLostError:
        record["status"] = NOT_MEASURED
        raise
    except Exception as error:
        give_up(record, _words(error))
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # or the next shapes meet the limit of recompilations
    gc.collect()
    survive("", clock, record)


def give_up(record: Record, reason: str, status: str = ERROR) -> None:
    """Says of the case, and of its rows that are still open, why they have no figures."""
    record.update(status=status, reason=reason)
    for row in record["rows"].values():
        if row["status"] == NOT_MEASURED:
            row.update(status=status, reason=reason)


def survive(name: str, clock: Clock, record: Record) -> None:
    """After an error of a contender: raises DeviceLostError if it took the device along."""
    try:
        clock.release()
        clock.check_health()
    except Exception as error:
        if name:
            record.setdefault("lost", []).append(name)
        raise DeviceLostError(_words(error)) from error


def _progress(case: Case, record: Record) -> str:
    states = ", ".join(f"{name} {row['status']}" for name, row in record["rows"].items())
    return f"{record['seconds']:6.1f} s  {case.name}: {states}"


def _words(error: BaseException) -> str:
    """Type and message on one line, not too long for a table's footnote or the file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


# --- one case -------------------------------------------------------------------------------


def measure(case: Case, clock: Clock, device: str, rounds: tuple[int, int], record: Record) -> None:
    """Fills the record of a case."""
    with torch.no_grad():
        itemsize = getattr(torch, case.dtype).itemsize
        counts = {name: rows.counts(case, name, itemsize) for name in case.rows}
        sets = clock.sets(min(nbytes for _, nbytes in counts.values()))
        record["sets"] = sets
        work = build(case, sets, device)
        record["contenders"] = {}
        subjects = _correct_subjects(work, clock, record)
        if not subjects:
            return
        contenders = subjects | _baselines(work, clock, record)
        _time(contenders, clock, rounds, record)
        if work.automatic is not None:
            record["automatic"] = _attempted(work.automatic)
        for name, contender in contenders.items():
            entry = record["contenders"][name]
            if entry["wall"] is not None:
                _look(contender, clock, case.launches, entry)
    for name, subject in subjects.items():
        row = record["rows"][name]
        if row["status"] == NOT_MEASURED:
            row["flops"], row["bytes"] = counts[name]
            row["map_bytes"] = rows.map_bytes(case, name, itemsize)
            row |= subject.facts
            row["status"] = MEASURED


def _correct_subjects(work: Work, clock: Clock, record: Record) -> dict[str, Subject]:
    """Those rows whose results are right."""
    found = {}
    for name, row in record["rows"].items():
        if row["status"] != NOT_MEASURED:
            continue  # it has an outcome, from its trial or from before the device was lost
        if rows.is_new(name) and not row.get("tried"):
            row["reason"] = UNTRIED
            continue
        subject = right(work, name, row)
        if subject is not None:
            found[name] = subject
        elif row["status"] == ERROR:
            survive(name, clock, record)
    return found


def right(work: Work, name: str, row: Record) -> Subject | None:
    """The subject of a row if its results are right; else the row says why it has no speed."""
    try:
        subject = work.subject(name)
        with subject.pinned():
            largest = subject.check()
    except AssertionError as miss:
        row.update(status=WRONG, reason=_words(miss))
    except Exception as error:
        row.update(status=REFUSED if is_refusal(error) else ERROR, reason=_words(error))
    else:
        row["error"] = {"psvit": largest.psvit, "eager": largest.eager}
        row["stored_map_bytes"] = subject.map_nbytes
        return subject
    return None


def _baselines(work: Work, clock: Clock, record: Record) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for name, make in work.baselines.items():
        if name in record.get("lost", ()):
            record["contenders"][name] = _entry("took the device along")
            continue
        try:
            found[name] = make()
        except Exception as error:
            record["contenders"][name] = _entry(_words(error))
            survive(name, clock, record)
    return found


def _entry(reason: str | None = None) -> Record:
    return {"captured": None, "wall": None, "reason": reason}


def _time(
    contenders: dict[str, Contender], clock: Clock, rounds: tuple[int, int], record: Record
) -> None:
    """Captured and not. Who can't be warmed up is left out; who can't be captured says why."""
    record["contenders"] |= {name: _entry() for name in contenders}
    warm = _each(clock.warm_up, "warm-up", contenders, clock, record)
    contenders = {name: contenders[name] for name in warm}
    for mode, prepare in (("captured", clock.captured), ("wall", clock.wall)):
        samplers = _each(prepare, mode, contenders, clock, record)
        times = _interleave(samplers, contenders, rounds)
        for name, values in times.items():
            entry = record["contenders"][name]
            entry[mode] = _quantiles(values) | {"samples": len(values)}
        if mode == "captured":
            record["ratios"] = _ratios(times, record["rows"])
        samplers.clear()  # and with them graphs and what they hold


T = TypeVar("T")


def _each(
    prepare: Callable[[Sequence[Call]], T],
    mode: str,
    contenders: Mapping[str, Contender],
    clock: Clock,
    record: Record,
) -> dict[str, T]:
    """What ``prepare`` makes of the contenders, without those that it fails for."""
    found = {}
    for name, contender in contenders.items():
        try:
            with contender.pinned():
                found[name] = prepare(contender.calls)
        except Exception as error:
            record["contenders"][name]["reason"] = f"{mode}: {_words(error)}"
            if name in record["rows"]:
                record["rows"][name].update(status=ERROR, reason=f"{mode}: {_words(error)}")
            survive(name, clock, record)
    return found


def _interleave(
    samplers: Mapping[str, Sampler],
    contenders: Mapping[str, Contender],
    rounds: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Microseconds of one call in each round, by contender."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    fewest, most = rounds
    began = time.monotonic()
    gc.disable()
    try:
        for done in range(most):
            if done >= fewest and time.monotonic() - began > SECONDS:
                break
            for name, sample in samplers.items():
                with contenders[name].pinned():
                    times[name].append(sample())
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80}


def _ratios(times: Mapping[str, np.ndarray], subjects: Mapping[str, Any]) -> Record:
    """Time of each other contender over that of each row, in single rounds."""
    return {
        name: {other: _quantiles(times[other] / times[name]) for other in times if other != name}
        for name in times
        if name in subjects
    }


def _look(contender: Contender, clock: Clock, launches: bool, entry: Record) -> None:
    """Memory, and where asked for, launches: of the first call."""
    call = contender.calls[0]
    with contender.pinned():
        entry["peak_bytes"] = _attempted(lambda: clock.peak_bytes(call))
        if launches:
            entry["launches"] = _attempted(lambda: clock.launches(call))


def _attempted(ask: Callable[[], Any]) -> Any:
    """What can't be told is no reason to lose the times."""
    try:
        return ask()
    except Exception as error:
        return {"reason": _words(error)}
