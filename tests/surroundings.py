"""What surrounds a test: data, threads, progress, Ctrl-C, the rates of a machine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

#: Real images and weights, where they are.
DATA = Path(os.environ.get("PSVIT_DATA", Path(__file__).parents[2] / "shared" / "data"))

#: What the rates of a machine are where a test must not measure them: see ``probed``.
MEASURED = {"copy": 4e12, "exp": 3e12, "float32": 5e13, "bfloat16": 7e14, "float16": 7e14}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def silent(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Progress that nobody sees."""
    yield lambda part=1: None


@contextmanager
def interrupted(owner: type, method: str, after: int) -> Iterator[None]:
    """Ctrl-C in place of one call of a method, after so many others."""
    original, calls = getattr(owner, method), itertools.count()

    def called(*args, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return original(*args, **options)

    with patch.object(owner, method, called):
        yield
