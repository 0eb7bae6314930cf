"""``distill``: some hundred steps in which a converted model learns from its original."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..accelerate import accelerate
from ..console import progress as console_progress
from ..numbers import check_number
from ..planning.plan import Plan
from ..planning.score import Held, split
from ..schedule import ATTEND
from .augment import augmented
from .loss import Distance

Progress = Callable[[str, float], AbstractContextManager[Any]]

#: Looks at the images held out in a run, and how many in a row may be worse than the best one.
LOOKS, PATIENCE = 20, 6


@dataclass(frozen=True)
class Distillation:
    """How a converted model learns.

    Args:
        steps: of AdamW, at most; fewer where it stops getting better.
        batch: images of a step.
        lr: highest learning rate; a tenth of the steps is warm-up, then it falls as a cosine.
        tune: "all" parameters in use, or only "norms" and biases.
        seed: of order and changes of the images.
    """

    steps: int = 500
    batch: int = 16
    lr: float = 2e-4
    tune: Literal["all", "norms"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, least=1)
        check_number("batch", self.batch, least=1)
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected more than 0")
        if self.tune not in ("all", "norms"):
            raise ValueError(f'tune: got "{self.tune}", expected "all" or "norms"')


def distill(
    model: nn.Module,
    plan: Plan,
    images: Tensor,
    how: Distillation | None = None,
    *,
    output: Path | None = None,
    resume: bool = False,
    progress: Progress = console_progress,
) -> Plan:
    """A plan whose weights have learnt from the original model. No labels.

    The loss is KL(original || converted) of the classes plus the mean over layers of the tokens'
    relative squared difference, on cut, mirrored and mixed images. A quarter of the images, the
    same that ``psvit.plan`` holds out, is only looked at: the weights with the lowest KL there are
    the result, those of the start among them.

    Args:
        model: the original, on the device to work on.
        plan: for it.
        images: `(B, channels, height, width)`, normalised as the model expects.
        how: None: the defaults of ``Distillation``.
        output: folder for ``last.pt``, written at each look at the images held out.
        resume: go on from there: it ends with the same weights, on a CPU bit for bit.
        progress: makes progress bars.

    Raises:
        ValueError: a plan for another model, too few images; with ``resume`` no state to go on
            from, or one that was made otherwise; without it an ``output`` that has a checkpoint.
        FloatingPointError: the loss became infinite or no number.
    """
    if resume and output is None:
        raise ValueError("output: got None, expected the folder to go on from")
    state = output and checkpoint.stopped(output, "distillation", resume=resume)
    student = Student(model, plan, images, how or Distillation())
    if state:
        student.restore(state)
    start = time.perf_counter()
    with progress("distilling", student.how.steps - student.step) as step:
        while not student.finished:
            student.update()
            step(1)
            if student.step % student.every == 0 or student.step == student.how.steps:
                student.look()
                if output is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    checkpoint.save(output, "distillation", student.state())
    return student.plan(time.perf_counter() - start)


class Student:
    """A converted model while it learns."""

    def __init__(self, model: nn.Module, plan: Plan, images: Tensor, how: Distillation) -> None:
        self.how, self.source, self.original = how, plan, model
        fitted, held_out = split(images)
        self.images = fitted
        self.model = plan.apply(model).train()
        teacher = copy.deepcopy(model).requires_grad_(False)
        depth = len(plan.schedule.kinds)
        self.distance = Distance(
            accelerate(teacher, ATTEND * depth, inplace=True).eval(), self.model
        )
        self.held = Held(model, held_out)
        tuned = _tuned(self.model, how.tune)
        self.optimizer = torch.optim.AdamW(tuned, lr=how.lr, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, how.lr, total_steps=how.steps + 1, pct_start=0.1, cycle_momentum=False
        )
        self.tuned = tuned
        self.every = max(1, how.steps // LOOKS)
        self.step = self.bad = 0
        self.history: list[dict[str, float]] = []
        self.look()

    @property
    def finished(self) -> bool:
        """All steps are made, or the last looks brought nothing."""
        return self.step >= self.how.steps or self.bad >= PATIENCE

    def update(self) -> None:
        """One step, whose images depend on its number alone."""
        generator = torch.Generator().manual_seed(self.how.seed * 1_000_003 + self.step)
        chosen = torch.randperm(len(self.images), generator=generator)[: self.how.batch]
        images = augmented(self.images[chosen].to(self._device), generator)
        with self._autocast():
            kl, tokens = self.distance(images)
        loss = kl + tokens
        if not loss.isfinite():
            raise FloatingPointError(f"loss: is {loss.item()} in step {self.step + 1}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tuned, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def look(self) -> None:
        """Scores the model on the images held out, and keeps it if it is the best so far."""
        score = self.held.score(self.model)
        if not self.history or score.kl < min(row["kl"] for row in self.history):
            self.best = copy.deepcopy(self.model.state_dict())
            self.bad = 0
        else:
            self.bad += 1
        self.history.append({"step": self.step, **asdict(score)})

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _autocast(self) -> AbstractContextManager[Any]:
        cuda = self._device.type == "cuda"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=cuda)

    def state(self) -> dict[str, Any]:
        """All of it, for ``checkpoint.save``."""
        return {
            "distillation": {**asdict(self.how), "schedule": self.source.schedule.text},
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "step": self.step,
            "bad": self.bad,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave.

        Raises:
            ValueError: of a distillation with other settings (listed).
        """
        if other := checkpoint.differences(state["distillation"], self.state()["distillation"]):
            raise ValueError(f"resume: the run was made otherwise: {'; '.join(other)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.best, self.history = state["best"], state["history"]
        self.step, self.bad = state["step"], state["bad"]

    def plan(self, seconds: float) -> Plan:
        """The plan with the best weights."""
        self.model.load_state_dict(self.best)
        best = min(self.history, key=lambda row: row["kl"])
        measured = {name: best[name] for name in ("agreement", "kl")}
        about = {**asdict(self.how), "history": self.history, "seconds": round(seconds, 1)}
        found = {**self.source.found, "measured": measured, "distillation": about}
        return self.source.with_weights(self.original, self.model, found)


def _tuned(model: nn.Module, which: str) -> list[nn.Parameter]:
    """Parameters to learn: those of norms and biases have one dimension."""
    used = [p for p in model.parameters() if p.requires_grad]
    return used if which == "all" else [p for p in used if p.dim() == 1]
