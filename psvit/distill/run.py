"""``distill``: a converted model learns from its original, part by part. No labels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..accelerate import accelerate
from ..block import Block
from ..calibrate.lockstep import GroupPass, Lockstep
from ..calibrate.run import PREFIX_WEIGHT
from ..console import progress as console_progress
from ..numbers import check_number
from ..planning.plan import Plan
from ..planning.score import Held, split
from ..schedule import ATTEND
from .augment import augmented

Progress = Callable[[str, float], AbstractContextManager[Any]]

#: Batches of images that are run up to a part at a time, and how often each is learnt from then.
BATCHES, TIMES = 8, 4


@dataclass(frozen=True)
class Distillation:
    """How a converted model learns.

    Args:
        steps: of AdamW, for each part: a layer that attends, with those that share its map.
        batch: images of a step.
        lr: highest learning rate of each part; a tenth of its steps is warm-up, then it falls as a
            cosine.
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

    From the first layer that the schedule changes on, each part in turn (a layer that attends with
    those that share its map) learns to give the original's tokens, put through the same pools,
    from what the parts before it give. The images are cut, mirrored and mixed. How many
    images it takes to gain much isn't known: with 225, a ViT-Tiny of which four layers share gained
    with one schedule, and nothing with another, whose correction had left less to learn.

    A quarter of the images, the same that ``psvit.plan`` holds out, is only looked at: a part that
    doesn't lower KL(original || converted) there is put back as it was. (A plan that was fitted to
    these images too, as by ``psvit.calibrate``, looks better at the start than it is.)

    Args:
        model: the original, on the device to work on.
        plan: for it.
        images: `(B, channels, height, width)`, normalised as the model expects.
        how: None: the defaults of ``Distillation``.
        output: folder for ``last.pt``, written every few steps.
        resume: go on from there: it ends with the same weights, on a CPU bit for bit.
        progress: makes progress bars.

    Raises:
        ValueError: a plan for another model, too few images; with ``resume`` no state to go on
            from, or one that was made otherwise; without it an ``output`` that has a checkpoint.
        FloatingPointError: the loss became infinite or no number.

    Source: block reconstruction, as in BRECQ (arXiv 2102.05426).
    """
    if resume and output is None:
        raise ValueError("output: got None, expected the folder to go on from")
    state = output and checkpoint.stopped(output, "distillation", resume=resume)
    student = Student(model, plan, images, how or Distillation())
    if state:
        student.restore(state)
    start = time.perf_counter()
    with progress("distilling", student.left) as step:
        while student.left:
            for _ in student.round():
                step(1)
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                checkpoint.save(output, "distillation", student.state())
    return student.plan(time.perf_counter() - start)


class Student:
    """A converted model while it learns."""

    def __init__(self, model: nn.Module, plan: Plan, images: Tensor, how: Distillation) -> None:
        self.how, self.source, self.original = how, plan, model
        self.images, held_out = split(images)
        self.model = plan.apply(model).eval()
        teacher = copy.deepcopy(model).requires_grad_(False)
        attends = ATTEND * plan.schedule.depth
        self.lockstep = Lockstep(accelerate(teacher, attends, inplace=True).eval(), self.model)
        self.stack = self.lockstep.converted
        first = self.lockstep.first_changed
        self.parts = [group for group in plan.schedule.groups if group[0] >= first]
        self.held = Held(model, held_out)
        self.part = self.step = 0
        score = self.held.score(self.model)
        self.history: list[dict[str, Any]] = [{"layer": 0, "kept": True, **asdict(score)}]
        self._begin()

    @property
    def left(self) -> int:
        """Steps."""
        return (len(self.parts) - self.part) * self.how.steps - self.step

    def _begin(self) -> None:
        """Makes ready for the first step of a part."""
        self.best = copy.deepcopy(self.model.state_dict())
        if self.part == len(self.parts):
            return
        blocks = [self.stack.block(layer) for layer in self.parts[self.part]]
        self.tuned = _tuned(blocks, self.how.tune)
        self.optimizer = torch.optim.AdamW(self.tuned, lr=self.how.lr, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            self.how.lr,
            total_steps=self.how.steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )

    def round(self) -> Iterator[None]:
        """Some steps of a part, whose images depend on the number of the first of them alone."""
        seed = (self.how.seed * 1_000 + self.part) * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        left = self.how.steps - self.step
        passes = [self._pass(generator) for _ in range(min(BATCHES, left))]
        turns = [torch.randperm(len(passes), generator=generator) for _ in range(TIMES)]
        for number in torch.cat(turns)[:left].tolist():
            self._update(passes[number])
            yield
        if self.step == self.how.steps:
            self._look()
            self.part, self.step = self.part + 1, 0
            self._begin()

    def _pass(self, generator: torch.Generator) -> GroupPass:
        chosen = torch.randint(len(self.images), (self.how.batch,), generator=generator)
        images = augmented(self.images[chosen].to(self._device), generator)
        with self._autocast():
            return self.lockstep.group(images, self.parts[self.part])

    def _update(self, seen: GroupPass) -> None:
        part, prefix = self.parts[self.part], self.stack.prefix
        with self._autocast():
            outputs = seen.outputs(self.stack, part)
        pairs = zip(outputs, seen.goals, strict=True)
        loss = torch.stack([token_error(x, goal, prefix) for x, goal in pairs]).mean()
        if not loss.isfinite():
            layers = f"layers {part[0] + 1} to {part[-1] + 1}"
            raise FloatingPointError(f"loss: is {loss.item()} in step {self.step + 1} of {layers}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.tuned, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def _look(self) -> None:
        """Scores the model on the images held out; what is no gain is undone."""
        score = self.held.score(self.model)
        kept = score.kl < min(row["kl"] for row in self.history)
        if not kept:
            self.model.load_state_dict(self.best)
        layer = self.parts[self.part][-1] + 1
        self.history.append({"layer": layer, "kept": kept, **asdict(score)})

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _autocast(self) -> AbstractContextManager[Any]:
        cuda = self._device.type == "cuda"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=cuda)

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.how), "schedule": self.source.schedule.text}

    def state(self) -> dict[str, Any]:
        """All of it, for ``checkpoint.save``."""
        return {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "part": self.part,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave.

        Raises:
            ValueError: of a distillation with other settings (listed).
        """
        other = checkpoint.differences(state["settings"], self._settings())
        if other:
            raise ValueError(f"resume: the run was made otherwise: {'; '.join(other)}")
        self.part, self.step, self.history = state["part"], state["step"], state["history"]
        self._begin()
        self.model.load_state_dict(state["model"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def plan(self, seconds: float) -> Plan:
        """The plan with the best weights."""
        best = min(self.history, key=lambda row: row["kl"])
        measured = {name: best[name] for name in ("agreement", "kl")}
        about = {**asdict(self.how), "history": self.history, "seconds": round(seconds, 1)}
        found = {**self.source.found, "measured": measured, "distillation": about}
        return self.source.with_weights(self.original, self.model, found)


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
