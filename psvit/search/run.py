"""A whole search: train the supernet, evolve, write the front; it goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from .. import checkpoint
from ..bench.machine import commit, machine, versions
from ..console import progress as console_progress
from ..files import clear_unfinished, whole_folder
from ..numbers import check_number
from ..plots import draw_search
from .cost import Limit, flops
from .evolution import Evolution, RandomSearch
from .latency import LatencyTable
from .pareto import reach
from .space import Candidate, SearchSpace
from .supernet import Supernet
from .training import Data, Training, accuracy

Progress = Callable[[str, float], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """What a search does with a space and its data.

    Args:
        limit: see ``Limit.parse``.
        epochs, lr: of training the supernet.
        population, generations: of the evolution; together they say how many are evaluated.
        control: evaluate as many random candidates too, to see what evolution gains.
        latency_batch: images in a call whose latency is measured.
        seed: of everything.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a number out of its range, a limit that isn't one, an unknown device.
    """

    limit: str = "flops<=0.5"
    epochs: int = 60
    lr: float = 1e-3
    population: int = 20
    generations: int = 10
    control: bool = False
    latency_batch: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        Limit.parse(self.limit)
        for name in ("epochs", "population", "generations", "latency_batch"):
            check_number(name, getattr(self, name), least=1)
        check_number("seed", self.seed, least=0)
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected more than 0")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f'device: got "{self.device}", expected "cpu" or "cuda"')
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError('device: got "cuda", but PyTorch finds no GPU here')


class Search:
    """A search in a folder. Until ``run`` nothing is written, but all that can be wrong is checked.

    Args:
        space: what to choose from.
        data: images that fit it.
        settings: what to do.
        output: folder for ``last.pt`` (after each epoch and generation) and the results.
        about: what else a search that goes on must have in common with the one that stopped, for
            example the name of the data.
        resume: go on from ``last.pt``.
        progress: makes progress bars.

    Raises:
        ValueError: a limit that no candidate meets; with ``resume`` no search in the folder, a
            damaged one, or one that was made otherwise (differences listed); without it a folder
            that has a checkpoint.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: Data,
        settings: Settings,
        output: Path,
        *,
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
        progress: Progress = console_progress,
    ) -> None:
        self.space, self.data, self.settings, self.output = space, data, settings, output
        self.progress = progress
        self.about = {**(about or {}), **asdict(settings), "space": space.to_dict()}
        stopped = checkpoint.stopped(output, "search", resume=resume)
        if stopped is not None:
            self._check(stopped)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.supernet = Supernet(space, device=settings.device)
        self.training = Training(
            self.supernet, data, epochs=settings.epochs, lr=settings.lr, seed=settings.seed
        )
        limit = Limit.parse(settings.limit)
        self.table = self._latencies(stopped) if limit.measure == "latency" else None
        self.most = limit.of(space, self.cost)
        kinds = {"evolution": Evolution, "random": RandomSearch}
        self.searches = {
            name: kinds[name](space, self._accuracy, self.cost, self.most, settings.population)
            for name in ("evolution", "random")[: 1 + settings.control]
        }
        self.seconds = 0.0
        if stopped is not None:
            self._load(stopped)

    def cost(self, candidate: Candidate) -> float:
        """FLOPs of one image, or milliseconds, as the limit has it."""
        return flops(self.space, candidate) if self.table is None else self.table(candidate)

    def run(self) -> dict[str, Any]:
        """Trains, evolves, and writes ``front.json`` and ``front.png``.

        Returns:
            What ``front.json`` holds.

        Raises:
            OSError: the folder can't be written (before anything is computed).
            FloatingPointError: the loss isn't finite; ``last.pt`` is from before.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        clear_unfinished(self.output)
        self._start = time.perf_counter() - self.seconds
        self._save()
        self._train()
        for name, search in self.searches.items():
            self._evolve(name, search)
        results = self._results()
        with whole_folder(self.output) as work:
            draw_search(results, work / "front.png")
            text = json.dumps(results, indent=1) + "\n"
            (work / "front.json").write_text(text, encoding="utf-8")
        return results

    # --- steps ------------------------------------------------------------------------------

    def _train(self) -> None:
        left = self.settings.epochs - self.training.done
        with self.progress("training the supernet", left * self.data.steps) as step:
            for _ in range(left):
                self.training.epoch(step)
                self._save()

    def _evolve(self, name: str, search: RandomSearch) -> None:
        settings = self.settings
        generations = range(search.done, settings.generations)
        with self.progress(f"{name} search", len(generations) * settings.population) as step:
            for generation in generations:
                search.generation(Random(f"{settings.seed} {name} {generation}"), step)
                self._save()

    def _accuracy(self, candidate: Candidate) -> float:
        return accuracy(self.supernet, candidate, self.data.held_out)

    def _latencies(self, stopped: Mapping[str, Any] | None) -> LatencyTable:
        if stopped is not None:
            return LatencyTable.of_rows(stopped["latencies"])
        settings = self.settings
        with self.progress("measuring latencies", 1) as step:
            return LatencyTable.measured(
                self.space, batch=settings.latency_batch, device=settings.device, step=step
            )

    # --- what is kept -----------------------------------------------------------------------

    def _save(self) -> None:
        self.seconds = time.perf_counter() - self._start
        state = {
            "search": self.about,
            "seconds": self.seconds,
            "latencies": None if self.table is None else self.table.rows(),
            "supernet": self.supernet.state_dict(),
            "training": self.training.state_dict(),
            "searches": {name: search.state_dict() for name, search in self.searches.items()},
        }
        checkpoint.save(self.output, "search", state)

    def _load(self, stopped: Mapping[str, Any]) -> None:
        self.seconds = stopped["seconds"]
        self.supernet.load_state_dict(stopped["supernet"])
        self.training.load_state_dict(stopped["training"])
        for name, search in self.searches.items():
            search.load_state_dict(stopped["searches"][name])

    def _check(self, stopped: Mapping[str, Any]) -> None:
        was, now = (
            {**about, **about["space"], "space": None} for about in (stopped["search"], self.about)
        )
        if other := checkpoint.differences(was, now):
            raise ValueError(
                f"output: the search in {self.output} was made otherwise: {'; '.join(other)}"
            )

    # --- results ----------------------------------------------------------------------------

    def _results(self) -> dict[str, Any]:
        evolution = self.searches["evolution"]
        least = self.cost(self.space.smallest)
        return {
            "search": self.about,
            "measure": Limit.parse(self.settings.limit).measure,
            "limit": self.most,
            "smallest": least,
            "largest": self.cost(self.space.largest),
            "candidates": self.space.size(),
            "held_out_images": sum(len(labels) for _, labels in self.data.held_out),
            "front": [self._row(evolution, candidate) for candidate in evolution.front()],
            "evaluated": {
                name: [self._row(search, candidate) for candidate in search.evaluated]
                for name, search in self.searches.items()
            },
            "reach": {
                name: reach(list(search.evaluated.values()), least, self.most)
                for name, search in self.searches.items()
            },
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - self._start, 1),
        }

    def _row(self, search: RandomSearch, candidate: Candidate) -> dict[str, Any]:
        score = search.evaluated[candidate]
        row = {
            "schedule": candidate.schedule.text,
            "widths": list(candidate.widths),
            "accuracy": score.accuracy,
            "flops": flops(self.space, candidate),
        }
        return row if self.table is None else {**row, "latency_ms": score.cost}
