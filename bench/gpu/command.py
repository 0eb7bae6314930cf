"""The command. One process keeps the time and the results; another one touches the device.

A kernel that reads where it must not, or never ends, costs its own case: the process that ran it
is replaced, and the session goes on with the next one. What may never have run on a device costs
its own row (``trial``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from . import report, sanitize, session, trial
from .rows import GROUPS, Case, select
from .session import Store

#: Of the checkout: its ``bench`` and ``tests`` are no part of the installed package.
ROOT = Path(__file__).resolve().parents[2]

BUDGET = 480.0

#: Seconds after which a case is taken for stuck: above what compiling a large network takes.
STUCK = 300.0

#: Processes that may end before they have begun a case.
FALSE_STARTS = 2

WIDTH = 220

EPILOG = """exit code: 0; 1 if a row was wrong or ended in an error, so that it has no speed;
2 without a CUDA device or on bad input"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        cases = select(args.cases)
    except ValueError as error:
        print(f"bench.gpu: error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            f"bench.gpu: no CUDA device (PyTorch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}): nothing measured, nothing written",
            file=sys.stderr,
        )
        return 2
    if args.sanitize:
        return sanitize.main(args.out)
    store = Store(args.out)
    if args.trial:
        return try_out(store, cases)
    if args.deadline is not None:
        return work(store, cases, args.deadline)
    return _session(store, cases, args)


def _session(store: Store, cases: Sequence[Case], args: argparse.Namespace) -> int:
    """New kernels in processes of their own, then all that is right."""
    began = time.time()
    deadline = began + args.budget
    words = ["--out", str(args.out.resolve()), "--deadline", repr(deadline)]
    words += [] if args.cases is None else ["--cases", args.cases]

    def start(*more: str) -> Worker:
        return subprocess.Popen([sys.executable, "-m", "bench.gpu", *words, *more], cwd=ROOT)

    store.create(cases)
    if any(any(trial.pending(record)) for record in store.data["cases"].values()):
        over = began + trial.SHARE * args.budget
        supervise(store, lambda: start("--trial"), over, trial.STUCK)
    supervise(store, start, deadline)
    store.data["seconds"] = round(time.time() - began, 1)
    store.save()
    report.show(store.data, Console(width=WIDTH))
    return 1 if report.failed(store.data) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0], epilog=EPILOG
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gpu.json")
    parser.add_argument(
        "--cases", metavar="PATTERN", help=f"{', '.join(GROUPS)}; or a glob, or a part of a name"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help="seconds; default: %(default).0f"
    )
    parser.add_argument(
        "--sanitize", action="store_true",
        help="run small cases of the CUDA kernels under compute-sanitizer, for sanitizer.json",
    )  # fmt: skip
    # Of the other processes.
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    return parser


# --- the process that touches the device ----------------------------------------------------


def work(store: Store, cases: Sequence[Case], deadline: float) -> int:
    """Measures what is left; 3 if the device was lost on the way."""
    from . import machine
    from .clock import CudaClock

    store.load()
    clock = CudaClock()
    if "rates" not in store.data:
        store.data |= machine.describe() | {"clock": clock.name}
        store.data["rates"] = machine.rates(clock)
        store.save()
        _say(report.machine_text(store.data))
    try:
        session.run(store, cases, clock, device="cuda", deadline=deadline, say=_say)
    except session.DeviceLostError as error:
        _say(f"the device was lost: {error}"[:300])
        return 3
    return 0


def try_out(store: Store, cases: Sequence[Case]) -> int:
    """Tries new kernels; 3 if the device was lost on the way."""
    from .clock import CudaClock

    store.load()
    try:
        trial.run(store, cases, CudaClock(), device="cuda", say=_say)
    except session.DeviceLostError as error:
        _say(f"the device was lost: {error}"[:300])
        return 3
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


# --- the process that keeps the time --------------------------------------------------------


class Worker(Protocol):
    """What is used of ``subprocess.Popen``."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


def supervise(
    store: Store,
    start: Callable[[], Worker],
    deadline: float,
    stuck: float = STUCK,
    nap: float = 0.5,
) -> None:
    """Starts processes until one has seen to every case, or the time is over."""
    false_starts = 0
    while false_starts < FALSE_STARTS:
        tried = _tried(store)
        worker = start()
        reason = _watch(worker, store, deadline, stuck, nap)
        store.load()
        if worker.wait() == 0 and reason is None:
            break
        over = time.time() >= deadline
        _give_up(store.data, reason or f"ended its process with {worker.wait()}", over)
        store.save()
        if over:
            break
        false_starts += _tried(store) == tried


def _give_up(data: session.Record, reason: str, over: bool) -> None:
    """Whatever was running when a process ended: its case, or in a trial its kernel."""
    for name, record in data["cases"].items():
        if record["status"] != "running":
            continue
        if "trying" not in record:
            session.give_up(record, reason, session.NOT_MEASURED if over else session.ERROR)
            continue
        if not over:
            trial.give_up(data, name, reason)
        trial.stop(record)


def _tried(store: Store) -> int:
    """Rows that have an outcome."""
    rows = (row for case in store.data["cases"].values() for row in case["rows"].values())
    lost = sum(len(case.get("lost", ())) for case in store.data["cases"].values())
    return lost + sum(row["status"] != session.NOT_MEASURED or "tried" in row for row in rows)


def _watch(worker: Worker, store: Store, deadline: float, stuck: float, nap: float) -> str | None:
    """Waits for the process to end; why it was ended, if it was."""
    reason = None
    while worker.poll() is None:
        now = time.time()
        store.load()
        began = [c["began"] for c in store.data["cases"].values() if "began" in c]
        if now >= deadline:
            reason = "the time was over"
        elif began and now - began[0] > stuck:
            reason = f"was not done after {stuck:.0f} s"
        if reason is not None:
            worker.kill()
            worker.wait()
            break
        time.sleep(nap)
    return reason
