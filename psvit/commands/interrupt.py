"""Ctrl-C that can't get lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any

from ..console import progress


class Interrupt(AbstractContextManager["Interrupt"]):
    """While it is open, Ctrl-C stops work where a step ends; a second one stops it at once.

    Python raises KeyboardInterrupt wherever it is, and drops what is raised in a destructor or in
    a callback: a run would go on as if nobody had asked.
    """

    def __enter__(self) -> Interrupt:
        self._wanted = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._wanted and isinstance(error, Exception):
            raise KeyboardInterrupt from error  # such as of a loading process that ended before

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._wanted:
            raise KeyboardInterrupt
        self._wanted = True

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Any]:
        """As ``psvit.console.progress``; its steps are those where work stops."""
        with progress(title, total) as step:

            def checked(count: float = 1) -> None:
                step(count)
                if self._wanted:
                    raise KeyboardInterrupt

            yield checked
