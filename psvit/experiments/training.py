"""The recipe of the experiments: AdamW, a tenth of warm-up, a cosine; the same for every arm."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained.

    Args:
        epochs, batch, rate: of training; ``rate`` is the highest learning rate.
        every: epochs between two measurements of the accuracy.
        smoothing: part of a label that goes to all classes.
    """

    epochs: int
    batch: int
    rate: float
    every: int
    smoothing: float = 0.0

    @property
    def measured(self) -> list[int]:
        """Epochs after which the accuracy is measured."""
        return list(range(self.every, self.epochs + 1, self.every))


def trained(model: nn.Module, data: Data, recipe: Recipe) -> tuple[list[float], list[float]]:
    """Trains it on the device of the data; bfloat16 autocast on CUDA.

    The order of the batches is drawn from PyTorch's global generator.

    Returns:
        Test accuracies after ``recipe.measured``, and the seconds of each epoch without them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.05)
    steps = recipe.epochs * math.ceil(len(data.images) / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    found, seconds = [], []
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(data.images)).split(recipe.batch):
            optimizer.zero_grad()
            _loss(model, data, chosen.to(data.images.device), recipe.smoothing).backward()
            optimizer.step()
            schedule.step()
        _wait(data.images.device)
        seconds.append(time.perf_counter() - start)
        if epoch % recipe.every == 0:
            found.append(accuracy(model.eval(), data))
    return found, seconds


def _loss(model: nn.Module, data: Data, chosen: Tensor, smoothing: float) -> Tensor:
    images = data.ready(data.augment(data.images[chosen]))
    with _autocast(images.device):
        return F.cross_entropy(model(images), data.labels[chosen], label_smoothing=smoothing)


def accuracy(model: nn.Module, data: Data, batch: int = 1000) -> float:
    """Part of the test images that the model gets right."""
    with torch.inference_mode(), _autocast(data.images.device):
        found = [model(data.ready(part)).argmax(1) for part in data.test_images.split(batch)]
    return float((torch.cat(found) == data.test_labels).double().mean())


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _wait(device: torch.device) -> None:
    """A GPU computes on after its calls have returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
