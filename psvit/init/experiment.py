"""Which part of structured initialisation's gain is structure, and which the embedding's scale?

A small ViT learns few handwritten digits from each initialisation, and from each control. Nothing
is downloaded.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..bench.machine import commit, machine, versions
from ..console import progress as console_progress
from ..digits import Digits, accuracy
from ..files import whole_folder
from ..plots import draw_curves
from .impulse import impulse_init_
from .mimetic import mimetic_init_, norm_match_
from .view import scale_position_embedding

Progress = Callable[[str, float], AbstractContextManager[Any]]

SCALE = 18.0


@dataclass(frozen=True)
class Settings:
    """What ``run`` does; the defaults take a few minutes on two cores.

    Args:
        seeds: how many; each has its training images, default weights and order of batches, which
            all arms share.
        images: of training.
        epochs, batch, rate: of training with AdamW, a tenth of warm-up, and a cosine.
        every: epochs between two measurements of the accuracy; ``epochs`` is a multiple.
        early: the epoch that the table has beside the last; a multiple of ``every``.
        width, depth, heads: of the transformer, which has one token a pixel.
        processes: that train at a time, in one thread each; results don't depend on it.
    """

    seeds: int = 3
    images: int = 200
    epochs: int = 60
    batch: int = 50
    rate: float = 1e-3
    every: int = 5
    early: int = 20
    width: int = 96
    depth: int = 4
    heads: int = 4
    processes: int = 2


class Arm(NamedTuple):
    """One initialisation of a default model, and whether it scales the position embedding."""

    initialise: Callable[[Any, torch.Generator], object]
    scaled: bool = False


def _as_pytorch(model: Any, generator: torch.Generator) -> None:
    """Linear layers as PyTorch makes them: timm's are normal, of deviation 0.02, without biases."""
    torch.manual_seed(generator.initial_seed())
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


@torch.no_grad()
def _scaled(model: Any, generator: torch.Generator) -> None:
    scale_position_embedding(model, SCALE)


def _norms_of_impulse(model: Any, generator: torch.Generator) -> None:
    reference = copy.deepcopy(model)
    impulse_init_(reference, pos_scale=SCALE, generator=generator)
    norm_match_(model, reference)


#: By name; the first is what gains are gains over.
ARMS: Mapping[str, Arm] = {
    "timm default": Arm(lambda model, generator: None),
    "PyTorch default": Arm(_as_pytorch),
    "default + scale": Arm(_scaled, scaled=True),
    "norms of impulse": Arm(_norms_of_impulse, scaled=True),
    "mimetic": Arm(lambda model, g: mimetic_init_(model, generator=g)),
    "mimetic + scale": Arm(
        lambda model, g: mimetic_init_(model, pos_scale=SCALE, generator=g), scaled=True
    ),
    "impulse, Q and K only": Arm(
        lambda model, g: impulse_init_(model, pos_scale=SCALE, init_vo=False, generator=g),
        scaled=True,
    ),
    "impulse": Arm(
        lambda model, g: impulse_init_(model, pos_scale=SCALE, generator=g), scaled=True
    ),
}
DEFAULT, CONTROL = "timm default", "default + scale"


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Trains every arm with every seed; writes ``results.json`` and ``curves.png`` into a folder.

    The files appear when all is done; an error or Ctrl-C leaves none.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: epochs that don't fit ``every``, or more images than there are.
        OSError: the folder can't be written (before anything is computed).
    """
    check(settings)
    with whole_folder(output) as work, torch.random.fork_rng(devices=[]):
        start = time.perf_counter()
        epochs = list(range(settings.every, settings.epochs + 1, settings.every))
        jobs = [(settings, name, seed) for seed in range(settings.seeds) for name in ARMS]
        curves: dict[str, list[list[float]]] = {name: [] for name in ARMS}
        with progress("training", len(jobs)) as step:
            for (_, name, _), found in zip(jobs, _learned(jobs, settings.processes), strict=True):
                curves[name].append(found)
                step()
        results = {
            "settings": asdict(settings),
            "test_images": len(Digits.load().test_images),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "epochs": epochs,
            "accuracy": curves,
            "rows": [_row(settings, epochs, curves, name) for name in ARMS],
            "seconds": round(time.perf_counter() - start, 1),
        }
        draw_curves(
            epochs,
            curves,
            work / "curves.png",
            title=f"Digits: {settings.images} training images, {settings.seeds} seeds",
        )
        (work / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def check(settings: Settings) -> None:
    """Raises ValueError for settings that can't be run."""
    images = len(Digits.load().images)
    for name in ("epochs", "early"):
        value = getattr(settings, name)
        if value < 1 or value % settings.every or value > settings.epochs:
            raise ValueError(
                f"{name}: got {value}, expected a multiple of {settings.every} up to "
                f"{settings.epochs}"
            )
    if not 1 <= settings.images <= images:
        raise ValueError(f"images: got {settings.images}, expected 1 to {images}")


# --- training -------------------------------------------------------------------------------


def _learned(jobs: Sequence[tuple[Settings, str, int]], processes: int) -> Iterator[list[float]]:
    """The accuracies of each job, in order."""
    if processes == 1:
        yield from map(_learn, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_learn, jobs)


def _learn(job: tuple[Settings, str, int]) -> list[float]:
    """Test accuracies, in one thread (see ``digits.Training``)."""
    settings, name, seed = job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        digits = _few(Digits.load(), settings.images, seed)
        return _trained(settings, digits, _model(settings, ARMS[name], seed))
    finally:
        torch.set_num_threads(threads)


def _few(digits: Digits, count: int, seed: int) -> Digits:
    """So many training images, as many of each digit as can be; all of the test."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.images), generator=generator)
    labels = digits.labels[order]
    rank = torch.stack([(labels == c).cumsum(0) for c in range(10)])[labels, range(len(labels))]
    chosen = order[rank.argsort(stable=True)[:count]]
    return digits._replace(images=digits.images[chosen], labels=digits.labels[chosen])


def _model(settings: Settings, arm: Arm, seed: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer heads than taps: so it is here
        arm.initialise(model, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # one order of the batches for all arms
    return model


def _trained(settings: Settings, digits: Digits, model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.05)
    steps = settings.epochs * math.ceil(settings.images / settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    found = []
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for chosen in torch.randperm(settings.images).split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.images[chosen]), digits.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        if epoch % settings.every == 0:
            found.append(accuracy(model.eval(), digits))
    return found


# --- what explains what ---------------------------------------------------------------------


def _row(
    settings: Settings, epochs: list[int], curves: Mapping[str, list[list[float]]], name: str
) -> dict[str, Any]:
    """An arm at the early epoch and at the last: accuracy, and its gain in two parts.

    ``scale``: what scaling the embedding alone gains over the default, for arms that scale it.
    ``rest``: what is left of the arm's gain. Differences are taken seed by seed.
    """
    row: dict[str, Any] = {"name": name, "scaled": ARMS[name].scaled}
    for when, epoch in (("early", settings.early), ("end", settings.epochs)):
        at = epochs.index(epoch)
        own, default, control = (
            torch.tensor([seed[at] for seed in curves[arm]], dtype=torch.float64)
            for arm in (name, DEFAULT, CONTROL)
        )
        scale = control - default if ARMS[name].scaled else torch.zeros_like(default)
        parts = {"accuracy": own, "scale": scale, "rest": own - default - scale}
        row[when] = {part: _spread(values) for part, values in parts.items()}
    return row


def _spread(values: torch.Tensor) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds (0 for one)."""
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "deviation": deviation}
