"""The command ``psvit bench``. Light to import: PyTorch is loaded when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .cases import Case
    from .report import Run

#: A narrower terminal breaks lines by itself, which reads better than squeezed columns.
TABLE_WIDTH = 200

EXAMPLES = """examples:
  psvit bench                                  the whole table, two threads, under three minutes
  psvit bench --cases pool                     cases with "pool" in their name
  psvit bench --cases 'apply/*/float32' --json > apply.json
  psvit bench --list                           the names of the cases

exit code: 0; 1 if a result was wrong, so that its speed was not reported; 2 on bad input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``psvit bench`` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (the only one yet)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--cases", metavar="PATTERN", help="a glob, or a part of a name")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: 2")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of each case; default: what fits in 2 s"
    )
    parser.add_argument(
        "--provider", metavar="NAME", help="default: PSVIT_PROVIDER, else the compiled one"
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")


def main(args: argparse.Namespace) -> int:
    """Runs ``psvit bench``; returns the exit code."""
    with ExitStack() as stack:
        try:
            plan = _plan(args, stack)
        except (ValueError, OSError) as error:  # only what a person typed is checked there
            print(f"psvit bench: error: {_one_line(error, args.output)}", file=sys.stderr)
            return 2
        if args.list:
            print("\n".join(case.name for case in plan.cases))
            return 0
        run = run_cases(
            plan.cases, threads=plan.threads, rounds=plan.rounds, provider=args.provider
        )
        return _finish(run, args.json, plan.output)


@dataclass
class _Plan:
    cases: Sequence[Case]
    threads: int
    rounds: int | None
    output: Path | None = None


def _plan(args: argparse.Namespace, stack: ExitStack) -> _Plan:
    """Checks every option before anything runs; the output file appears when the stack closes."""
    from .cases import select

    if args.device != "cpu":
        raise ValueError(f'--device: got "{args.device}", expected cpu')
    _asked_provider(args.provider)
    threads = _positive("--threads", args.threads, min(2, os.cpu_count() or 1))
    rounds = _positive("--rounds", args.rounds, None)
    plan = _Plan(select(args.cases), threads, rounds)
    if args.output:
        from psvit.files import whole_file

        plan.output = stack.enter_context(whole_file(Path(args.output)))
    return plan


def _positive(option: str, value: int | None, default: Any) -> Any:
    if value is None:
        return default
    if value < 1:
        raise ValueError(f"{option}: got {value}, expected 1 or more")
    return value


def _one_line(error: Exception, output: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"--output: {output}: {error.strerror}"
    return " ".join(str(error).split())


def _finish(run: Run, as_json: bool, file: Path | None) -> int:
    from . import report

    text = json.dumps(report.as_dict(run), indent=1, allow_nan=False)
    if file is not None:
        file.write_text(text + "\n")
    if as_json:
        print(text)
    else:
        report.show(run, Console(width=max(Console().width, TABLE_WIDTH)))
    return 1 if any(row.status == "refused" for row in run.rows) else 0


# --- the run --------------------------------------------------------------------------------


def run_cases(
    cases: Sequence[Case],
    *,
    threads: int = 2,
    rounds: int | None = None,
    provider: str | None = None,
    matrix_size: int = 2048,
) -> Run:
    """Measures cases one after another, with threads, provider and SDPA's backend pinned.

    Args:
        cases: from ``psvit.bench.cases``.
        threads: of PyTorch and of the compiled kernels; as before afterwards.
        rounds: of each case; None: as many as fit in two seconds.
        provider: None for PSVIT_PROVIDER, or else the compiled one if it is built.
        matrix_size: of the matrix products that measure the machine.

    Raises:
        ValueError: no such provider.
    """
    import torch

    from . import measure
    from .machine import ceilings
    from .noise import Others
    from .report import Run

    others = Others()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        name, note = _provider(provider)
        with measure.pinned_sdpa() as sdpa, _progress(len(cases) + 1) as step:
            step("the machine", 0.0)
            dtypes = dict.fromkeys(str(case.dtype).removeprefix("torch.") for case in cases)
            seen = ceilings(threads, tuple(dtypes), matrix_size)
            rows = []
            for done, case in enumerate(cases, 1):
                step(case.name, done)
                tick = lambda part, at=done, label=case.name: step(label, at + part)  # noqa: E731
                rows.append(measure.measure(case, name, rounds=rounds, step=tick))
            seen = ceilings(threads, tuple(dtypes), matrix_size, before=seen)
    finally:
        torch.set_num_threads(before)
    return Run(rows, seen, name, note, sdpa, threads, others())


def _asked_provider(asked: str | None) -> str | None:
    """The provider that a person asked for, with the option or PSVIT_PROVIDER."""
    from psvit_kernels import registry

    if asked in (None, "auto"):
        return registry.forced()
    if asked not in registry.PROVIDERS:
        choices = ", ".join(registry.PROVIDERS)
        raise ValueError(f'--provider: got "{asked}", expected one of {choices}, or auto')
    return asked


def _provider(asked: str | None) -> tuple[str, str | None]:
    from .measure import best_provider

    name = _asked_provider(asked)
    if name is not None:
        return name, None
    name, reason = best_provider()
    return name, reason and f"the compiled provider does not serve here: {reason}"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, drawn only between samples: no thread of its own takes a core."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns,
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    drawn = 0.0
    with bar:
        task = bar.add_task("", total=total)

        def step(label: str, done: float) -> None:
            nonlocal drawn
            if time.monotonic() - drawn > 0.25:
                bar.update(task, description=label, completed=done)
                bar.refresh()
                drawn = time.monotonic()

        yield step
