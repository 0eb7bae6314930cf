"""How much of the machine others used meanwhile: what tells a figure from noise."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Others:
    """Share of all cores that other processes used since this was made, read when called.

    None where the system doesn't tell (it is read from Linux's /proc/stat), and for spans that
    are too short to tell.
    """

    SHORTEST = 0.3  # seconds; the counters tick in hundredths

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._cores = _cores()
        self._own = _own()

    def __call__(self) -> float | None:
        busy, everything = (now - was for now, was in zip(_cores(), self._cores, strict=True))
        if everything <= 0 or time.monotonic() - self._began < self.SHORTEST:
            return None
        return min(max((busy - (_own() - self._own)) / everything, 0.0), 1.0)


def _cores() -> tuple[float, float]:
    """Seconds that all cores together were busy, and that they had."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
        ticks = [float(field) for field in first.split()[1:9]]  # guests are in user already
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0, 0.0
    idle = sum(ticks[3:5])  # idle, and waiting for disks
    return (sum(ticks) - idle) / hertz, sum(ticks) / hertz


def _own() -> float:
    used = os.times()
    return used.user + used.system
