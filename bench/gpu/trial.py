"""Kernels that may never have run on a device, each tried in a process of its own beforehand.

One that reads where it must not takes the device from its process, and one that never ends takes
the process: that process measures nothing, so it costs its own row, and the session goes on. A row
that was right here is measured, after another check; every other one says why it isn't.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from . import session
from .rows import Case, is_new
from .session import ERROR, NOT_MEASURED, Clock, Record, Store
from .work import build

#: Seconds after which a row is taken for stuck: nothing is compiled or tuned.
STUCK = 30.0

#: Part of the session's time.
SHARE = 0.4


def pending(record: Record) -> Iterator[str]:
    """The rows of a case that are to be tried."""
    for name, row in record["rows"].items():
        if is_new(name) and row["status"] == NOT_MEASURED and not row.get("tried"):
            yield name


def run(
    store: Store,
    cases: Sequence[Case],
    clock: Clock,
    *,
    device: str,
    say: Callable[[str], None] = print,
) -> None:
    """Tries what nobody has tried yet.

    Raises:
        DeviceLostError: a kernel took the device along; its rows say so.
    """
    for case in cases:
        record = store.case(case.name)
        for name in list(pending(record)):
            row = record["rows"][name]
            if row["status"] != NOT_MEASURED:
                continue  # given up with another row of its kernel
            record.update(status="running", began=time.time(), trying=name)
            store.save()
            try:
                _try(case, name, clock, device, record)
            except session.DeviceLostError as error:
                row["tried"] = False
                give_up(store.data, case.name, f"took the device along: {error}")
                raise
            finally:
                stop(record)
                store.save()
                say(f"tried {case.name} {name}: {'right' if row.get('tried') else row['status']}")


def _try(case: Case, name: str, clock: Clock, device: str, record: Record) -> None:
    """On the inputs of the row itself; a network runs as it is written."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        row = record["rows"][name]
        row["tried"] = session.right(build(case, 1, device), name, row) is not None
    session.survive("", clock, record)


def stop(record: Record) -> None:
    """Nothing of the case is being tried any more."""
    record["status"] = NOT_MEASURED
    del record["began"], record["trying"]


def give_up(data: Record, case: str, reason: str) -> None:
    """Says why of the row that is being tried, and of the others of its kernel: it wouldn't do them
    any better, and each might take as long."""
    name, kind = data["cases"][case]["trying"], data["cases"][case]["kind"]
    for other, record in data["cases"].items():
        if record["kind"] != kind or name not in pending(record):
            continue
        words = reason if other == case else f"not tried, as in {case} it {reason}"
        record["rows"][name].update(status=ERROR, reason=words)
