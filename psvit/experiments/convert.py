"""What a trained ViT-Tiny keeps when its layers share maps and its tokens are pooled.

Fitted to ImageNet images without labels, reported on others: in closed form, and after a
distillation of some minutes.
"""

from __future__ import annotations

import copy
import csv
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..console import progress as console_progress
from ..distill import Distillation, distill
from ..images import Preprocess, batches, read_labels
from ..outputs import logits_of
from ..planning.budget import Budget
from ..planning.costs import Conversion, LayerCosts, flops
from ..planning.front import Losses, Scored, front
from ..planning.plan import Plan
from ..planning.run import TRIES, Planner, within
from ..schedule import ATTEND, POOL, Schedule
from ..timing import interleaved, waiting
from ..weights import fill, read_state
from .runs import Found, Progress, about, all_runs, check_folder, spread, write_json

NAME, DEPTH = "vit_tiny_patch16_224", 12
#: Of the sorted images: those that may be fitted to, and those that are reported on.
FIT, REPORT = slice(0, 400), slice(400, 1300)
#: Layers that may have one map, and pixels of a side.
LONGEST, SIDE = 3, 224
#: Number of sharing layers, and the layers (from 0) before which tokens are pooled.
SHARED, POOLED = (1, 3, 4, 6), (6, 7)
#: What ``psvit.plan`` is asked for, sharing and pooling both allowed.
BUDGETS = ("flops<=0.8", "flops<=0.6")
#: What "two cores" means: other experiments run two processes of one thread each.
THREADS = 2
#: Spent on each latency, and the images of a call.
SECONDS = 4.0
BATCHES = {"cpu": (8,), "cuda": (1, 32, 256)}
#: What needs no fit: keeping every second token hurts a trained model less than an average does.
NAIVE = Conversion("stride")
#: What learns after the closed form.
DISTILLED = ("4 share", "6 share", "pooled before 6")


@dataclass(frozen=True)
class Settings:
    """What ``run`` does.

    Args:
        data: folder with ``vit_tiny_patch16_224/model.safetensors`` and ``imagenet_val/`` with its
            ``labels.csv``.
        seeds: random subsets of the images that may be fitted to.
        images: in each subset.
        steps: of each distillation; 0: none.
        device: "cpu" or "cuda".
    """

    data: str
    seeds: int = 3
    images: int = 360
    steps: int = 60
    device: str = "cpu"

    def common(self) -> dict[str, Any]:
        """What the runs in one folder have in common; where the data lie is nobody's affair."""
        return about("convert", {**asdict(self), "data": Path(self.data).name})


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Fits, plans, distils and reports; each part is kept as soon as it is finished.

    Returns:
        What ``results.json`` holds: ``rows``, each with ``accuracy`` and ``points`` under the
        original (0 to 1; mean and deviation over the seeds).

    Raises:
        ValueError: as ``check``.
        OSError: the data can't be read, the folder can't be written.
    """
    started = time.perf_counter()
    check(settings, output)
    common = settings.common()
    arms = ["closed form", *(f"{name}, distilled" for name in DISTILLED if settings.steps)]
    learn = partial(_learn, settings, str(output))
    found = all_runs(learn, arms, settings.seeds, output, common, 1, progress, threads=THREADS)
    rows = _rows(found)
    seconds = round(time.perf_counter() - started, 1)
    results = {
        **common,
        "report_images": REPORT.stop - REPORT.start,
        "rows": rows,
        "runs": found,
        "seconds": seconds,
    }
    write_json(output / "results.json", results)
    return results


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for data that aren't there, settings that can't be, or a folder with runs
    that were made otherwise."""
    check_data(settings.data, settings.device)
    if not 64 <= settings.images <= FIT.stop:
        raise ValueError(f"images: got {settings.images}, expected 64 to {FIT.stop}")
    if settings.steps < 0:
        raise ValueError(f"steps: got {settings.steps}, expected 0 or more")
    check_folder(output, settings.common())


