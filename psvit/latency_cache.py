"""Latencies that are measured on a machine once, and kept in the user's cache folder."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from psvit_kernels import registry
from psvit_kernels.probe import cache_file, device_key

from .files import whole_file
from .timing import interleaved


def medians(
    probes: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    *,
    seconds: float = 10.0,
    step: Callable[[float], object] = lambda part: None,
) -> dict[str, float]:
    """Milliseconds of a call by label; what is kept from earlier isn't measured again.

    They are kept in ``psvit/latency.json`` in the user's cache folder, by device, threads, kernels
    and versions. A damaged file counts as none; where nothing can be kept, that is a warning.

    Args:
        probes: by a label that says all else that the latency depends on: what makes a function to
            time. It is called for those that are measured alone.
        device: that the functions work on.
        seconds: of measuring, about.
        step: called with the part of the work done, for a progress bar.
    """
    from .bench.machine import versions  # which imports psvit

    key = f"{device_key(device)}, kernels {_kernels()}, psvit {versions()['psvit']}"
    content = _read()
    entries = _entries(content.get(key))
    missing = {label: make() for label, make in probes.items() if label not in entries}
    if missing:
        times = interleaved(missing, seconds=seconds, step=step)
        entries |= {label: time.median for label, time in times.items()}
        _keep({**content, key: entries})
    return {label: entries[label] for label in probes}


def _kernels() -> str:
    ready = [name for name, missing in registry.providers().items() if missing is None]
    return registry.forced() or " ".join(ready)


def _file() -> Path:
    return cache_file().with_name("latency.json")


def _read() -> dict[str, Any]:
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:
        text = f"kept latencies can't be read ({error}); they are measured again"
        warnings.warn(text, stacklevel=3)
        return {}


def _entries(found: Any) -> dict[str, float]:
    """Of what was read under a key, those that are times."""
    rows = found.items() if isinstance(found, dict) else ()
    return {label: ms for label, ms in rows if isinstance(ms, float) and 0 < ms < math.inf}


def _keep(content: Mapping[str, Any]) -> None:
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as work:
            work.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        text = f"latencies can't be kept ({error}); they are measured every time"
        warnings.warn(text, stacklevel=3)
