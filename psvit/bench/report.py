"""A run as data (JSON) and as a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .machine import Ceilings, commit, machine, versions
from .measure import Comparison, Gate, Row

SCHEMA = 1

#: Share of the cores that others may use before a run is called noise.
QUIET = 0.03

METHOD = (
    "contenders take turns; times are medians with p20 and p80; a speed-up is the median of the "
    "ratios of single rounds, all within this run; inputs stay warm in the cache, as in a model"
)


@dataclass
class Run:
    """One call of ``psvit bench``."""

    rows: list[Row]
    ceilings: Ceilings
    provider: str
    provider_note: str | None
    sdpa: str
    threads: int
    others: float | None
    device: str = "cpu"


# --- data -----------------------------------------------------------------------------------


def as_dict(run: Run) -> dict[str, Any]:
    """The run as JSON: nothing that was not measured is in it (null stands for it)."""
    return {
        "schema": SCHEMA,
        "kind": "psvit bench",
        "device": run.device,
        "method": METHOD,
        "provider": run.provider,
        "provider_note": run.provider_note,
        "sdpa_backend": run.sdpa,
        "threads": run.threads,
        "others": run.others,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "ceilings": {
            "matrix_gflops": run.ceilings.matrix,
            "fma_gflops": run.ceilings.fma,
            "copy_gbytes_per_s": run.ceilings.copy,
        },
        "summary": summary(run.rows),
        "rows": [_row_dict(row, run.ceilings) for row in run.rows],
    }


def _row_dict(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "case": row.case,
        "dtype": row.dtype,
        "status": row.status,
        "reason": row.reason,
        "others": row.others,
        "error": row.gate and _gate_dict(row.gate),
        "flops": row.flops,
        "bytes": row.nbytes,
        "microseconds": {name: asdict(timing) for name, timing in row.timings.items()},
        "peak_bytes": row.peak_bytes,
        **rates(row, ceilings),
        "against": [_comparison_dict(c) for c in row.comparisons],
    }


def _gate_dict(gate: Gate) -> dict[str, Any]:
    """NaN and infinity are no JSON: null."""
    values = asdict(gate) | {"limit": gate.limit}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return finite | {"ok": gate.open}


def _comparison_dict(c: Comparison) -> dict[str, Any]:
    return asdict(c) | {
        "value": c.value,
        "reached": c.reached,
        "moonshot_reached": c.moonshot_reached,
    }


def rates(row: Row, ceilings: Ceilings) -> dict[str, float | None]:
    """What psvit does a second, and as a percentage of what the machine was seen to do."""
    timing = row.timings.get("psvit")
    gflops = row.flops / timing.median / 1e3 if timing and row.flops else None
    gbytes = row.nbytes / timing.median / 1e3 if timing and row.nbytes else None
    fma = ceilings.fma if row.dtype == "float32" else None
    return {
        "gflops": gflops,
        "gbytes_per_s": gbytes,
        "percent_of_matrix_rate": _percent(gflops, ceilings.matrix.get(row.dtype)),
        "percent_of_fma_rate": _percent(gflops, fma),
        "percent_of_copy": _percent(gbytes, ceilings.copy),
    }


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part and whole else None


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many bars there are and how many were reached."""
    rows = list(rows)
    every = [c for row in rows for c in row.comparisons]
    return {
        "bars": sum(c.reached is not None for c in every),
        "reached": sum(c.reached is True for c in every),
        "moonshots": sum(c.moonshot_reached is not None for c in every),
        "moonshots_reached": sum(c.moonshot_reached is True for c in every),
        "refused": sum(row.status == "refused" for row in rows),
        "unavailable": sum(row.status == "unavailable" for row in rows),
    }


# --- for people -----------------------------------------------------------------------------


