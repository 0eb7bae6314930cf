"""What the results say: bars reached or missed, a table for people, and the same as markdown.

Everything here is computed from the file alone. What was not measured is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .rows import CASES, GROUPS, TRITON, Bar, Case, named, split
from .session import ERROR, MEASURED, NOT_MEASURED, REFUSED, WRONG

Record = dict[str, Any]

#: What a speed-up is over where a row has no bar that says it.
FAMILIES = ("sdpa", "unconverted", "eager")


@dataclass(frozen=True)
class Verdict:
    """A bar, and what was reached, if it could be told."""

    bar: Bar
    value: float | None

    @property
    def reached(self) -> bool | None:
        return None if self.value is None else self.value >= self.bar.least

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.bar}: {NOT_MEASURED}"
        value = f"{100 * self.value:.0f} %" if self.bar.what == "copy" else f"{self.value:.2f}"
        return f"{self.bar}: {value}, {'pass' if self.reached else 'MISS'}"


@dataclass(frozen=True)
class Line:
    """A row of the table with all that the file says of it; ``row`` is empty for a case that the
    file doesn't hold."""

    case: Case
    name: str
    record: Record
    rates: Record

    @property
    def title(self) -> str:
        return named(self.case, self.name)

    @property
    def row(self) -> Record:
        return self.record.get("rows", {}).get(self.name, {})

    @property
    def provider(self) -> str:
        return split(self.name)[1]

    @property
    def status(self) -> str:
        return self.row.get("status", NOT_MEASURED)

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    def entry(self, name: str | None = None) -> Record:
        return self.record.get("contenders", {}).get(name or self.name, {})

    @property
    def seconds(self) -> float:
        return 1e-6 * self.entry()["captured"]["median"]

    # --- against the machine ---

    @property
    def share_of_copy(self) -> float | None:
        rate = self.rates.get("copy_bytes_per_s")
        return self.row["bytes"] / self.seconds / rate if rate and self.row["bytes"] else None

    @property
    def share_of_matrix(self) -> float | None:
        rate = self.rates.get("matrix_flops_per_s", {}).get(self.case.dtype)
        return self.row["flops"] / self.seconds / rate if rate and self.row["flops"] else None

    # --- against others ---

    def fastest(self, family: str) -> str | None:
        """The fastest captured baseline of a family."""
        times = {
            name: entry["captured"]["median"]
            for name, entry in self.record.get("contenders", {}).items()
            if name.split("/")[0] == family and entry.get("captured")
        }
        return min(times, key=times.__getitem__) if times else None

    @property
    def rival(self) -> str | None:
        """Whom the table shows: the fastest of SDPA, or of eager code where there is none."""
        return next(filter(None, map(self.fastest, FAMILIES)), None)

    def speedup(self, other: str | None) -> Record | None:
        """Median, p20 and p80 of the time of another over the row's own."""
        return self.record.get("ratios", {}).get(self.name, {}).get(other)

    @property
    def over_dense(self) -> Record | None:
        """Speed-up over the dense map that the same provider makes or applies."""
        return self.speedup(f"dense {self.provider}")

    @property
    def over_triton(self) -> Record | None:
        return self.speedup(f"{split(self.name)[0]} {TRITON}")

    @property
    def verdicts(self) -> list[Verdict]:
        return [Verdict(bar, self._value(bar)) for bar in self.case.rows[self.name]]

    def _value(self, bar: Bar) -> float | None:
        if not self.measured:
            return None
        if bar.what == "copy":
            return self.share_of_copy
        if bar.what == "dense":
            return self.over_dense["median"] if self.over_dense else None
        other = self.fastest(bar.over)
        if other is None:
            return None
        if bar.what == "launches":
            own, others = (self.entry(name).get("launches") for name in (None, other))
            known = isinstance(own, list) and isinstance(others, list) and own
            return len(others) / len(own) if known else None  # type: ignore[arg-type]
        ratio = self.speedup(other)
        if ratio is None:
            return None
        if bar.what == "speed-up":
            return ratio["median"]
        if bar.what == "flops":
            return ratio["median"] / self.row["flops_ratio"]
        rate = self.rates.get("copy_bytes_per_s")
        return ratio["median"] + self.row["map_bytes"] / rate / self.seconds if rate else None


