"""A converted model while it learns from its original, one part after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..block import Block
from ..calibrate.lockstep import GroupPass, Lockstep, entered
from ..calibrate.run import PREFIX_WEIGHT
from ..numbers import check_number
from ..outputs import distance_of, logits_of
from ..schedule import Schedule
from .augment import augmented

#: Batches of images that are run up to a part at a time, and how often each is learnt from then.
BATCHES, TIMES = 8, 4


@dataclass(frozen=True)
class Distillation:
    """How a converted model learns.

    Args:
        steps: of AdamW, for each part.
        batch: images of a step.
        lr: highest learning rate for tokens; for outputs it is a tenth of that. A tenth of a
            part's steps is warm-up, then it falls as a cosine.
        tune: "all" parameters in use, or only "norms" and biases.
        seed: of order and changes of the images.
    """

    steps: int = 200
    batch: int = 32
    lr: float = 1e-3
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
class Part:
    """Layers that learn together.

    Args:
        layers: in order, counted from 0; the first one attends.
        outputs: whether they learn the original's outputs, and its prefix tokens after each layer;
            else all of its tokens there.
    """

    layers: Sequence[int]
    outputs: bool

    def __str__(self) -> str:
        first, last = self.layers[0] + 1, self.layers[-1] + 1
        return f"layers {first} to {last}, {'outputs' if self.outputs else 'tokens'}"


def parts_of(schedule: Schedule) -> list[Part]:
    """What a schedule changes, in the order in which it learns.

    Each group of layers with one map learns tokens. Pooled tokens have no such goal: brought nearer
    to averages of the original's, they give outputs further from its; so all layers after the first
    pool learn the outputs.
    """
    parts = [Part(group, False) for group in schedule.groups if len(group) > 1]
    if schedule.pools:
        parts.append(Part(range(schedule.pools[0], schedule.depth), True))
    return parts


@dataclass(frozen=True)
class _Seen:
    """A batch, what enters a part, and what should leave it; scores for outputs alone."""

    images: Tensor
    group: GroupPass
    scores: Tensor | None


class Student:
    """A model that learns its parts in turn.

    Args:
        original: converted to a schedule whose layers all attend.
        model: the conversion; it is changed. Both in eval mode.
        parts: what learns.
        images: `(B, channels, height, width)`.
        how: settings.
        seed: of order and changes of the images.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        parts: Sequence[Part],
        images: Tensor,
        how: Distillation,
        seed: int,
    ) -> None:
        self.original, self.model, self.parts = original, model, list(parts)
        self.images, self.how, self.seed = images, how, seed
        self.lockstep = Lockstep(original, model)
        self.stack = self.lockstep.converted
        self.distance = distance_of(original)
        self.part = self.step = 0
        self._begin()

    @property
    def left(self) -> int:
        """Steps."""
        return (len(self.parts) - self.part) * self.how.steps - self.step

    def _begin(self) -> None:
        """Makes ready for the first step of a part."""
        if not self.left:
            return
        part = self.parts[self.part]
        self.tuned = _tuned([self.stack.block(layer) for layer in part.layers], self.how.tune)
        lr = self.how.lr / 10 if part.outputs else self.how.lr
        self.optimizer = torch.optim.AdamW(self.tuned, lr=lr, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=self.how.steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def round(self) -> Iterator[None]:
        """Some steps of a part, whose images depend on the number of the first of them alone."""
        seed = (self.seed * 1_000 + self.part) * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        left = self.how.steps - self.step
        passes = [self._pass(generator) for _ in range(min(BATCHES, left))]
        turns = [torch.randperm(len(passes), generator=generator) for _ in range(TIMES)]
        for number in torch.cat(turns)[:left].tolist():
            self._update(passes[number])
            yield

    @property
    def finished(self) -> bool:
        """Whether the part that learns has had all its steps."""
        return self.step == self.how.steps

    def next(self) -> None:
        """Goes on to the next part."""
        self.part, self.step = self.part + 1, 0
        self._begin()

    def _pass(self, generator: torch.Generator) -> _Seen:
        part = self.parts[self.part]
        chosen = torch.randint(len(self.images), (self.how.batch,), generator=generator)
        images = augmented(self.images[chosen].to(self._device), generator)
        with self._autocast(), torch.no_grad():
            group = self.lockstep.group(images, part.layers)
            scores = logits_of(self.original(images)).float() if part.outputs else None
        return _Seen(images, group, scores)

    def _update(self, seen: _Seen) -> None:
        with self._autocast():
            loss = self._loss(seen)
        if not loss.isfinite():
            part = self.parts[self.part]
            raise FloatingPointError(f"loss: is {loss.item()} in step {self.step + 1} of {part}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tuned, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def _loss(self, seen: _Seen) -> Tensor:
        prefix = self.stack.prefix
        tokens = seen.group.outputs(self.stack, self.parts[self.part].layers)
        pairs = list(zip(tokens, seen.group.goals, strict=True))
        if seen.scores is None:
            return torch.stack([token_error(x, goal, prefix) for x, goal in pairs]).mean()
        with entered(self.stack, len(self.stack), tokens[-1]):
            loss = self.distance(logits_of(self.model(seen.images)).float(), seen.scores)
        if not prefix:
            return loss
        errors = [token_error(x[:, :prefix], goal[:, :prefix], prefix) for x, goal in pairs]
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
            "optimizer": self.optimizer.state_dict() if self.left else None,
            "scheduler": self.scheduler.state_dict() if self.left else None,
            "part": self.part,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave."""
        self.part, self.step = state["part"], state["step"]
        self._begin()
        self.model.load_state_dict(state["model"])
        if self.left:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])


def token_error(found: Tensor, wanted: Tensor, prefix: int) -> Tensor:
    """Weighted sum of squared differences of tokens, relative to that of the wanted ones.

    Args:
        found, wanted: `(B, M, C)`.
        prefix: number of tokens that count ``PREFIX_WEIGHT`` times.
    """
    weights = torch.ones(wanted.shape[1], 1, device=wanted.device)
    weights[:prefix] = PREFIX_WEIGHT
    wanted = wanted.float()
    squares = (found.float() - wanted).square() * weights
    return squares.sum() / (wanted.square() * weights).sum()


def _tuned(blocks: list[Block], which: str) -> list[nn.Parameter]:
    """Parameters to learn: those of norms and biases have one dimension."""
    used = [p for block in blocks for p in block.parameters() if p.requires_grad]
    return used if which == "all" else [p for p in used if p.dim() == 1]