def show(run: Run, console: Console) -> None:
    """The table, what its percentages mean, and how many bars were reached."""
    seen = versions()
    where = machine()
    console.print(
        f"psvit bench on {where['cpu']} ({where['cpu_capability']}), {run.threads} threads, "
        f"torch {seen['torch']}, psvit {commit() or seen['psvit']}\n"
        f"provider {run.provider}; SDPA backend {run.sdpa}; {_ceilings_text(run.ceilings)}"
    )
    if run.provider_note:
        console.print(f"[yellow]{run.provider_note}[/]")
    if run.others is not None and run.others > QUIET:
        console.print(
            f"[yellow]other processes used {100 * run.others:.0f} % of the cores meanwhile: "
            f"these figures are noise[/]"
        )
    console.print(_table(run))
    for row in run.rows:
        if row.status != "measured":
            console.print(f"{row.case}: [red]{row.status}[/]: {row.reason}", highlight=False)
    counts = summary(run.rows)
    console.print(
        f"bars reached: {counts['reached']} of {counts['bars']}; moonshots: "
        f"{counts['moonshots_reached']} of {counts['moonshots']}; refused for their error: "
        f"{counts['refused']}; not run here: {counts['unavailable']}"
    )


def _ceilings_text(ceilings: Ceilings) -> str:
    parts = [f"{name} matrix products {rate:.0f} GFLOP/s" for name, rate in ceilings.matrix.items()]
    if ceilings.fma:
        parts.append(f"fused multiply-adds {ceilings.fma:.0f} GFLOP/s")
    return ", ".join([*parts, f"copy {ceilings.copy:.1f} GB/s"])


def _table(run: Run) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
    table.add_column("case, against", no_wrap=True)
    for name in ("median", "fastest", "speed-up", "p20 to p80", "must", "moonshot"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reached", no_wrap=True)
    for name in ("error", "x eager's", "% matrix", "% fma", "% copy", "peak MB", "others"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in run.rows:
        _add_row(table, row, run.ceilings)
    return table


def _add_row(table: Table, row: Row, ceilings: Ceilings) -> None:
    if row.status != "measured":
        table.add_row(f"[bold]{row.case}[/]", f"[red]{row.status}[/]", end_section=True)
        return
    rate = rates(row, ceilings)
    error, relative = ("", "") if row.gate is None else _error_text(row)
    table.add_row(
        f"[bold]{row.case}[/]",
        *_time_texts(row, "psvit"),
        *[""] * 5,
        error,
        relative,
        _number(rate["percent_of_matrix_rate"], ".0f"),
        _number(rate["percent_of_fma_rate"], ".0f"),
        _number(rate["percent_of_copy"], ".0f"),
        _memory_text(row, "psvit"),
        _number(row.others, ".0%"),
    )
    for c in row.comparisons:
        last = c is row.comparisons[-1]
        table.add_row(
            f"  {c.baseline}",
            *_time_texts(row, c.baseline),
            f"{c.speedup:.2f}",
            f"{c.p20:.2f} to {c.p80:.2f}",
            _bar_text(c.must, c.per),
            _bar_text(c.moonshot, c.per),
            _verdict(c),
            *[""] * 5,
            _memory_text(row, c.baseline),
            end_section=last,
        )


def _error_text(row: Row) -> tuple[str, str]:
    assert row.gate is not None
    error, eager = row.gate.error, row.gate.eager_error
    return f"{error:.1e}", f"{error / eager:.2f}" if eager else "exact"


def _time_texts(row: Row, name: str) -> list[str]:
    timing = row.timings[name]
    return [
        f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.1f} us"
        for microseconds in (timing.median, timing.fastest)
    ]


def _memory_text(row: Row, name: str) -> str:
    peak = row.peak_bytes.get(name)
    return "not measured" if peak is None else f"{peak / 1e6:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bar_text(bar: float | None, per: float) -> str:
    """Bars as speed-ups, so that they stand beside one."""
    return "" if bar is None else f"{bar * per:.2f}"


def _verdict(c: Comparison) -> str:
    if c.moonshot_reached:
        return "[green]moonshot[/]"
    if c.must is None or c.reached:
        return "[green]yes[/]" if c.reached else ""
    return f"[red]no, {100 * (c.value / c.must - 1):.0f} %[/]"
