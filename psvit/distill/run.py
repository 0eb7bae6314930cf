"""``distill``: a converted model learns from its original. No labels."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..accelerate import accelerate
from ..calibrate import calibrate
from ..console import progress as console_progress
from ..outputs import relative_errors
from ..planning.plan import Plan
from ..planning.score import Held, Score, split
from ..schedule import ATTEND
from .student import Distillation, Student

Progress = Callable[[str, float], AbstractContextManager[Any]]


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

    From the first layer that the schedule changes on, all layers learn to give the original's
    outputs and, layer by layer, its prefix tokens. The images are cut, mirrored, and changed in
    contrast and colour.

    Twice: first a model that is corrected anew on three quarters of the images, those that
    ``psvit.plan`` fits to, learns from them. If that lowers the error of the scores on the last
    quarter, by more than its standard error, then the plan's own weights, which have seen all
    images, learn from all of them; else they stay.

    Args:
        model: the original, on the device to work on.
        plan: for it.
        images: `(B, channels, height, width)`, normalised as the model expects.
        how: None: the defaults of ``Distillation``.
        output: folder for ``last.pt``, written every few steps.
        resume: go on from there: it ends with the same weights, on a CPU bit for bit.
        progress: makes progress bars.

    Returns:
        The plan; of its ``found``, "measured" and "distillation" are of the first time.

    Raises:
        ValueError: a plan for another model, too few images; with ``resume`` no state to go on
            from, or one that was made otherwise; without it an ``output`` that has a checkpoint.
        FloatingPointError: the loss became infinite or no number.

    Source: distillation of outputs (arXiv 1503.02531), here by squared error.
    """
    if resume and output is None:
        raise ValueError("output: got None, expected the folder to go on from")
    state = output and checkpoint.stopped(output, "distillation", resume=resume)
    start = time.perf_counter()
    course = Course(model, plan, images, how or Distillation(), progress)
    if state:
        course.restore(state)
    with progress("distilling", max(1, course.left)) as step:
        while course.left:
            before = course.left
            for _ in course.round():
                step(1)
                before -= 1
            step(before - course.left)  # what was found to be no gain isn't learnt again
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                checkpoint.save(output, "distillation", course.state())
    return course.plan(time.perf_counter() - start)


class Course:
    """A rehearsal, which tells whether learning is a gain, and the learning itself."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        images: Tensor,
        how: Distillation,
        progress: Progress,
    ) -> None:
        self.model, self.source, self.images, self.how = model, plan, images, how
        self.result = plan.apply(model).eval()
        few, held_out = split(images)
        teacher = copy.deepcopy(model).requires_grad_(False)
        self.original = accelerate(teacher, ATTEND * plan.schedule.depth, inplace=True).eval()
        start = self._corrected(few, progress)
        self.held = Held(model, held_out)
        #: Class scores on the images held out, before the rehearsal and after it.
        self.scores = [self.held.scores(start)]
        self.student = Student(self.original, start, few, how, 2 * how.seed)
        #: Steps that follow a rehearsal, if it is a gain.
        self.after_it = self.student.left

    def _corrected(self, images: Tensor, progress: Progress) -> nn.Module:
        source = self.source
        converted, _ = calibrate(
            self.model,
            source.schedule,
            images,
            pool=source.pool,
            dims=source.dims,
            size_bias=source.size_bias,
            merge=source.merge,
            protect=source.protect,
            progress=progress,
        )
        return converted.eval()

    @property
    def left(self) -> int:
        """Steps, if the rehearsal is a gain."""
        return self.student.left + self.after_it

    def round(self) -> Iterator[None]:
        """Some steps, and what follows from them."""
        yield from self.student.round()
        if self.after_it and not self.student.left:
            self.scores.append(self.held.scores(self.student.model))
            self.after_it = 0
            if self._gained:
                self._perform()

    @property
    def _gained(self) -> bool:
        return is_gain(self.scores[0], self.scores[-1], self.held.reference)

    def _perform(self) -> None:
        seed = 2 * self.how.seed + 1
        self.student = Student(self.original, self.result, self.images, self.how, seed)

    def _settings(self) -> dict[str, Any]:
        made = {"schedule": self.source.schedule.text, "merge": list(self.source.merge)}
        return {**asdict(self.how), **made}

    def state(self) -> dict[str, Any]:
        """All of it, for ``checkpoint.save``."""
        return {
            "settings": self._settings(),
            "scores": self.scores,
            "student": self.student.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What ``state`` gave.

        Raises:
            ValueError: of a distillation with other settings (listed).
        """
        other = checkpoint.differences(state["settings"], self._settings())
        if other:
            raise ValueError(f"resume: the run was made otherwise: {'; '.join(other)}")
        self.scores = state["scores"]
        if len(self.scores) > 1:
            self.after_it = 0
            if self._gained:
                self._perform()
        self.student.restore(state["student"])

    def plan(self, seconds: float) -> Plan:
        """The plan with the weights that have learnt."""
        scores = [asdict(Score.of(each, self.held.reference)) for each in self.scores]
        about = {
            **asdict(self.how),
            "before": scores[0],
            "rehearsed": scores[-1],
            "gained": self._gained,
            "seconds": round(seconds, 1),
        }
        measured = scores[-1 if self._gained else 0]
        found = {**self.source.found, "measured": measured, "distillation": about}
        return self.source.with_weights(self.model, self.result, found)


def is_gain(before: Tensor, after: Tensor, reference: Tensor) -> bool:
    """Whether the error of scores falls by more than the standard error of its mean fall.

    Args:
        before, after, reference: class scores `(B, classes)`; one image alone can't tell.
    """
    fall = relative_errors(before, reference) - relative_errors(after, reference)
    return len(fall) > 1 and bool(fall.mean() > fall.std() / len(fall) ** 0.5)