def lines(data: Record | None, cases: Sequence[Case] = CASES) -> list[Line]:
    """Every row that there is to measure, in the order of the table."""
    data = data or {}
    stored, rates = data.get("cases", {}), data.get("rates", {})
    return [
        Line(case, name, stored.get(case.name, {}), rates) for case in cases for name in case.rows
    ]


def failed(data: Record) -> bool:
    """Whether a row was wrong, or could not be shown to be right."""
    rows = [row for case in data["cases"].values() for row in case["rows"].values()]
    return any(row["status"] in (WRONG, ERROR) for row in rows)


# --- fields ---------------------------------------------------------------------------------

COLUMNS = (
    "row", "captured us", "wall us", "fastest other", "speed-up", "p20 to p80", "x triton",
    "x dense", "% copy", "% matrix", "error", "x eager's", "peak MB",
)  # fmt: skip


def fields(line: Line) -> list[str]:
    """Of a measured row, in the order of COLUMNS."""
    entry, rival, error = line.entry(), line.rival, line.row["error"]
    ratio, peak = line.speedup(rival), entry.get("peak_bytes")
    return [
        line.title,
        _microseconds(entry["captured"]),
        _microseconds(entry["wall"]),
        f"{rival} {_microseconds(line.entry(rival)['captured'])}" if rival else "",
        _times(ratio),
        f"{ratio['p20']:.2f} to {ratio['p80']:.2f}" if ratio else "",
        _times(line.over_triton),
        _times(line.over_dense),
        _percent(line.share_of_copy),
        _percent(line.share_of_matrix),
        f"{error['psvit']:.1e}",
        f"{error['psvit'] / error['eager']:.2f}" if error["eager"] else "exact",
        f"{peak / 1e6:.1f}" if isinstance(peak, int) else "",
    ]


def _microseconds(timing: Record | None, key: str = "median") -> str:
    if timing is None:
        return ""
    return f"{timing[key]:.1f}" if timing[key] < 1000 else f"{timing[key]:.0f}"


