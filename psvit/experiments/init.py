"""Which part of structured initialisation's gain is structure, and which the embedding's scale?

A small ViT learns few handwritten digits from each initialisation, and from each control. Nothing
is downloaded.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..console import progress as console_progress
from ..init.impulse import impulse_init_
from ..init.mimetic import mimetic_init_, norm_match_
from ..init.view import scale_position_embedding
from .data import digits
from .runs import Found, Progress, about, all_runs, check_folder, spread, write_results
from .training import Recipe, trained

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

    Runs that the folder has from an earlier call are not made again.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: as ``check``.
        OSError: the folder can't be written (before anything is computed).
    """
    check(settings, output)
    start = time.perf_counter()
    common = about("init", asdict(settings))
    found = all_runs(
        partial(_learn, settings),
        list(ARMS),
        settings.seeds,
        output,
        common,
        settings.processes,
        progress,
    )
    curves = {name: [run["accuracy"] for run in runs] for name, runs in found.items()}
    epochs = _recipe(settings).measured
    results = {
        **common,
        "test_images": len(digits().test_images),
        "epochs": epochs,
        "accuracy": curves,
        "rows": [_row(settings, epochs, curves, name) for name in ARMS],
    }
    title = f"Digits: {settings.images} training images, {settings.seeds} seeds"
    return write_results(output, results, title, start)


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for settings that can't be run, or a folder with runs made otherwise."""
    for name in ("epochs", "early"):
        value = getattr(settings, name)
        if value < 1 or value % settings.every or value > settings.epochs:
            raise ValueError(
                f"{name}: got {value}, expected a multiple of {settings.every} up to "
                f"{settings.epochs}"
            )
    digits().few(settings.images, seed=0)
    check_folder(output, about("init", asdict(settings)))


# --- training -------------------------------------------------------------------------------


def _recipe(settings: Settings) -> Recipe:
    return Recipe(settings.epochs, settings.batch, settings.rate, settings.every)


def _learn(settings: Settings, name: str, seed: int) -> Found:
    data = digits().few(settings.images, seed)
    accuracies, _ = trained(_model(settings, ARMS[name], seed), data, _recipe(settings))
    return {"accuracy": accuracies}


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
    return initialised(model, arm, seed)


def initialised(model: nn.Module, arm: Arm, seed: int) -> nn.Module:
    """The model as the arm has it; the order of batches drawn next is the same for all arms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer heads than taps: so it is here
        arm.initialise(model, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    return model


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
        row[when] = {part: spread(values) for part, values in parts.items()}
    return row
