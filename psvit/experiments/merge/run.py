"""All parts of the experiment, each kept as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...console import progress as console_progress
from .. import convert, slim
from ..runs import Found, Progress, about, all_runs, check_folder, write_json
from . import constant, front, planned, speed


@dataclass(frozen=True)
class Settings:
    """What ``run`` does.

    Args:
        data: as for ``psvit.experiments.convert``.
        device: "cpu" or "cuda".
    """

    data: str
    device: str = "cpu"

    def common(self) -> dict[str, Any]:
        return about("merge", {**asdict(self), "data": Path(self.data).name})


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Merges and reports, in float32.

    Returns:
        What ``results.json`` holds: by the name of a part its ``rows``.

    Raises:
        ValueError: as ``check``.
        OSError: the data can't be read, the folder can't be written.
    """
    started = time.perf_counter()
    check(settings, output)
    common = settings.common()
    learn = partial(_part, settings)
    found = all_runs(learn, list(PARTS), 1, output, common, 1, progress, threads=convert.THREADS)
    results = {
        **common,
        "report_images": convert.REPORT.stop - convert.REPORT.start,
        "parts": {name: once for name, (once,) in found.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(output / "results.json", results)
    return results


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for data that aren't there, or a folder with other runs."""
    convert.check_data(settings.data, settings.device)
    check_folder(output, settings.common())


def _part(settings: Settings, name: str, seed: int) -> Found:
    started = time.perf_counter()
    found = PARTS[name](settings)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def _constant(settings: Settings) -> Found:
    model, _, report = convert.loaded(settings.data, settings.device)
    return {"original": report.accuracy(report.reference), "rows": constant.rows(model, report)}


def _planned(settings: Settings) -> Found:
    model, images, report = convert.loaded(settings.data, settings.device)
    original = report.accuracy(report.reference)
    return {"original": original, "rows": planned.rows(model, images, report)}


def _front(settings: Settings, tokens: str) -> Found:
    """Which layers share is found out with few tokens, where that is quick."""
    size = front.SIZES[tokens]
    model, images, _ = convert.loaded(settings.data, settings.device)
    with console_progress("sharing beside merging", convert.DEPTH - 1) as step:
        prices = front.prices(model, images, step)
    model, images, report = convert.loaded(settings.data, settings.device, size.side)
    images = images[: size.images]
    with console_progress(tokens, len(size.shared) * len(front.MERGED)) as step:
        rows = front.rows(model, images, report, prices, size.shared, step)
    return {"original": report.accuracy(report.reference), "images": len(images), "rows": rows}


def _slim(settings: Settings) -> Found:
    model, _, report = convert.loaded(settings.data, settings.device)
    return {"original": report.accuracy(report.reference), "rows": slim.rows(model, report)}


def _speed(settings: Settings) -> Found:
    return {"rows": speed.rows(settings.device)}


#: What is timed comes last.
PARTS: dict[str, Callable[[Settings], Found]] = {
    "planned": _planned,
    **{f"sharing, {tokens}": partial(_front, tokens=tokens) for tokens in front.SIZES},
    "slimming": _slim,
    "constant": _constant,
    "speed": _speed,
}
