"""The cases of ``psvit bench`` as pytest-benchmark suites: one group a case, one test a contender.

A module names its cases with ``CASES``, a glob. Nothing here asserts a time; the errors are
asserted before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import psvit_kernels
from psvit.bench import measure
from psvit.bench.cases import Case, UnavailableError, select


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    pairs = [(case, name) for case in select(metafunc.module.CASES) for name in case.contenders]
    ids = [f"{case.name}-{name}" for case, name in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=ids, scope="module")


@pytest.fixture(scope="session", autouse=True)
def pinned() -> Iterator[dict[str, str]]:
    """Two threads, one provider and one SDPA backend for every contender."""
    torch.set_num_threads(2)
    provider, _ = measure.best_provider()
    with measure.pinned_sdpa() as sdpa, psvit_kernels.use(provider):
        yield {"provider": provider, "sdpa_backend": sdpa}


@pytest.fixture(scope="module")
def built() -> dict[str, measure.Work]:
    """The inputs of the last case only: pytest keeps the contenders of a case together."""
    return {}


@pytest.fixture
def call(
    case: Case,
    contender: str,
    pinned: dict[str, str],
    built: dict[str, measure.Work],
    benchmark,
) -> Iterator[Callable[[], object]]:
    """The function to time, with the case's inputs made and psvit's error checked."""
    benchmark.group = case.name
    benchmark.extra_info.update(pinned, threads=torch.get_num_threads())
    with torch.enable_grad() if case.grad else torch.inference_mode():
        work = built.get(case.name) or _build(case, built)
        yield work.psvit if contender == "psvit" else work.baselines[contender]


def _build(case: Case, built: dict[str, measure.Work]) -> measure.Work:
    built.clear()
    try:
        with torch.inference_mode(False):
            work = case.build()
        gate = measure.check(work, case.dtype)
    except UnavailableError as missing:
        pytest.skip(str(missing))
    assert gate.open, f"{case.name}: error {gate.error} is over its limit {gate.limit}"
    built[case.name] = work
    return work
