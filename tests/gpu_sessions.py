"""Sessions of the GPU runner without a GPU: tiny cases, the clock of the host, what was said."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: psvit is the installed one


from bench.gpu import (  # noqa: E402
    command,
    report,
    rows,
    session,
)
from bench.gpu.rows import Bar, Case  # noqa: E402

BESIDE = ("sdpa/flash", "sdpa/cudnn", "sdpa/math", "eager")
TINY = (
    Case(
        "apply",
        (2, 2, 9),
        {
            "dense reference": (Bar("copy", 0.5), Bar("speed-up", 0.001)),
            "uint8 reference": (),
            "e4m3 reference": (),
        }
        | {"factored reference": (Bar("speed-up", 1e6),)},
        (*BESIDE, "eager A @ v"),
        "float32",
    ),
    Case("attention", (2, 2, 9), {"dense reference": (Bar("map", 0.001),)}, BESIDE, "float32"),
    Case("group", (2, 2, 9), {"dense reference": (), "factored reference": ()}, BESIDE, "float32"),
    Case(
        "pool-max",
        (2, 5, 16),
        {"fused reference": (Bar("speed-up", 0.001, "eager"),)},
        rows.POOL[:1],
    ),
    Case("pool-avg", (2, 5, 16), {"fused reference": ()}, ("eager",), "float32"),
    Case("pool-depthwise", (2, 5, 16), {"fused reference": ()}, ("eager",), "float32"),
    Case("merge", (2, 1, 33), {"fused reference": ()}, ("eager",), "float32"),
    Case("follow", (2, 1, 33), {"fused reference": ()}, ("eager",), "float32"),
    Case(
        "apply",
        (1, 2, 5),
        {"dense reference": (Bar("launches", 1.0),)},
        BESIDE,
        "float32",
        launches=True,
    ),
)
RATES = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": {"float32": 1e10}, "exp_per_s": 1e9}


class HostClock:
    """Stands in for ``CudaClock``."""

    name = "host"

    def sets(self, nbytes: float) -> int:
        return 2

    def warm_up(self, calls) -> None:
        for call in calls:
            call()

    def captured(self, calls):
        def sample() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return max(1e6 * (time.perf_counter() - start) / len(calls), 1e-3)

        return sample

    wall = captured

    def peak_bytes(self, call) -> int:
        return 1000

    def launches(self, call) -> list[str]:
        call()
        return ["kernel"]

    def check_health(self) -> None:
        pass

    def release(self) -> None:
        pass


def run(
    store, cases, seconds: float = 1e6, *, fresh: bool = True, host=None, **options
) -> list[str]:
    """A session with the reference in place of Triton; what it said."""
    said: list[str] = []
    if fresh:
        store.create(cases)
    options = {"reserve": 30.0, "rounds": (3, 3)} | options
    deadline = time.time() + seconds
    options = {"device": "cpu", "deadline": deadline, "say": said.append} | options
    session.run(store, cases, host or HostClock(), **options)
    return said


def stored(store) -> dict:
    return json.loads(store.file.read_text())


def states(store) -> set[str]:
    """Of all rows."""
    cases = stored(store)["cases"].values()
    return {row["status"] for case in cases for row in case["rows"].values()}


def shown(data: dict, cases) -> str:
    console = Console(width=command.WIDTH, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(data, console, cases)
    return console.export_text()


def spoilt(function, how):
    return lambda *args, **options: how(function(*args, **options))


class Lost(HostClock):
    """From the first error on, nothing works in this process."""

    def __init__(self) -> None:
        self.broken = False

    def check_health(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


class Ended:
    """A process that has ended, or, without a code, one that has to be killed."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9

    def wait(self) -> int:
        assert self.code is not None
        return self.code
