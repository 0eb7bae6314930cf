"""``plan``: the schedule that loses least within a budget, corrected, for a trained model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from .. import adapters
from ..calibrate import Report, calibrate, fewest_images
from ..console import progress as console_progress
from ..outputs import has_classes
from ..pooling import Kind
from ..schedule import ATTEND, POOL, SHARE, Schedule
from .budget import Budget
from .costs import Conversion, LayerCosts, flops, latency
from .front import Losses, Scored, front, unbeaten
from .merged_costs import MergedFLOPs, merged_latency
from .merging import LEVELS, MIDDLE, PROTECT, MergeSearch, Merging, combined
from .plan import Plan
from .score import HOLD_OUT, Held, Score, split

Progress = Callable[[str, float], AbstractContextManager[Any]]

#: Images that single changes are fitted on, if a fit needs no more: enough to tell them apart.
FEW = 64
#: Schedules that are run, after what is predicted of them.
TRIES = 4
#: Images that a search for how to merge runs, at most.
SEARCHED = 160


def plan(
    model: nn.Module,
    images: Tensor,
    budget: str,
    *,
    pool: Kind = "conv",
    dims: Literal[1, 2] = 2,
    size_bias: bool = True,
    merge: bool = True,
    pools: int = 1,
    longest: int = 3,
    latency_batch: int = 1,
    progress: Progress = console_progress,
) -> Plan:
    """The conversion of a trained model that loses least within a budget. No labels, no gradients.

    Each single change (a group of layers with one map, a pool before a layer) is made and corrected
    on a few images, and scored by the relative squared error of its class scores on images held out
    of all fits. Sums of these predict what a schedule loses, sums over its layers what it costs;
    dynamic programming finds the front of both. How merging tokens is best spread over the layers
    is searched with the same score, while every layer attends; schedules that cost more than the
    budget merge as much as brings them to it. Of all these the best few are made, corrected on all
    images but those held out, and scored. The one that did best is the plan, corrected once more
    on all images.

    Args:
        model: from timm, transformers or torchvision, with a classifier.
        images: `(B, channels, height, width)`, normalised as the model expects; a quarter is held
            out.
        budget: "flops<=0.7", "latency<=0.7" (parts of the original's), "top1_agreement>=0.98" (on
            the images held out: then the cheapest found in FLOPs that meets it).
        pool, dims, size_bias: as for ``psvit.accelerate``.
        merge: whether tokens may be merged; not in a model that needs all of them.
        pools: at most so many; none in a model whose tokens can't be pooled.
        longest: of a group: one layer attends, the others share.
        latency_batch: images in a batch whose latency is measured.
        progress: makes progress bars.

    Returns:
        The plan; ``found`` has predicted and measured numbers.

    Raises:
        ValueError: a budget that is none, or that no schedule meets (the nearest is named); too few
            images; what ``psvit.calibrate`` refuses.
    """
    wanted = Budget.parse(budget)
    how = Conversion(pool, dims, size_bias)
    encoder = adapters.find(model)
    depth, pools = len(encoder.layers), 0 if encoder.whole else pools
    if not has_classes(model):
        raise ValueError(f"model: got a {type(model).__name__} without classes, expected some")
    planner = Planner(model, images, how, progress)
    losses = planner.losses(depth, pools=pools, longest=longest)
    merge = merge and encoder.whole is None
    few = images[:latency_batch].to(next(model.parameters()).device)
    costs, merged_cost = _costs(model, how, wanted, few, pools, merge, progress)
    schedules = front(depth, losses, costs, pools=pools)
    found, merging = list(schedules), None
    if merge:
        agree = wanted.measure == "top1_agreement"
        merging = planner.merging(merged_cost, MIDDLE if agree else wanted.bound)
        for bound in LEVELS if agree else (wanted.bound,):
            found += combined(schedules, merging, merged_cost, bound, TRIES)
    if wanted.measure == "top1_agreement":
        chosen = planner.cheapest(unbeaten(found)[::-1], wanted)
    else:
        chosen = planner.best(within(found, wanted))
    return planner.plan(planner.refitted(chosen), wanted, losses, costs, found, merging)


def _costs(
    model: nn.Module,
    how: Conversion,
    budget: Budget,
    images: Tensor,
    pools: int,
    merge: bool,
    progress: Progress,
) -> tuple[LayerCosts, MergedFLOPs]:
    """What layers cost, and models that merge: FLOPs, or latencies measured on the images."""
    merged, encoder = MergedFLOPs(model, how), adapters.find(model)
    if budget.measure != "latency":
        return flops(model, how, merged.depth, pools=pools), merged
    with progress("measuring latencies", 1) as step:
        layers = latency(model, how, merged.depth, images, pools=pools, step=step)
    if merge:
        # Protection takes time, however strong it is.
        protected = replace(how, protect=PROTECT[0] if encoder.has_class_token else 0.0)
        with progress("measuring merging", 1) as step:
            merged = merged_latency(model, protected, layers, images, step=step)
    return layers, merged


def within(found: list[Scored], budget: Budget) -> list[Scored]:
    """Of some schedules the few that lose least and cost no more than the budget.

    Raises:
        ValueError: none does; the nearest is named.
    """
    fitting = [scored for scored in found if scored.cost <= budget.bound]
    if not fitting:
        nearest = min(found, key=lambda scored: scored.cost)
        raise ValueError(
            f"budget: got {budget}, but the cheapest schedule found, {nearest}, has "
            f"{nearest.cost:.3f} of the original's {budget.measure}"
        )
    return sorted(fitting, key=lambda scored: scored.loss)[:TRIES]


@dataclass(frozen=True)
class Tried:
    """A schedule that was made: what was predicted of it, the model, its score, and why layers
    (from 0) that it changes weren't corrected."""

    predicted: Scored
    model: nn.Module
    score: Score
    left_alone: dict[int, str]


