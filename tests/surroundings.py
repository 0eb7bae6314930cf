"""What surrounds a test: data, threads, progress, the rates of a machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
