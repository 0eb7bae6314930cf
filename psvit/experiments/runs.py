"""Arms times seeds; each run is kept in a folder once it is finished, and not made again."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bench.machine import commit, machine, versions
from ..files import whole_file
from ..plots import draw_curves

Progress = Callable[[str, float], AbstractContextManager[Any]]

#: What one run of an arm with a seed finds, "accuracy" (a list, one an epoch measured) among it.
Found = dict[str, Any]
Learn = Callable[[str, int], Found]


def about(experiment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs in one folder have in common."""
    return {
        "experiment": experiment,
        "settings": dict(settings),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def check_folder(folder: Path, common: Mapping[str, Any]) -> None:
    """Raises ValueError, with the differences, if the folder's runs were made otherwise."""
    file = folder / "settings.json"
    if not file.exists():
        return
    try:
        there = dict(_flat(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: not the settings of an experiment") from None
    here = dict(_flat(json.loads(json.dumps(common))))
    differences = [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in dict.fromkeys((*here, *there))
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder}: has runs made otherwise ({'; '.join(differences)}), expected an empty "
            "folder or the same"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def all_runs(
    learn: Learn,
    arms: Sequence[str],
    seeds: int,
    folder: Path,
    common: Mapping[str, Any],
    processes: int,
    progress: Progress,
    *,
    threads: int = 1,
) -> dict[str, list[Found]]:
    """What ``learn(arm, seed)`` found, for each arm a list over the seeds.

    ``folder`` gets ``settings.json`` and one file a run as soon as that is finished; runs that are
    there already are read. With ``processes`` from 2 up, ``learn`` must be picklable. Each run is
    made in so many ``threads``.

    Raises:
        ValueError: the folder has runs that were made otherwise.
        OSError: the folder can't be written (before anything is computed).
    """
    check_folder(folder, common)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", common)
    jobs = [
        Job(learn, arm, seed, folder / "runs" / f"{_slug(arm)}-{seed}.json", threads)
        for seed in range(seeds)
        for arm in arms
    ]
    found: dict[str, list[Found]] = {arm: [] for arm in arms}
    with progress("training", len(jobs)) as step:
        for job, run in zip(jobs, _in_turn(jobs, processes), strict=True):
            found[job.arm].append(run)
            step()
    return found


class Job(NamedTuple):
    """A run to make, the file that keeps it, and the threads that it is made in."""

    learn: Learn
    arm: str
    seed: int
    file: Path
    threads: int = 1


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


def _in_turn(jobs: Sequence[Job], processes: int) -> Iterator[Found]:
    if processes == 1:
        yield from map(_run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        yield from pool.map(_run_in_process, jobs)


def _end_with_parent() -> None:
    """A parent that is killed can't tell its processes: they would train on, and then wait."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


#: In a process of the pool, after Ctrl-C: what still waits there is not begun.
_interrupted = threading.Event()


def _run_in_process(job: Job) -> Found:
    if _interrupted.is_set():
        raise KeyboardInterrupt
    try:
        return _run(job)
    except KeyboardInterrupt:
        _interrupted.set()
        raise


def _run(job: Job) -> Found:
    if job.file.exists():
        return json.loads(job.file.read_text(encoding="utf-8"))
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        with torch.random.fork_rng():
            found = job.learn(job.arm, job.seed)
    finally:
        torch.set_num_threads(before)
    write_json(job.file, found)
    return found


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """Whole, or not at all."""
    with whole_file(file) as work:
        work.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


# --- results --------------------------------------------------------------------------------


def write_results(
    folder: Path, results: Mapping[str, Any], title: str, started: float
) -> dict[str, Any]:
    """Writes ``results.json`` and ``curves.png``; returns what the first holds.

    Its ``seconds`` are those of this call, which may have found runs that were there already.

    Args:
        results: with ``epochs``, and ``accuracy``, for each arm a list over the seeds.
        title: of the picture.
        started: when this call did, by ``time.perf_counter``.
    """
    results = {**results, "seconds": round(time.perf_counter() - started, 1)}
    with whole_file(folder / "curves.png") as work:
        draw_curves(results["epochs"], results["accuracy"], work, title=title)
    write_json(folder / "results.json", results)
    return results


def spread(values: Tensor) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds (0 for one)."""
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "deviation": deviation}
