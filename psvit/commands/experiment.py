"""Run one of the project's experiments, controls included, and see its table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..console import print_tables, table
from .common import BadInputError, add_json, bad_input, need, positive, print_json, writing

EXAMPLES = """\
examples:
  psvit experiment init
  psvit experiment init --seeds 5 --output init-5-seeds
  psvit experiment init --json > init.json

init: what structured initialisation gains on few handwritten digits, and how much of it scaling
the position embedding gains alone. Nothing is downloaded. It takes some minutes on two cores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["init"], help="which experiment")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="(default: 3)")
    parser.add_argument(
        "--epochs",
        type=positive,
        default=60,
        metavar="N",
        help="of training; the table has a third of them too (default: 60)",
    )
    parser.add_argument(
        "--images", type=positive, default=200, metavar="N", help="of training (default: 200)"
    )
    parser.add_argument(
        "--processes", type=positive, default=2, metavar="N", help="at a time (default: 2)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("psvit-init"),
        metavar="DIR",
        help="folder for results.json and curves.png (default: psvit-init)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    need("demo", "timm", "sklearn", "matplotlib")
    from ..init.experiment import Settings, check
    from ..init.experiment import run as run_experiment

    if args.epochs % 3:
        raise BadInputError(f"--epochs: got {args.epochs}, expected a multiple of 3")
    third = args.epochs // 3
    settings = Settings(
        seeds=args.seeds,
        images=args.images,
        epochs=args.epochs,
        every=next(step for step in (5, 2, 1) if third % step == 0),
        early=third,
        processes=args.processes,
    )
    with bad_input():
        check(settings)
    with writing("--output"):
        results = run_experiment(settings, args.output)
    if args.json:
        print_json(results)
    else:
        _show(results, args.output)
    return 0


def _show(results: dict[str, Any], output: Path) -> None:
    settings = results["settings"]
    columns = [_header(settings[when]) for when in ("early", "epochs")]
    header = ("initialisation", *columns[0], *columns[1])
    rows = [
        (row["name"], *(cell for when in ("early", "end") for cell in _cells(row, when)))
        for row in results["rows"]
    ]
    title = f"Digits, {settings['images']} training images, {settings['seeds']} seeds"
    print_tables(table(title, header, rows), *_remarks(results, output))


def _header(epoch: int) -> tuple[str, str, str]:
    return f"epoch {epoch}\naccuracy", "\nscale", "\nrest"


def _cells(row: dict[str, Any], when: str) -> list[str]:
    found = row[when]
    accuracy = found["accuracy"]
    return [
        f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['deviation']:.1f}",
        *(f"{100 * found[part]['mean']:+.1f}" for part in ("scale", "rest")),
    ]


def _remarks(results: dict[str, Any], output: Path) -> list[str]:
    first = results["rows"][0]["name"]
    return [
        f"accuracy: on {results['test_images']} held-out images, %, mean and standard deviation "
        f"over the seeds",
        f"scale: points over {first} that scaling the position embedding gains alone, where it is "
        f"scaled; rest: the other points over {first}",
        f"Took {results['seconds']:.0f} s. Written to {output}: results.json and curves.png.",
    ]