def check_data(data: str, device: str) -> None:
    """Raises ValueError for data that aren't there, or a GPU that isn't."""
    for file in (f"{NAME}/model.safetensors", "imagenet_val/labels.csv"):
        if not (Path(data) / file).is_file():
            raise ValueError(f"data: {data} has no {file}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but PyTorch finds no GPU here")


def _rows(found: Mapping[str, list[Found]]) -> list[dict[str, Any]]:
    """One a model, its numbers over the seeds."""
    per_seed = []
    for seed, first in enumerate(found["closed form"]):
        best = first["rows"]["original"]["accuracy"]
        rows = (item for arm in found.values() for item in arm[seed]["rows"].items())
        per_seed.append({name: {**row, "under": best - row["accuracy"]} for name, row in rows})
    models = [name for name in per_seed[0] if ", " not in name]
    names = sorted(per_seed[0], key=lambda name: models.index(name.partition(", ")[0]))
    return [_over_seeds(name, [rows[name] for rows in per_seed]) for name in names]


def _over_seeds(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "schedules": [row["schedule"] for row in rows]}
    for key in ("accuracy", "under", "agreement", "flops", "seconds"):
        if key in rows[0]:
            made[key] = spread(torch.tensor([row[key] for row in rows]))
    if "latency" in rows[0]:
        made["latency"] = {
            batch: spread(torch.tensor([row["latency"][batch] for row in rows]))
            for batch in rows[0]["latency"]
        }
    return made


# --- one subset -----------------------------------------------------------------------------


