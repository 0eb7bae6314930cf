"""``distill``: a converted model learns from its original, part by part. No labels."""

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
from ..outputs import kl_divergences
from ..planning.plan import Plan
from ..planning.score import Held, Score, split
from ..schedule import ATTEND
from .student import Distillation, Student, parts_of

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

    In turn, each group of layers that share a map learns to give the original's tokens, from what
    the layers before it give; then, if tokens are pooled, all layers after the first pool learn to
    give its outputs. The images are cut, mirrored and mixed.

    Twice: first a model that is corrected anew on three quarters of the images, those that
    ``psvit.plan`` fits to, learns from them. A part that doesn't lower KL(original || converted) on
    the last quarter, by more than the standard error of the difference, is put back there. Then the
    plan's own weights, which have seen all images, learn from all of them the parts that were a
    gain.

    With 300 images it was no gain: three plans of a ViT-Tiny lost 0.4 to 1.9 points of accuracy on
    900 others, while KL fell on the 75 held out (any fall counted as a gain then). With more
    images: not measured.

    Args:
        model: the original, on the device to work on.
        plan: for it.
        images: `(B, channels, height, width)`, normalised as the model expects.
        how: None: the defaults of ``Distillation``.
        output: folder for ``last.pt``, written every few steps.
        resume: go on from there: it ends with the same weights, on a CPU bit for bit.
        progress: makes progress bars.

    Returns:
        The plan; of its ``found``, "measured" and the history are those of the first time.

    Raises:
        ValueError: a plan for another model, too few images; with ``resume`` no state to go on
            from, or one that was made otherwise; without it an ``output`` that has a checkpoint.
        FloatingPointError: the loss became infinite or no number.

    Source: block reconstruction, as in BRECQ (arXiv 2102.05426).
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
    """A rehearsal, which tells what parts gain, and the learning itself."""

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
        self.parts = parts_of(plan.schedule)
        #: What learns from all images: parts are struck off as they are found to be no gain.
        self.gains = list(self.parts)
        teacher = copy.deepcopy(model).requires_grad_(False)
        self.original = accelerate(teacher, ATTEND * plan.schedule.depth, inplace=True).eval()
        start = self._corrected(few, progress)
        self.held = Held(model, held_out)
        #: The weights that are kept, and their scores on the images held out.
        self.best, self.scores = copy.deepcopy(start.state_dict()), self.held.scores(start)
        score = Score.of(self.scores, self.held.reference)
        self.history: list[dict[str, Any]] = [{"part": "start", "kept": True, **asdict(score)}]
        self.rehearsal = True
        self.student = Student(self.original, start, self.parts, few, how, 2 * how.seed)

    def _corrected(self, images: Tensor, progress: Progress) -> nn.Module:
        source = self.source
        converted, _ = calibrate(
            self.model,
            source.schedule,
            images,
            pool=source.pool,
            dims=source.dims,
            size_bias=source.size_bias,
            progress=progress,
        )
        return converted.eval()

    @property
    def left(self) -> int:
        """Steps, if every part that isn't judged yet is a gain."""
        again = self.how.steps * len(self.gains) if self.rehearsal else 0
        return self.student.left + again

    def round(self) -> Iterator[None]:
        """Some steps, and what follows from them."""
        yield from self.student.round()
        if self.student.finished:
            if self.rehearsal:
                self._judge()
            self.student.next()
        if self.rehearsal and not self.student.left:
            self._perform()

    def _judge(self) -> None:
        """Looks at the images held out; what is no gain is undone."""
        part, model = self.parts[self.student.part], self.student.model
        scores = self.held.scores(model)
        score = Score.of(scores, self.held.reference)
        kept = is_gain(self.scores, scores, self.held.reference)
        if kept:
            self.best, self.scores = copy.deepcopy(model.state_dict()), scores
        else:
            model.load_state_dict(self.best)
            self.gains.remove(part)
        row = {"part": str(part), "kept": kept}
        self.history.append({**row, **asdict(score)})

    def _perform(self) -> None:
        self.rehearsal = False
        seed = 2 * self.how.seed + 1
        self.student = Student(self.original, self.result, self.gains, self.images, self.how, seed)

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.how), "schedule": self.source.schedule.text}

    def state(self) -> dict[str, Any]:
        """All of it, for ``checkpoint.save``."""
        return {
            "settings": self._settings(),
            "rehearsal": self.rehearsal,
            "gains": [self.parts.index(part) for part in self.gains],
            "best": self.best,
            "scores": self.scores,
            "history": self.history,
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
        self.gains = [self.parts[i] for i in state["gains"]]
        self.best, self.scores = state["best"], state["scores"]
        self.history = state["history"]
        if not state["rehearsal"]:
            self._perform()
        self.student.restore(state["student"])

    def plan(self, seconds: float) -> Plan:
        """The plan with the weights that have learnt."""
        measured = asdict(Score.of(self.scores, self.held.reference))
        about = {**asdict(self.how), "history": self.history, "seconds": round(seconds, 1)}
        found = {**self.source.found, "measured": measured, "distillation": about}
        return self.source.with_weights(self.model, self.result, found)


def is_gain(before: Tensor, after: Tensor, reference: Tensor) -> bool:
    """Whether KL falls by more than the standard error of its mean fall, image by image.

    Args:
        before, after, reference: class scores `(B, classes)`; one image alone can't tell.
    """
    fall = kl_divergences(before, reference) - kl_divergences(after, reference)
    return len(fall) > 1 and bool(fall.mean() > fall.std() / len(fall) ** 0.5)
