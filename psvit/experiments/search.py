"""What does evolution gain over as many random candidates, and over a schedule written by hand?

On handwritten digits. Nothing is downloaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..console import progress as console_progress
from ..files import whole_folder
from ..plots import draw_curves
from ..schedule import Schedule
from ..search.cost import flops
from ..search.data import held_out_data
from ..search.run import Search
from ..search.run import Settings as SearchSettings
from ..search.space import Candidate, SearchSpace, default_space
from ..train.data import Loading
from ..train.sources import open_source
from .data import digits
from .runs import Found, Progress, about, all_runs, check_folder, spread
from .training import Recipe, trained

#: Every second layer shares and widths double, as in the presets.
BY_HAND = Candidate(Schedule("AS|AS|A"), (8, 16, 32))

#: Of those that are trained from scratch, each so many times. Few epochs: after 30 this one gets
#: 97 % of the digits right, as wider ones do, which leaves no room for differences.
RECIPE, TIMES = Recipe(epochs=6, batch=50, rate=1e-3, every=6), 3


@dataclass(frozen=True)
class Settings:
    """What ``run`` does; the defaults take less than ten minutes on two cores.

    Args:
        seeds: how many searches; each has its held-out images, supernet and evolution.
        epochs, population, generations: see ``psvit.search.run.Settings``.
        recipe: by which what was found is trained from scratch.
        processes: that search at a time, in one thread each; results don't depend on it.
    """

    seeds: int = 3
    epochs: int = 60
    population: int = 20
    generations: int = 10
    recipe: Recipe = RECIPE
    processes: int = 2


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Searches with every seed; writes ``results.json`` and ``curves.png`` into a folder.

    Searches that the folder has from an earlier call are not made again.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: the folder has searches that were made otherwise.
        OSError: the folder can't be written (before anything is computed).
    """
    start = time.perf_counter()
    common = about("search", asdict(settings))
    learn = partial(_learn, settings, output)
    found = all_runs(
        learn, ["search"], settings.seeds, output, common, settings.processes, progress
    )["search"]
    results = {
        **common,
        **{name: found[0][name] for name in ("candidates", "limit", "costs", "test_images")},
        "reach": _spreads([run["reach"] for run in found]),
        "gain": spread(_gains(found)),
        "accuracy": _spreads(
            [{name: row["accuracy"] for name, row in run["trained"].items()} for run in found]
        ),
        "searches": found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    with whole_folder(output) as work:
        _draw(results, work / "curves.png")
        text = json.dumps(results, indent=1) + "\n"
        (work / "results.json").write_text(text, encoding="utf-8")
    return results


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for a folder with searches that were made otherwise."""
    check_folder(output, about("search", asdict(settings)))


# --- one search -----------------------------------------------------------------------------


def _learn(settings: Settings, output: Path, name: str, seed: int) -> Found:
    space = default_space(8, 1, 10)
    data = held_out_data(open_source("digits"), Loading((8, 8), batch=64, seed=seed))
    folder = output / "runs" / f"{name}-{seed}"
    search = Search(
        space,
        data,
        SearchSettings(
            epochs=settings.epochs,
            population=settings.population,
            generations=settings.generations,
            control=True,
            seed=seed,
        ),
        folder,
        resume=(folder / checkpoint.NAME).exists(),
        progress=_silent,
    )
    results = search.run()
    costs = torch.linspace(results["smallest"], results["limit"], 200).tolist()
    return {
        "candidates": results["candidates"],
        "limit": results["limit"],
        "costs": costs,
        "test_images": len(digits().test_images),
        "reach": results["reach"],
        "best": {name: _best(rows, costs) for name, rows in results["evaluated"].items()},
        "front": results["front"],
        "trained": _trained(space, results, settings.recipe, seed),
    }


def _silent(title: str, total: float) -> AbstractContextManager[Any]:
    """The experiment has a progress bar of its own."""
    return nullcontext(lambda part=1: None)


def _best(rows: Sequence[dict[str, Any]], costs: Sequence[float]) -> list[float]:
    """For each cost the best accuracy of those that cost no more."""
    return [max(row["accuracy"] for row in rows if row["flops"] <= cost) for cost in costs]


def _trained(
    space: SearchSpace, results: dict[str, Any], recipe: Recipe, seed: int
) -> dict[str, Any]:
    """What costs no more than the schedule written by hand, from scratch on all training images."""
    most = flops(space, BY_HAND)
    chosen = {"by hand": BY_HAND}
    for name, rows in results["evaluated"].items():
        cheap = [row for row in rows if row["flops"] <= most]
        row = max(cheap, key=lambda row: row["accuracy"])
        chosen[name] = Candidate(Schedule(row["schedule"]), tuple(row["widths"]))
    found = {}
    for name, candidate in chosen.items():
        times = [_from_scratch(space, candidate, recipe, TIMES * seed + i) for i in range(TIMES)]
        found[name] = {
            "candidate": str(candidate),
            "flops": flops(space, candidate),
            "accuracy": sum(times) / TIMES,
            "times": times,
        }
    return found


def _from_scratch(space: SearchSpace, candidate: Candidate, recipe: Recipe, seed: int) -> float:
    torch.manual_seed(seed)
    accuracies, _ = trained(space.model(candidate), digits(), recipe)
    return accuracies[-1]


# --- over the seeds -------------------------------------------------------------------------


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread(torch.tensor([run[name] for run in runs])) for name in runs[0]}


def _gains(found: Sequence[Found]) -> torch.Tensor:
    return torch.tensor([run["reach"]["evolution"] - run["reach"]["random"] for run in found])


def _draw(results: dict[str, Any], path: Path) -> None:
    settings = results["settings"]
    evaluated = settings["population"] * settings["generations"]
    draw_curves(
        [cost / 1e6 for cost in results["costs"]],
        {
            name: [run["best"][name] for run in results["searches"]]
            for name in ("evolution", "random")
        },
        path,
        title=f"Digits: the best of {evaluated} of {results['candidates']:,} candidates",
        labels=("FLOPs of one image, at most, millions", "held-out accuracy, %"),
    )