class Planner:
    """Makes and scores conversions of a model on images, some of them held out of all fits."""

    def __init__(
        self, model: nn.Module, images: Tensor, how: Conversion, progress: Progress
    ) -> None:
        self.model, self.how, self.progress = model, how, progress
        self.every = images
        self.images, held_out = split(images)
        self.held = Held(model, held_out)
        self.tried: list[dict[str, Any]] = []  # rows, no models: a person may try many

    def losses(self, depth: int, *, pools: int, longest: int) -> Losses:
        """Error of the scores for each single change.

        Raises:
            ValueError: too few images for a fit after so many pools.
        """
        few = self._few(depth, pools)
        groups = [(a, k) for k in range(2, longest + 1) for a in range(depth - k + 1)]
        places = list(range(1, depth)) if pools else []
        with self.progress("single changes", len(groups) + len(places)) as step:
            shared = {group: self._single(_group(depth, *group), few, step) for group in groups}
            pooled = {place: self._single(_pooled(depth, place), few, step) for place in places}
        return Losses(shared, pooled)

    def _few(self, depth: int, pools: int) -> Tensor:
        """Images for single changes: as many as a fit needs where the fewest tokens are left."""
        last = (ATTEND + SHARE)[: depth - pools]
        schedule = Schedule((ATTEND + POOL) * pools + last + ATTEND * (depth - pools - len(last)))
        fewest = fewest_images(self.model, schedule, self.images[:1], **asdict(self.how))
        if len(self.images) < fewest:
            least = fewest + (fewest - 1) // (HOLD_OUT - 1)
            raise ValueError(
                f"images: got {len(self.images) + len(self.held.images)}, expected at least "
                f"{least}, so that those not held out are enough for a fit after {pools} pools"
            )
        return self.images[: max(FEW, fewest)]

    def _single(self, schedule: Schedule, images: Tensor, step: Callable[[float], object]) -> float:
        converted, _ = self._made(Scored(0.0, 0.0, schedule), images)
        step(1)
        return self.held.score(converted).error

    def merging(self, cost: MergedFLOPs, bound: float) -> Merging:
        """How tokens are merged best, where that leaves so much of the cost; from now on they are
        protected as it says."""
        search = MergeSearch(self.model, self.how, Held(self.model, self.images[:SEARCHED]), cost)
        with self.progress("merging", search.trials) as step:
            merging = search.run(bound, step)
        self.how = replace(self.how, protect=merging.protect)
        return merging

    def best(self, candidates: list[Scored]) -> Tried:
        """Of some candidates that which loses least when it is made."""
        with self.progress("best schedules", len(candidates)) as step:
            tried = (self._tried(candidate, step) for candidate in candidates)
            return min(tried, key=lambda one: one.score.error)

    def cheapest(self, found: list[Scored], budget: Budget) -> Tried:
        """The cheapest of a front whose agreement meets the budget, by bisection."""
        low, high = 0, len(found) - 1  # the dearest, the original itself, agrees
        best = None
        with self.progress("best schedules", len(found).bit_length()) as step:
            while low <= high:
                middle = (low + high + 1) // 2
                tried = self._tried(found[middle], step)
                if tried.score.agreement >= budget.bound:
                    best, low = tried, middle + 1
                else:
                    high = middle - 1
        return best or self._tried(found[0], lambda part: None)

    def refitted(self, tried: Tried) -> Tried:
        """The same schedule, corrected on all images; its score stays what it was before."""
        with self.progress("fitting to all images", 1) as step:
            converted, _ = self._made(tried.predicted, self.every)
            step(1)
        return replace(tried, model=converted)

    def _tried(self, candidate: Scored, step: Callable[[float], object]) -> Tried:
        converted, report = self._made(candidate, self.images)
        step(1)
        score = self.held.score(converted)
        self.tried.append({**_row(candidate), **asdict(score)})
        return Tried(candidate, converted, score, report.left_alone)

    def _made(self, candidate: Scored, images: Tensor) -> tuple[nn.Module, Report]:
        how = {**asdict(self.how), "merge": candidate.merge or 0, "progress": _silent}
        converted, report = calibrate(self.model, candidate.schedule, images, **how)
        return converted.eval(), report

    def plan(
        self,
        chosen: Tried,
        budget: Budget,
        losses: Losses,
        costs: LayerCosts,
        predicted: list[Scored],
        merging: Merging | None,
    ) -> Plan:
        """What was chosen, with all that was found out."""
        found = {
            "budget": str(budget),
            "cost": chosen.predicted.cost,
            "predicted_error": chosen.predicted.loss,
            "measured": asdict(chosen.score),
            "left_alone": [[layer, why] for layer, why in chosen.left_alone.items()],
            "held_out_images": len(self.held.images),
            "images": len(self.images),
            "tried": self.tried,
            "front": [_row(scored) for scored in unbeaten(predicted)[::-1]],
            "groups": [[a, k, error] for (a, k), error in losses.groups.items()],
            "pools": [[place, error] for place, error in losses.pools.items()],
            "costs": asdict(costs),
            "merging": merging and asdict(merging),
        }
        return self.planned(chosen, found)

    def planned(self, tried: Tried, found: dict[str, Any]) -> Plan:
        """A schedule that was made, as a plan."""
        how = {**asdict(self.how), "merge": tried.predicted.merge or 0}
        schedule = tried.predicted.schedule
        return Plan.of(self.model, tried.model, schedule=schedule, found=found, **how)


def _row(predicted: Scored) -> dict[str, Any]:
    return {
        "schedule": predicted.schedule.text,
        "merge": list(predicted.merge or (0,) * predicted.schedule.depth),
        "cost": predicted.cost,
        "predicted_error": predicted.loss,
    }


def _group(depth: int, first: int, length: int) -> Schedule:
    shared = range(first + 1, first + length)
    return Schedule("".join(SHARE if layer in shared else ATTEND for layer in range(depth)))


def _pooled(depth: int, place: int) -> Schedule:
    return Schedule(ATTEND * place + POOL + ATTEND * (depth - place))


def _silent(title: str, total: float) -> AbstractContextManager[Any]:
    """A progress bar that isn't shown: the one around it is."""
    return nullcontext(lambda part=1.0: None)
