"""Latencies that are measured on a machine once, and kept in the user's cache folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from psvit_kernels import registry, storage
from psvit_kernels.probe import device_key

from .timing import interleaved


def medians(
    probes: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    seconds: float = 10.0,
    step: Callable[[float], object] = lambda part: None,
) -> dict[str, float]:
    """Milliseconds of a call by label; what is kept from earlier isn't measured again.

    They are kept in ``psvit/latencies.json`` in the user's cache folder, by device, threads,
    kernels and versions: see ``psvit_kernels.storage``.

    Args:
        probes: by a label that says all else that the latency depends on: what makes a function to
            time. It is called for those that are measured alone.
        device: that the functions work on.
        seconds: of measuring, about.
        step: called with the part of the work done, for a progress bar.
    """
    from .bench.machine import versions  # which imports psvit

    key = f"{device_key(device)}, kernels {_kernels()}, psvit {versions()['psvit']}"
    entries = _entries(storage.read("latencies").get(key))
    missing = {label: make() for label, make in probes.items() if label not in entries}
    if missing:
        times = interleaved(missing, seconds=seconds, step=step)
        entries |= {label: time.median for label, time in times.items()}
        storage.keep("latencies", key, entries)
    return {label: entries[label] for label in probes}


def _kernels() -> str:
    ready = [name for name, missing in registry.providers().items() if missing is None]
    return registry.forced() or " ".join(ready)


def _entries(found: Any) -> dict[str, float]:
    """Of what was read under a key, those that are times."""
    rows = found.items() if isinstance(found, dict) else ()
    return {label: ms for label, ms in rows if isinstance(ms, float) and 0 < ms < math.inf}
