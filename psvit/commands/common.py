"""What the commands share: bad input, options, results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any


class BadInputError(Exception):
    """What a person typed can't be done; the message is the one line that they see."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Turns a ValueError, TypeError or OSError into bad input.

    Wrap only calls that check what a person gave: elsewhere these errors are bugs, and a bug
    should show where it is.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise BadInputError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def need(extra: str, *modules: str) -> None:
    """Raises unless the modules of an optional extra are installed; imports none of them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInputError(
            f'{" and ".join(missing)} not installed; run: pip install "psvit[{extra}]"'
        )


# --- options --------------------------------------------------------------------------------


def positive(text: str) -> int:
    """For argparse: a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number from 1 up")
    return int(text)


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--merge",
        type=_merge,
        metavar="N",
        help="merge N pairs of tokens in every layer; or N,N,... layer by layer; or as many as "
        "leave a part of the FLOPs, such as 0.57",
    )


def _merge(text: str) -> int | list[int] | str:
    if "." in text:
        return text
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        expected = "a number, one for each layer (3,0,3), or a part of the FLOPs (0.57)"
        raise argparse.ArgumentTypeError(f"got {text}, expected {expected}") from None
    return counts if "," in text else counts[0]


def numbers(text: str) -> tuple[float, ...]:
    """For argparse: one number, or one a channel with commas between."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 3) or not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"got {text}, expected 0.5 or 0.5,0.5,0.5")
    return found


def layers(text: str) -> tuple[int, ...]:
    """For argparse: whole numbers from 1 up with commas between."""
    return tuple(positive(part) for part in text.split(","))


def span(text: str) -> slice:
    """For argparse: START:STOP, either may be left out."""
    start, colon, stop = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
        raise argparse.ArgumentTypeError(f"got {text}, expected START:STOP, for example 400:1300")
    return slice(int(start) if start else None, int(stop) if stop else None)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print only JSON on standard output, for programs"
    )


# --- output ---------------------------------------------------------------------------------


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns the OSError of a place that can't be written into bad input."""
    try:
        yield
    except OSError as error:
        raise BadInputError(f"{what} can't be written: {one_line(error)}") from error


def open_result(stack: ExitStack, place: AbstractContextManager[Path], what: str) -> Path:
    """Enters ``whole_file`` or ``whole_folder``, before the work: a bad place shows at once."""
    with writing(what):
        return stack.enter_context(place)
