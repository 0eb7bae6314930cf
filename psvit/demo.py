"""The whole path on a small model: train, analyze, convert, fine-tune, measure, draw.

Nothing is downloaded: the images are the handwritten digits that scikit-learn brings along.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import psvit_kernels
from psvit_kernels.registry import PREFERENCE

from .accelerate import accelerate, convert_quietly
from .analyze import Analysis, analyze
from .console import progress as console_progress
from .digits import Digits, Training, accuracy, small_vit
from .files import whole_folder
from .plots import draw_attention, draw_tradeoff
from .pooling import Kind
from .schedule import ATTEND, Schedule
from .stack import find_stack, record_maps
from .timing import Latency, interleaved

Progress = Callable[[str, float], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """What ``run`` does; the defaults take about two minutes on two cores.

    Args:
        epochs: of training.
        tune_epochs: of fine-tuning after the conversion.
        seed: of weights, order and jitter; runs with one seed on one machine agree.
        width, depth, heads: of the transformer.
        shared: how many layers shall share; the analysis chooses which.
        pool_after: layers before the one pool.
        pool: kind of the pool.
        batch: images of a latency measurement.
        seconds: of latency measurement, all models together.
        analysed: training images whose attention maps are compared.
    """

    epochs: int = 20
    tune_epochs: int = 8
    seed: int = 0
    width: int = 64
    depth: int = 8
    heads: int = 2
    shared: int = 4
    pool_after: int = 2
    pool: Kind = "avg"
    batch: int = 64
    seconds: float = 8.0
    analysed: int = 256


class Entry(NamedTuple):
    """A row of the table: the model as it is, how psvit runs it, and its schedule."""

    name: str
    model: nn.Module
    fast: nn.Module
    schedule: Schedule


@dataclass
class Models:
    """The three models of the table, in eval mode, and how the original was analysed."""

    original: nn.Module
    converted: nn.Module
    tuned: nn.Module
    schedule: Schedule
    analysis: Analysis


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Does everything and writes ``results.json`` and three pictures into a folder.

    The files appear when all is done, each of them whole; an error or Ctrl-C leaves none.

    Args:
        settings: what to do.
        output: the folder, made if it is missing.
        progress: called with a title and a number of steps; a context manager that gives a
            function to call after each step.

    Returns:
        What ``results.json`` holds.

    Raises:
        OSError: the folder can't be written (before anything is computed).
    """
    with whole_folder(output) as work, torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        start = time.perf_counter()
        digits = Digits.load()
        models = make_models(settings, digits, progress)
        rows = measure(settings, models, digits, progress)
        results = {
            "settings": asdict(settings),
            "train_images": len(digits.images),
            "test_images": len(digits.test_images),
            "schedule": str(models.schedule),
            "threads": torch.get_num_threads(),
            "providers": {
                name: reason or "ready" for name, reason in psvit_kernels.providers().items()
            },
            "versions": {"torch": torch.__version__},
            "rows": rows,
            "analysis": models.analysis.to_dict(),
            "seconds": round(time.perf_counter() - start, 1),
        }
        draw(results, models, digits, work)
        text = json.dumps(results, indent=2)
        (work / "results.json").write_text(text + "\n", encoding="utf-8")
    return results


def make_models(settings: Settings, digits: Digits, progress: Progress) -> Models:
    """Trains the original, chooses its schedule, converts it, and fine-tunes what came out."""
    original = small_vit(settings.width, settings.depth, settings.heads)
    training = Training(settings.epochs, rate=1.5e-3)
    with progress("training a ViT on digits", training.steps(digits)) as step:
        training.run(original, digits, step)
    analysis = analyze(original, digits.images[: settings.analysed])
    schedule = analysis.schedule(settings.shared, pools=(settings.pool_after,))
    converted = _convert(original, schedule, settings)
    tuned = copy.deepcopy(converted)
    tuning = Training(settings.tune_epochs, rate=5e-4)
    with progress(f"fine-tuning {schedule}", tuning.steps(digits)) as step:
        tuning.run(tuned, digits, step, teacher=original)
    return Models(original, converted, tuned, schedule, analysis)


def _convert(model: nn.Module, schedule: str | Schedule, settings: Settings) -> nn.Module:
    return convert_quietly(model, schedule, pool=settings.pool, size_bias=True).eval()


# --- measurement ----------------------------------------------------------------------------


