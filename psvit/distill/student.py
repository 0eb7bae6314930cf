"""A converted model while it learns from its original."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibrate.lockstep import GroupPass, Lockstep, entered
from ..calibrate.run import PREFIX_WEIGHT
from ..numbers import check_number
from ..outputs import logits_of, relative_errors
from .augment import augmented

#: Batches of images that are run up to the layers that learn, and how often each is learnt from
#: then.
BATCHES, TIMES = 8, 4


@dataclass(frozen=True)
class Distillation:
    """How a converted model learns.

    Args:
        steps: of AdamW.
        batch: images of a step.
        lr: highest learning rate: a tenth of the steps is warm-up, then it falls as a cosine.
        tune: "all" parameters in use, or only "norms" and biases.
        seed: of order and changes of the images.
    """

    steps: int = 60
    batch: int = 64
    lr: float = 1e-4
    tune: Literal["all", "norms"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, least=1)
        check_number("batch", self.batch, least=1)
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected more than 0")
        if self.tune not in ("all", "norms"):
            raise ValueError(f'tune: got "{self.tune}", expected "all" or "norms"')


@dataclass(frozen=True)
class _Seen:
    """A batch, what enters the layers that learn, and what should leave them."""

    images: Tensor
    group: GroupPass
    scores: Tensor


class Student:
    """A model whose layers learn, from the first that its schedule changes to the last.

    They learn the original's outputs, and its prefix tokens after each layer. Other tokens have no
    goal: those of pooled models, brought nearer to averages of the original's, give outputs further
    from its.

    Args:
        original: converted to a schedule whose layers all attend.
        model: the conversion; it is changed. Both in eval mode.
        images: `(B, channels, height, width)`.
        how: settings.
        seed: of order and changes of the images.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        images: Tensor,
        how: Distillation,
        seed: int,
    ) -> None:
        self.original, self.model = original, model
        self.images, self.how, self.seed = images, how, seed
        self.lockstep = Lockstep(original, model)
        self.stack = self.lockstep.converted
        self.layers = range(self.lockstep.first_changed, len(self.stack))
        blocks = [self.stack.block(layer) for layer in self.layers]
        used = [p for block in blocks for p in block.parameters() if p.requires_grad]
        # Those of norms and biases have one dimension.
        self.tuned = used if how.tune == "all" else [p for p in used if p.dim() == 1]
        self.left = how.steps if self.tuned else 0
        if not self.left:
            return
        self.optimizer = torch.optim.AdamW(self.tuned, lr=how.lr, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, how.lr, total_steps=how.steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def round(self) -> Iterator[None]:
        """Some steps, whose images depend on the number of those that are left alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.left)
        passes = [self._pass(generator) for _ in range(min(BATCHES, self.left))]
        turns = [torch.randperm(len(passes), generator=generator) for _ in range(TIMES)]
        for number in torch.cat(turns)[: self.left].tolist():
            self._update(passes[number])
            yield

    def _pass(self, generator: torch.Generator) -> _Seen:
        chosen = torch.randint(len(self.images), (self.how.batch,), generator=generator)
        images = augmented(self.images[chosen].to(self._device), generator)
        with self._autocast(), torch.no_grad():
            group = self.lockstep.group(images, self.layers)
            scores = logits_of(self.original(images)).float()
        return _Seen(images, group, scores)

    def _update(self, seen: _Seen) -> None:
        with self._autocast():
            loss = self._loss(seen)
        if not loss.isfinite():
            number = self.how.steps - self.left + 1
            raise FloatingPointError(f"loss: is {loss.item()} in step {number}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tuned, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.left -= 1

    def _loss(self, seen: _Seen) -> Tensor:
        prefix = self.stack.prefix
        tokens = seen.group.outputs(self.stack, self.layers)
        with entered(self.stack, len(self.stack), tokens[-1]):
            scores = logits_of(self.model(seen.images)).float()
        loss = relative_errors(scores, seen.scores).mean()
        if not prefix:
            return loss
        pairs = zip(tokens, seen.group.goals, strict=True)
        prefixes = [[x[:, :prefix].flatten(1).float() for x in pair] for pair in pairs]
        errors = [relative_errors(*pair).mean() for pair in prefixes]
        return loss + PREFIX_WEIGHT * torch.stack(errors).mean()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _autocast(self) -> AbstractContextManager[Any]:
        cuda = self._device.type == "cuda"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=cuda)

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "left": self.left,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.left = state["left"]