def _times(ratio: Record | None) -> str:
    return f"{ratio['median']:.2f}" if ratio else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def machine_text(data: Record) -> str:
    """One line: the device, what it was seen to do, versions and commit."""
    device, seen, rates = (data.get(key, {}) for key in ("device", "versions", "rates"))
    parts = [device.get("name", "no device"), f"driver {device.get('driver') or 'unknown'}"]
    parts += [f"{name} {seen[name]}" for name in ("torch", "triton", "cuda") if seen.get(name)]
    parts.append(f"commit {data.get('commit')}")
    if "copy_bytes_per_s" in rates:
        parts.append(f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    for name, rate in rates.get("matrix_flops_per_s", {}).items():
        parts.append(f"{name} products {rate / 1e12:.0f} TFLOP/s")
    if rates.get("exp_per_s"):
        parts.append(f"exp {rates['exp_per_s'] / 1e12:.2f} T/s")
    return ", ".join(parts)


# --- for people -----------------------------------------------------------------------------


def show(data: Record, console: Console, cases: Sequence[Case] = CASES) -> None:
    """The table, its bars, what failed and why, and what ran beside it."""
    found = lines(data, cases)
    with console.capture() as drawn:
        console.print(_table(found), highlight=False)
    table = (text.rstrip() for text in drawn.get().splitlines())
    rest = [*_reasons(found), *_baseline_times(found), *_forms(found), *_bars(found)]
    for text in (machine_text(data), *table, "", *rest, summary(found)):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(found: Sequence[Line]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        justify: Any = "left" if name == "row" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for line in found:
        if line.measured:
            table.add_row(*fields(line))
        else:
            table.add_row(line.title, line.status)
    return table


def _bars(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if line.measured and line.verdicts:
            yield f"{line.title}: {'; '.join(map(str, line.verdicts))}"


def _reasons(found: Sequence[Line]) -> Iterator[str]:
    for line in found:
        if line.row.get("reason"):
            yield f"{line.title}: {line.status}: {line.row['reason'][:300]}"


def _baseline_times(found: Sequence[Line]) -> Iterator[str]:
    """Captured medians of all who ran beside the rows of a case."""
    for name, line in _by_case(found).items():
        times = [
            f"{other} {_microseconds(entry['captured'])}"
            for other in line.case.baselines
            if (entry := line.entry(other)).get("captured")
        ]
        if times:
            yield f"{name} beside, us: {', '.join(times)}"


def _forms(found: Sequence[Line]) -> Iterator[str]:
    """Which form of the map the cost model picks."""
    for name, line in _by_case(found).items():
        picked = line.record.get("automatic", {}).get("picked")
        if picked:
            picks = ", ".join(f"{form} for {reuses}" for reuses, form in picked.items())
            yield f"{name}: automatic form, by reuses: {picks}"


def _by_case(found: Sequence[Line]) -> dict[str, Line]:
    """A line of each case: what is not of a row is the same in all of them."""
    return {line.case.name: line for line in found}


def summary(found: Sequence[Line]) -> str:
    verdicts = [v for line in found for v in line.verdicts if not v.bar.moonshot]
    counts = {
        status: sum(line.status == status for line in found)
        for status in (MEASURED, WRONG, ERROR, REFUSED, NOT_MEASURED)
    }
    rows = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    reached = sum(v.reached is True for v in verdicts)
    missed = sum(v.reached is False for v in verdicts)
    return f"rows: {rows}; bars: {reached} reached, {missed} missed, of {len(verdicts)}"


HEADER = (
    "row", "provider", "us (p20 to p80)", "over", "speed-up (p20 to p80)", "x triton", "x dense",
    "% of copy", "% of matrix rate", "error / eager's", "bar", "reached",
)  # fmt: skip


def markdown(data: Record | None) -> str:
    """Every row that there is to measure, as tables; those without data say so.

    Groups of cases are measured in sessions of their own: a file that holds none of one gives no
    table of it.
    """
    groups = [group for group in GROUPS.values() if data is None or _holds(data, group)]
    tables = "\n".join(_markdown_table(data, group) for group in groups)
    return tables if data is None else f"{machine_text(data)}\n\n{tables}"


def _holds(data: Record, cases: Sequence[Case]) -> bool:
    return any(case.name in data["cases"] for case in cases)


def _markdown_table(data: Record | None, cases: Sequence[Case]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *map(_markdown_fields, lines(data, cases))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _markdown_fields(line: Line) -> list[str]:
    bars = "; ".join(str(bar) for bar in line.case.rows[line.name]) or "report"
    row = line.title.removesuffix(f" {line.provider}").replace("|", "\\|")
    if not line.measured:
        return [row, line.provider, line.status, *[""] * 7, bars, ""]
    shown = dict(zip(COLUMNS, fields(line), strict=True))
    captured = line.entry()["captured"]
    spread = " to ".join(_microseconds(captured, key) for key in ("p20", "p80"))
    speedup = f"{shown['speed-up']} ({shown['p20 to p80']})" if shown["speed-up"] else ""
    names = {None: NOT_MEASURED, True: "yes", False: "no"}
    return [
        row, line.provider, f"{shown['captured us']} ({spread})", line.rival or "", speedup,
        shown["x triton"], shown["x dense"], shown["% copy"], shown["% matrix"],
        shown["x eager's"], bars, "; ".join(names[verdict.reached] for verdict in line.verdicts),
    ]  # fmt: skip