def measure(
    settings: Settings, models: Models, digits: Digits, progress: Progress
) -> list[dict[str, Any]]:
    """One row a model: accuracy, cost, latency by provider, and difference from the reference.

    The original's row has the host's own latencies, and psvit's with a schedule that changes
    nothing, so that what the kernels give and what the schedule gives can be told apart.
    """
    depth = settings.depth
    plain = _convert(models.original, ATTEND * depth, settings)
    entries = [
        Entry("original", models.original, plain, Schedule(ATTEND * depth)),
        Entry("converted", models.converted, models.converted, models.schedule),
        Entry("fine-tuned", models.tuned, models.tuned, models.schedule),
    ]
    timed = _latencies(settings, entries, digits, progress)
    baseline = timed[ATTEND * depth]["PyTorch SDPA"].median
    rows = []
    for name, network, fast, schedule in entries:
        latency = timed[str(schedule)]
        best = _best(latency)
        rows.append(
            {
                "name": name,
                "schedule": str(schedule),
                "accuracy": accuracy(network, digits),
                "params": schedule.params(network, pool=settings.pool),
                "flops": schedule.flops(network, pool=settings.pool),
                "latency": {key: value.to_dict() for key, value in latency.items()},
                "best": best,
                "speed_up": baseline / latency[best].median,
                "largest_difference": _difference(fast, digits.test_images),
            }
        )
    return rows


def _best(latency: dict[str, Latency]) -> str:
    """What a person would run: the host as it is, or psvit with the compiled kernels."""
    return next(c for c in ("PyTorch SDPA", "psvit cpu", "psvit reference") if c in latency)


def _latencies(
    settings: Settings, entries: list[Entry], digits: Digits, progress: Progress
) -> dict[str, dict[str, Latency]]:
    """By schedule (models of one schedule do the same work) and contender."""
    images = digits.test_images[: settings.batch]
    functions: dict[tuple[str, str], Callable[[], object]] = {}
    for name, network, fast, schedule in entries:
        if name == "original":
            functions[str(schedule), "PyTorch eager"] = partial(_eager(network), images)
            functions[str(schedule), "PyTorch SDPA"] = partial(network, images)
        ready = psvit_kernels.providers()
        for provider in (*PREFERENCE["cpu"], "reference"):
            if ready[provider] is None:
                functions[str(schedule), f"psvit {provider}"] = _forced(provider, fast, images)
    with progress("latency", 1) as step:
        found = interleaved(functions, seconds=settings.seconds, step=step)
    result: dict[str, dict[str, Latency]] = {}
    for (text, contender), latency in found.items():
        result.setdefault(text, {})[contender] = latency
    return result


def _eager(model: nn.Module) -> nn.Module:
    """The host's own attention without PyTorch's fused kernel."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def _forced(provider: str, model: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> object:
        with psvit_kernels.use(provider):
            return model(images)

    return call


def _difference(model: nn.Module, images: Tensor) -> float | None:
    """Of the class scores: the compiled kernels from the reference; None without the former."""
    if psvit_kernels.providers()["cpu"] is not None:
        return None
    with torch.inference_mode():
        found = [_forced(provider, model, images)() for provider in ("reference", "cpu")]
    return float((found[0] - found[1]).abs().max())  # type: ignore[operator]


# --- pictures -------------------------------------------------------------------------------


def draw(results: dict[str, Any], models: Models, digits: Digits, folder: Path) -> None:
    """The three pictures of the demo."""
    models.analysis.plot(
        folder / "attention-similarity.png",
        title=f"A small ViT on digits: which layers attend alike ({models.schedule} chosen)",
    )
    batch = results["settings"]["batch"]
    draw_tradeoff(
        [_point(row, results["test_images"]) for row in results["rows"]],
        folder / "accuracy-latency.png",
        title="Digits: accuracy (and its standard error) against latency",
        latency_label=f"latency of {batch} images, ms (median, threads: {results['threads']})",
    )
    sample = digits.test_images[:1]
    plain = accelerate(models.original, ATTEND * models.schedule.depth)
    rows = {"original": _watched(plain, sample), "fine-tuned": _watched(models.tuned, sample)}
    draw_attention(
        sample[0, 0],
        rows,
        folder / "attention-maps.png",
        title="Where the class token looks: mean of the heads, each picture on its own scale",
    )


def _point(row: dict[str, Any], tests: int) -> dict[str, Any]:
    part = row["accuracy"]
    return {
        "name": f"{row['name']} ({row['best']})",
        "latency": row["latency"][row["best"]]["median_ms"],
        "accuracy": part,
        "error": (part * (1 - part) / tests) ** 0.5,
        "converted": row["name"] != "original",
        "below": row["name"] == "converted",
    }


def _watched(model: nn.Module, image: Tensor) -> tuple[str, list[Tensor]]:
    """Letters of the schedule, and the class token's attention to the patches in each layer."""
    stack = find_stack(model)
    with torch.inference_mode(), record_maps(model) as maps:
        model(image)
    layouts = [stack.layouts(maps[0].shape[-1])[stage] for stage in stack.stages]
    received = [m[0, :, 0, 1:].mean(0) for m in maps]  # (patches,) each
    return stack.schedule.kinds, [
        r.unflatten(0, layout.grid) for r, layout in zip(received, layouts, strict=True)
    ]
