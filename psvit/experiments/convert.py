"""What a trained ViT-Tiny keeps when its layers share maps and its tokens are pooled.

Fitted to ImageNet images without labels, reported on others: in closed form, and after a
distillation of some minutes.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
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
from ..planning.costs import Conversion, LayerCosts, flops
from ..planning.front import Losses, Scored
from ..planning.plan import Plan
from ..planning.run import TRIES, Planner
from ..schedule import ATTEND, POOL, Schedule
from ..timing import interleaved
from ..weights import fill, read_state
from .runs import Found, Progress, about, all_runs, check_folder, spread, write_json

NAME, DEPTH = "vit_tiny_patch16_224", 12
#: Of the sorted images: those that may be fitted to, and those that are reported on.
FIT, REPORT = slice(0, 400), slice(400, 1300)
#: Layers that may have one map, and pixels of a side.
LONGEST, SIDE = 3, 224
#: Number of sharing layers, and the layers (from 0) before which tokens are pooled.
SHARED, POOLED = (1, 3, 4, 6), (6, 7)
#: What "two cores" means: other experiments run two processes of one thread each.
THREADS = 2
#: Spent on each latency.
SECONDS = 4.0
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
    """

    data: str
    seeds: int = 3
    images: int = 300
    steps: int = 300

    def check(self) -> None:
        """Raises ValueError for data that aren't there, or numbers that can't be."""
        for file in (f"{NAME}/model.safetensors", "imagenet_val/labels.csv"):
            if not (Path(self.data) / file).is_file():
                raise ValueError(f"data: {self.data} has no {file}")
        if not 64 <= self.images <= FIT.stop:
            raise ValueError(f"images: got {self.images}, expected 64 to {FIT.stop}")
        if self.steps < 0:
            raise ValueError(f"steps: got {self.steps}, expected 0 or more")

    def common(self) -> dict[str, Any]:
        """What the runs in one folder have in common; where the data lie is nobody's affair."""
        return about("convert", {**asdict(self), "data": Path(self.data).name})


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Fits, plans, distils and reports; each part is kept as soon as it is finished.

    Returns:
        What ``results.json`` holds: ``rows``, each with ``accuracy`` and ``points`` under the
        original (0 to 1; mean and deviation over the seeds).

    Raises:
        ValueError: a folder of results that were made otherwise.
        OSError: the data can't be read, the folder can't be written.
    """
    started = time.perf_counter()
    common = settings.common()
    check_folder(output, common)
    arms = ["closed form", *(f"distil {name}" for name in DISTILLED if settings.steps)]
    learn = partial(_learn, settings, str(output))
    found = all_runs(learn, arms, settings.seeds, output, common, 1, progress)
    rows = _rows(found)
    seconds = round(time.perf_counter() - started, 1)
    results = {**common, "rows": rows, "runs": found, "seconds": seconds}
    write_json(output / "results.json", results)
    return results


def _rows(found: Mapping[str, list[Found]]) -> list[dict[str, Any]]:
    """One a model, its numbers over the seeds."""
    per_seed = [
        {name: row for arm in found.values() for name, row in arm[seed]["rows"].items()}
        for seed in range(len(found["closed form"]))
    ]
    original = torch.tensor([rows["original"]["accuracy"] for rows in per_seed])
    made = []
    for name in per_seed[0]:
        column = [rows[name] for rows in per_seed]
        accuracy = torch.tensor([row["accuracy"] for row in column])
        made.append(
            {
                "name": name,
                "schedules": [row["schedule"] for row in column],
                "accuracy": spread(accuracy),
                "under": spread(original - accuracy),
                "agreement": spread(torch.tensor([row["agreement"] for row in column])),
                "flops": spread(torch.tensor([row["flops"] for row in column])),
                "latency": spread(torch.tensor([row["latency"] for row in column])),
            }
        )
    return made


# --- one subset -----------------------------------------------------------------------------


def _learn(settings: Settings, output: str, arm: str, seed: int) -> Found:
    torch.set_num_threads(THREADS)
    model, images, report = loaded(settings.data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = images[order[: settings.images]]
    plans = Path(output) / "plans"
    plans.mkdir(exist_ok=True)
    start = time.perf_counter()
    if arm == "closed form":
        rows = _closed_form(model, chosen, report, plans, seed)
    else:
        name = arm.removeprefix("distil ")
        plan = Plan.load(plans / _file(name, seed))
        tuned = distill(model, plan, chosen, Distillation(steps=settings.steps, seed=seed))
        tuned.save(plans / _file(arm, seed))
        rows = {arm: report.row(tuned.schedule, tuned.apply(model))}
    return {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}


def _closed_form(
    model: nn.Module, images: Tensor, report: Report, plans: Path, seed: int
) -> dict[str, dict[str, Any]]:
    how = Conversion()
    planner = Planner(model, images, how, console_progress)
    costs = flops(model, how, DEPTH)
    rows = {"original": report.row(Schedule(ATTEND * DEPTH), model)}
    losses = planner.losses(DEPTH, pools=0, longest=LONGEST)
    chosen = {f"{k} share": planner.best(_sharing(losses, costs, k)) for k in SHARED}
    for place in POOLED:
        schedule = Schedule(ATTEND * place + POOL + ATTEND * (DEPTH - place))
        chosen[f"pooled before {place}"] = planner.best([Scored(0.0, costs.of(schedule), schedule)])
    for name, tried in chosen.items():
        plan = planner.planned(tried, {"measured": asdict(tried.score)})
        plan.save(plans / _file(name, seed))
        rows[name] = report.row(plan.schedule, tried.model)
        rows[f"{name}, naive"] = report.row(plan.schedule, how.apply(model, plan.schedule))
    return rows


def _sharing(losses: Losses, costs: LayerCosts, count: int) -> list[Scored]:
    """The schedules with so many sharing layers that are predicted to lose least."""
    found = []
    for schedule in Schedule.enumerate(DEPTH, pools=0, shared=count):
        groups = [(group[0], len(group)) for group in schedule.groups if len(group) > 1]
        if all(group in losses.groups for group in groups):
            loss = sum(losses.groups[group] for group in groups)
            found.append(Scored(loss, costs.of(schedule), schedule))
    return sorted(found)[:TRIES]


def _file(name: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}-{seed}.json"


class Report:
    """Accuracy and speed of a conversion beside its original, on images with labels."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.reference = self._classes(model)

    def row(self, schedule: Schedule, converted: nn.Module) -> dict[str, Any]:
        """Parts from 0 to 1; FLOPs and latency (batch 8, in turn) as parts of the original's."""
        found = self._classes(converted)
        some = self.images[:8]
        times = interleaved({m: partial(m, some) for m in (self.model, converted)}, seconds=SECONDS)
        plain = Schedule(ATTEND * DEPTH).flops(self.model)
        return {
            "schedule": schedule.text,
            "accuracy": float((found == self.labels).double().mean()),
            "agreement": float((found == self.reference).double().mean()),
            "flops": schedule.flops(self.model, pool=Conversion().pool) / plain,
            "latency": times[converted].median / times[self.model].median,
        }

    @torch.inference_mode()
    def _classes(self, model: nn.Module) -> Tensor:
        return torch.cat([logits_of(model(some)).argmax(1) for some in self.images.split(50)])


@lru_cache(maxsize=1)
def loaded(data: str) -> tuple[nn.Module, Tensor, Report]:
    """The model, images to fit to, and the report on the others."""
    import timm

    weights = Path(data) / NAME / "model.safetensors"
    model = timm.create_model(NAME)
    fill(model, read_state(weights), weights, NAME)
    labels = Path(data) / "imagenet_val" / "labels.csv"
    files = [labels.parent / name for name in _names(labels)]
    preprocess = Preprocess((SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0)
    fit, report = (torch.cat(list(batches(files[part], preprocess, 50))) for part in (FIT, REPORT))
    wanted = torch.tensor(read_labels(labels, files[REPORT]))
    model.eval()
    return model, fit, Report(model, report, wanted)


def _names(labels: Path) -> list[str]:
    """The files in the order of the table, which says which may be fitted to."""
    with open(labels, newline="", encoding="utf-8") as stream:
        return [row["file"] for row in csv.DictReader(stream)]
