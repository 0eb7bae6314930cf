"""Training of the supernet, one random candidate a step, and the accuracy of its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .space import Candidate
from .supernet import Supernet

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """What a supernet learns from, and what its candidates are compared on.

    Args:
        epoch: from a number, counted from 0, to that epoch's batches: images `(B, in_chans, height,
            width)` and labels `(B,)`; the same for the same number.
        steps: batches of an epoch.
        held_out: batches of training images that no epoch has.
    """

    epoch: Callable[[int], Iterable[Batch]]
    steps: int
    held_out: Sequence[Batch]


class Training:
    """AdamW with a tenth of warm-up and a cosine; each step trains one candidate, drawn anew.

    Which candidates are drawn depends on the seed and the epoch alone, so that training goes on
    after any epoch as if it had never stopped.

    Args:
        supernet: what is trained.
        data: what it learns from.
        epochs, lr: how long, and the highest learning rate.
        seed: of the candidates.

    Source: single path one-shot, arXiv 1904.00420, section 3.2.
    """

    def __init__(
        self, supernet: Supernet, data: Data, *, epochs: int, lr: float, seed: int
    ) -> None:
        from timm.scheduler import create_scheduler_v2

        self.supernet, self.data = supernet, data
        self.lr, self.seed = lr, seed
        self.done = 0
        self.optimizer = torch.optim.AdamW(supernet.parameters(), lr=lr, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=epochs,
            warmup_epochs=epochs // 10,
            warmup_lr=lr / 10,
            min_lr=lr / 100,
            step_on_epochs=False,
            updates_per_epoch=data.steps,
        )

    def epoch(self, step: Callable[[], object] = lambda: None) -> None:
        """One more; ``step`` is called after each batch.

        Raises:
            FloatingPointError: the loss isn't finite.
        """
        space = self.supernet.train().space
        rng = Random(f"{self.seed} epoch {self.done}")
        first = self.done * self.data.steps
        for i, (images, labels) in enumerate(self.data.epoch(self.done), first):
            self.scheduler.step_update(i)
            loss = self._step(images, labels, space.sample(rng))
            step()
        self.done += 1
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} after epoch {self.done}; try a learning rate below "
                f"{self.lr:g}"
            )

    def _step(self, images: Tensor, labels: Tensor, candidate: Candidate) -> Tensor:
        device = next(self.supernet.parameters()).device
        scores = self.supernet(images.to(device), candidate)
        loss = F.cross_entropy(scores, labels.to(device), label_smoothing=0.1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.supernet.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the supernet's weights were loaded."""
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])


@torch.inference_mode()
def accuracy(supernet: Supernet, candidate: Candidate, batches: Iterable[Batch]) -> float:
    """Part of the images that a candidate gets right with the supernet's weights."""
    supernet.eval()
    device = next(supernet.parameters()).device
    right = count = 0
    for images, labels in batches:
        found = supernet(images.to(device), candidate).argmax(1).cpu()
        right += int((found == labels).sum())
        count += len(labels)
    return right / count