def _learn(settings: Settings, output: str, arm: str, seed: int) -> Found:
    model, images, report = loaded(settings.data, settings.device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = images[order[: settings.images]]
    plans = Path(output) / "plans"
    plans.mkdir(exist_ok=True)
    if arm == "closed form":
        return {"rows": _closed_form(model, chosen, report, plans, seed)}
    plan = Plan.load(plans / _file(arm.removesuffix(", distilled"), seed))
    how = Distillation(steps=settings.steps, seed=seed)
    tuned, seconds = _timed(lambda: distill(model, plan, chosen, how))
    tuned.save(plans / _file(arm, seed))
    row = {**report.row(tuned.schedule, tuned.apply(model)), "seconds": seconds}
    return {"rows": {arm: row}, "distillation": tuned.found["distillation"]}


def _closed_form(
    model: nn.Module, images: Tensor, report: Report, plans: Path, seed: int
) -> dict[str, dict[str, Any]]:
    how, costs = Conversion(), flops(model, Conversion(), DEPTH, pools=1)
    planner = Planner(model, images, how, console_progress)
    rows = {"original": report.row(Schedule(ATTEND * DEPTH), model)}
    losses, scoring = _timed(partial(planner.losses, DEPTH, pools=1, longest=LONGEST))
    for name, candidates in _candidates(losses, costs).items():
        best, choosing = _timed(partial(planner.best, candidates))
        tried, fitting = _timed(partial(planner.refitted, best))
        seconds = choosing + fitting
        plan = planner.planned(tried, {"measured": asdict(tried.score)})
        plan.save(plans / _file(name, seed))
        rows[name] = {
            **report.row(plan.schedule, tried.model),
            "latency": report.latency(tried.model),
            # A pool is put where somebody said; all else needs to know what single changes lose.
            "seconds": seconds if name.startswith("pooled") else scoring + seconds,
        }
        naive = NAIVE.apply(model, plan.schedule)
        rows[f"{name}, naive"] = report.row(plan.schedule, naive)
    return rows


def _candidates(losses: Losses, costs: LayerCosts) -> dict[str, list[Scored]]:
    """By the name of a row: the schedules of which the best is its model."""
    found = {f"{count} share": _sharing(losses, costs, count) for count in SHARED}
    for place in POOLED:
        schedule = Schedule(ATTEND * place + POOL + ATTEND * (DEPTH - place))
        found[f"pooled before {place}"] = [Scored(0.0, costs.of(schedule), schedule)]
    planned = front(DEPTH, losses, costs)
    return {**found, **{budget: within(planned, Budget.parse(budget)) for budget in BUDGETS}}


def _sharing(losses: Losses, costs: LayerCosts, count: int) -> list[Scored]:
    """The schedules with so many sharing layers that are predicted to lose least."""
    found = []
    for schedule in Schedule.enumerate(DEPTH, pools=0, shared=count):
        groups = [(group[0], len(group)) for group in schedule.groups if len(group) > 1]
        if all(group in losses.groups for group in groups):
            loss = sum(losses.groups[group] for group in groups)
            found.append(Scored(loss, costs.of(schedule), schedule))
    return sorted(found)[:TRIES]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _file(name: str, seed: int) -> str:
    return f"{re.sub('[^a-z0-9.]+', '-', name)}-{seed}.json"


class Report:
    """Accuracy and speed of a conversion beside its original, on images with labels."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.device = next(model.parameters()).device
        self.reference = self.classes(model)

    def row(self, schedule: Schedule, converted: nn.Module) -> dict[str, Any]:
        """Accuracy and agreement from 0 to 1; FLOPs as a part of the original's."""
        found = self.classes(converted)
        return {
            "schedule": schedule.text,
            "accuracy": self.accuracy(found),
            "agreement": float((found == self.reference).double().mean()),
            "flops": self.flops(schedule, pool=Conversion().pool),
        }

    def flops(self, schedule: Schedule, **how: Any) -> float:
        """As a part of the original's; how it is converted as for ``Schedule.flops``."""
        return schedule.flops(self.model, **how) / Schedule(ATTEND * DEPTH).flops(self.model)

    def accuracy(self, found: Tensor) -> float:
        """Of classes, from 0 to 1."""
        return float((found == self.labels).double().mean())

    def latency(self, converted: nn.Module) -> dict[str, float]:
        """By the number of images: part of the original's, in turn with it.

        Float32 on a CPU; on a GPU bfloat16, compiled.
        """
        models: dict[str, Callable[[Tensor], Any]]
        models = {"original": self.model, "converted": converted}
        images = self.images.to(self.device)
        if self.device.type == "cuda":
            images = images.bfloat16()
            pair = (copy.deepcopy(m).bfloat16() for m in (self.model, converted))
            models = dict(zip(models, map(torch.compile, pair), strict=True))
        found = {}
        for batch in BATCHES[self.device.type]:
            some = images[:batch]
            calls = {k: waiting(partial(m, some), self.device) for k, m in models.items()}
            times = interleaved(calls, seconds=SECONDS)
            found[str(batch)] = times["converted"].median / times["original"].median
        return found

    @torch.inference_mode()
    def classes(self, model: nn.Module) -> Tensor:
        """Of each image the class with the highest score."""
        batches = (some.to(self.device) for some in self.images.split(50))
        return torch.cat([logits_of(model(some)).argmax(1).cpu() for some in batches])


@lru_cache(maxsize=1)
def loaded(data: str, device: str, side: int | None = None) -> tuple[nn.Module, Tensor, Report]:
    """The model on the device, images to fit to, and the report on the others.

    Where the side isn't the model's own, images are enlarged and positions interpolated.
    """
    import timm
    from timm.layers import resample_abs_pos_embed

    side = side or SIDE
    weights = Path(data) / NAME / "model.safetensors"
    model: Any = timm.create_model(NAME, img_size=side)
    state = read_state(weights)
    if side != SIDE:
        grid = list(model.patch_embed.grid_size)
        positions = resample_abs_pos_embed(state["pos_embed"].float(), grid, num_prefix_tokens=1)
        state = {**state, "pos_embed": positions}
    fill(model, state, weights, NAME)
    labels = Path(data) / "imagenet_val" / "labels.csv"
    files = [labels.parent / name for name in _names(labels)]
    preprocess = Preprocess((side, side), mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0)
    fit, report = (torch.cat(list(batches(files[part], preprocess, 50))) for part in (FIT, REPORT))
    wanted = torch.tensor(read_labels(labels, files[REPORT]))
    model.eval().to(device)
    return model, fit, Report(model, report, wanted)


def _names(labels: Path) -> list[str]:
    """The files in the order of the table, which says which may be fitted to."""
    with open(labels, newline="", encoding="utf-8") as stream:
        return [row["file"] for row in csv.DictReader(stream)]
