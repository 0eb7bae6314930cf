"""What the commands show: progress and remarks on standard error, tables on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(title: str, total: float) -> Iterator[Any]:
    """A progress bar on standard error; yields a function to call with each step's part of it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where nobody watches, rich would leave an empty line for each bar.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(title, total=total)

        def step(count: float = 1) -> None:
            bar.update(task, advance=count)

        yield step


def say(message: str) -> None:
    """A remark for people, on standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message)


def print_tables(*tables: Any) -> None:
    """Tables of rich and plain texts, on standard output."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for table in tables:
        console.print(table)


def text_of(table: Any) -> str:
    """A table of rich as plain text."""
    from rich.console import Console

    console = Console(width=100, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1
) -> Any:
    """A table of rich; the first ``left`` columns are texts, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    made.padding, made.pad_edge = (0, 1, 0, 0), False
    for i, name in enumerate(header):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def short(value: float, unit: str = "") -> str:
    """1234567 as 1.23 M."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()
