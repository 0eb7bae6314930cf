"""Training runs that take a second each: their data, configs, processes and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from surroundings import silent

from psvit import checkpoint, train

SMALL = {
    "model": "psvit",
    "schedule": "AS|A",
    "widths": [16, 32],
    "model_args": {"patch_size": 1, "head_dim": 16, "mlp_ratio": 1},
    "epochs": 2,
    "batch": 8,
    "warmup_epochs": 0,
    "workers": 0,
    "tensorboard": False,
    "ema": 0.9,
    "auto_augment": None,
}


def four_classes(folder: Path) -> Path:
    """Forty images of 8 x 8; four classes: bright above or below, in red or in blue."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 17)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 60, (count, 8, 8, 3), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            half, colour = divmod(int(label), 2)
            image[4 * half : 4 * half + 4, :, 2 * colour] += 180
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    path = folder / "four.npz"
    np.savez(path, **arrays)
    return path


def make(npz: Path, folder: Path, **changes) -> train.Config:
    return train.Config(**{**SMALL, "data": str(npz), "output": str(folder), **changes})


def run(config: train.Config, **options) -> list[dict[str, float]]:
    return train.train(config, progress=silent, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    """The same checkpoint, bit for bit: weights, averaged weights, optimiser, position."""
    states = [checkpoint.load(path, "training run") for path in (folder, other)]
    for state in states:
        del state["config"]["output"]
        for row in state["history"]:
            del row["seconds"], row["images_per_second"]
    leaves, others = (dict(_leaves(state)) for state in states)
    assert leaves.keys() == others.keys()
    for name, value in leaves.items():
        if isinstance(value, torch.Tensor):
            difference = (value.double() - others[name].double()).abs().max()
            assert torch.equal(value, others[name]), f"{name}: differs by up to {difference}"
        else:
            assert value == others[name], f"{name}: {value} and {others[name]}"


def _leaves(value, name=""):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in pairs:
        if isinstance(child, (dict, list, tuple)):
            yield from _leaves(child, f"{name}/{key}")
        else:
            yield f"{name}/{key}", child


def started(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a process that imports what this one does: elsewhere, as the sources lie here."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=240
    )
