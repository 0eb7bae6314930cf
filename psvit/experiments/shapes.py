"""What shape is best at equal FLOPs: DeiT's, PSViT-1D or PSViT-2D?

Each is trained from each initialisation by the same recipe on the same images in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import progress as console_progress
from .data import Data, digits, packed
from .init import ARMS as INIT_ARMS
from .init import initialised
from .runs import Found, Progress, about, all_runs, check_folder, spread, write_results
from .tasks import DEIT, TASKS, Task, costs, model_of
from .training import Recipe, trained

INITIALISATIONS = {
    "default": INIT_ARMS["timm default"],
    "default + scale": INIT_ARMS["default + scale"],
    "impulse": INIT_ARMS["impulse"],
}


def _arms(task: Task) -> dict[str, tuple[str, str]]:
    """By name: shape and initialisation."""
    return {f"{shape}, {init}": (shape, init) for init in INITIALISATIONS for shape in task.shapes}


RECIPES = {
    "digits": Recipe(epochs=12, batch=50, rate=1e-3, every=1),
    "packed": Recipe(epochs=100, batch=256, rate=1e-3, every=10, smoothing=0.1),
}


@dataclass(frozen=True)
class Settings:
    """What ``run`` does; on digits it takes some ten minutes on two cores that do nothing else.

    Args:
        data: "digits", or a folder or file of packed images (see ``data.packed``).
        patch: pixels of a token's side: 1 for digits, 2 or 4 for others.
        recipe: see ``Recipe``.
        device: "cpu" or "cuda".
        seeds: how many; each has its training images, default weights and order of batches.
        images: of training; None: all.
        processes: that train at a time, in one thread each; accuracies don't depend on it.
    """

    data: str
    patch: int
    recipe: Recipe
    device: str = "cpu"
    seeds: int = 3
    images: int | None = None
    processes: int = 2

    @property
    def task(self) -> Task:
        """Raises ValueError for a patch that has none."""
        patches = [patch for kind, patch in TASKS if kind == _kind(self.data)]
        if self.patch not in patches:
            expected = " or ".join(map(str, patches))
            raise ValueError(f"patch: got {self.patch}, expected {expected} for this data")
        return TASKS[_kind(self.data), self.patch]

    def common(self) -> dict[str, Any]:
        """What the runs in one folder have in common; where the data lie is nobody's affair."""
        found = about("shapes", {**asdict(self), "data": Path(self.data).name})
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else None
        return {**found, "gpu": gpu}


def _kind(data: str) -> str:
    return "digits" if data == "digits" else "packed"


def settings_for(
    data: str = "digits", patch: int | None = None, epochs: int | None = None, **others: Any
) -> Settings:
    """The settings for some data, with the patch and the recipe for it; see ``Settings``."""
    recipe = RECIPES[_kind(data)]
    if epochs is not None:
        every = max(n for n in range(1, max(1, epochs // 10) + 1) if epochs % n == 0)
        recipe = replace(recipe, epochs=epochs, every=every)
    return Settings(data, patch or (1 if data == "digits" else 4), recipe, **others)


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Trains every arm with every seed; writes ``results.json`` and ``curves.png`` into a folder.

    Runs that the folder has from an earlier call are not made again.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: as ``check``.
        OSError: the folder can't be written (before anything is computed).
    """
    check(settings, output)
    start = time.perf_counter()
    common, arms, data = settings.common(), _arms(settings.task), _data(settings)
    images = settings.images or len(data.images)
    found = all_runs(
        partial(_learn, settings),
        list(arms),
        settings.seeds,
        output,
        common,
        settings.processes,
        progress,
    )
    results = {
        **common,
        "images": images,
        "test_images": len(data.test_images),
        "shapes": costs(settings.task, data.classes),
        "epochs": settings.recipe.measured,
        "accuracy": {arm: [run["accuracy"] for run in runs] for arm, runs in found.items()},
        "rows": [_row(found, arms, arm, images) for arm in arms],
    }
    title = f"Equal FLOPs: {images} training images, {settings.seeds} seeds"
    return write_results(output, results, title, start)


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for settings that can't be run, or a folder with runs made otherwise."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but PyTorch sees no CUDA device here")
    task, data = settings.task, _data(settings)
    shape = tuple(data.images.shape[1:])
    if shape != task.image:
        raise ValueError(
            f"data: got images of (channels, height, width) {shape}, expected {task.image}, for "
            "which the shapes cost the same"
        )
    if settings.images is not None:
        data.few(settings.images, seed=0)
    check_folder(output, settings.common())


# --- training -------------------------------------------------------------------------------


def _data(settings: Settings) -> Data:
    return _loaded(settings.data, settings.device)


@lru_cache(maxsize=1)
def _loaded(text: str, device: str) -> Data:
    return digits(device) if text == "digits" else packed(text, device)


def _learn(settings: Settings, arm: str, seed: int) -> Found:
    task, data = settings.task, _data(settings)
    shape, init = _arms(task)[arm]
    if settings.images is not None:
        data = data.few(settings.images, seed)
    torch.manual_seed(seed)
    model = model_of(task, task.shapes[shape], data.classes)
    model = initialised(model, INITIALISATIONS[init], seed)
    with _PeakMemory(settings.device) as memory:
        accuracies, seconds = trained(model.to(settings.device), data, settings.recipe)
    return {"accuracy": accuracies, "epoch_seconds": seconds, "peak_bytes": memory.peak}


class _PeakMemory:
    """Most bytes of a GPU that were taken at a time, beyond what was before; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.counts = device == "cuda"
        self.peak: int | None = None

    def __enter__(self) -> _PeakMemory:
        if self.counts:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self.counts:
            self.peak = torch.cuda.max_memory_allocated() - self.before


# --- what explains what ---------------------------------------------------------------------


def _row(
    found: Mapping[str, list[Found]], arms: Mapping[str, tuple[str, str]], arm: str, images: int
) -> dict[str, Any]:
    """An arm at the end, and beside DeiT's shape and the default; differences seed by seed.

    The time is that of training in the median epoch: the first has what is made only once.
    """
    shape, init = arms[arm]
    deit, default = f"{DEIT}, {init}", f"{shape}, default"
    seconds = _epoch(found[arm])
    peaks = [run["peak_bytes"] for run in found[arm]]
    return {
        "shape": shape,
        "initialisation": init,
        "accuracy": spread(_end(found[arm])),
        "over_deit": spread(_end(found[arm]) - _end(found[deit])),
        "over_default": spread(_end(found[arm]) - _end(found[default])),
        "epoch_seconds": seconds,
        "time": seconds / _epoch(found[deit]),
        "images_per_second": images / seconds,
        "peak_bytes": None if None in peaks else max(peaks),
    }


def _end(runs: list[Found]) -> Tensor:
    """Accuracies after the last epoch, one a seed."""
    return torch.tensor([run["accuracy"][-1] for run in runs], dtype=torch.float64)


def _epoch(runs: list[Found]) -> float:
    """Seconds of the median epoch of all seeds."""
    return statistics.median(seconds for run in runs for seconds in run["epoch_seconds"])
