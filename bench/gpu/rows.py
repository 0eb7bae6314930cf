"""The rows of the GPU table as plain data: what is measured, beside what, and what it must reach.

A case is one set of inputs. Its rows are the things of psvit that run on them, each with its bars;
its baselines run in the same rounds. Cases stand in order of importance: when the time is over,
what stands last is not measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

HEAD_DIM = 64


@dataclass(frozen=True)
class Bar:
    """Something that is to be at least ``least``.

    Args:
        what: "speed-up" over the fastest baseline of the family ``over``; "copy", the share of the
            measured copy bandwidth; "map", the time of the fastest of ``over`` plus writing the map
            once at copy bandwidth, over the row's own time; "launches", those of the fastest of
            ``over`` over the row's own.
        least: the value to reach.
        over: a family of baselines: what their names start with, up to a "/".
        moonshot: wished for, not required.
    """

    what: Literal["speed-up", "copy", "map", "launches"]
    least: float
    over: str = "sdpa"
    moonshot: bool = False

    def __str__(self) -> str:
        text = {
            "speed-up": f"{self.least:.3g}x {self.over}",
            "copy": f"{100 * self.least:.0f} % of copy",
            "map": f"{self.over} + writing the map",
            "launches": f"launches of {self.over}",
        }[self.what]
        return f"moonshot: {text}" if self.moonshot else text


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Args:
        kind: "apply", "attention" and "group", shape (B, H, N); or a kind of "pool-", shape
            (B, side, C): a square grid and one prefix token.
        rows: bars by row: the form of the map; for pools, "fused".
        baselines: names; a family and, after a "/", which of it.
        launches: whether to count what is launched on the device.
    """

    kind: str
    shape: tuple[int, int, int]
    rows: dict[str, tuple[Bar, ...]]
    baselines: tuple[str, ...]
    dtype: str = "bfloat16"
    launches: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}/{'x'.join(map(str, self.shape))}"


SDPA = ("sdpa/flash", "sdpa/cudnn", "sdpa/efficient", "sdpa/math")
ATTENTION = (*SDPA, "eager", "compile", "flex")
APPLY = (*ATTENTION, "eager A @ v")
POOL = ("eager", "compile")


def _over_sdpa(least: float) -> Bar:
    return Bar("speed-up", least)


def _apply(n: int, dense: float, eight_bits: float, **more: tuple[Bar, ...]) -> Case:
    rows = {
        "dense": (Bar("copy", 0.85), _over_sdpa(dense)),
        "uint8": (_over_sdpa(eight_bits),),
        "e4m3": (_over_sdpa(eight_bits),),
    }
    return Case("apply", (64, 12, n), rows | more, APPLY)


def _dense_prediction(batch: int, n: int) -> Case:
    """Attention is half of the block there; dense maps are reported only."""
    rows = {"dense": (), "uint8": (_over_sdpa(1.6),), "e4m3": (_over_sdpa(1.6),)}
    return Case("apply", (batch, 12, n), rows, APPLY)


def _attention(n: int) -> Case:
    bars = (Bar("map", 1.0), Bar("speed-up", 1.0, moonshot=True))
    return Case("attention", (64, 12, n), {"dense": bars}, ATTENTION)


def _group(n: int) -> Case:
    """One layer that attends and two that share, forward and backward, beside three of SDPA."""
    return Case("group", (64, 12, n), {"dense": (_over_sdpa(1.6),), "factored": ()}, ATTENTION)


def _pool(kind: str) -> Case:
    bars = (Bar("copy", 0.85), Bar("speed-up", 1.5, "eager"), Bar("speed-up", 1.0, "compile"))
    return Case(f"pool-{kind}", (256, 14, 768), {"fused": bars}, POOL)


def _single(kind: str, baselines: tuple[str, ...]) -> Case:
    """Batch 1: what it takes to launch is what it takes."""
    return Case(kind, (1, 12, 197), {"dense": (Bar("launches", 1.0),)}, baselines, launches=True)


FACTORED = (Bar("speed-up", 1 / 0.85),)

CASES: tuple[Case, ...] = (
    _apply(197, 1.8, 2.5),
    _attention(197),
    _group(197),
    _pool("max"),
    _apply(577, 1.4, 2.1),
    _apply(1025, 1.15, 1.7, factored=FACTORED),
    _group(577),
    _attention(257),
    _pool("avg"),
    _pool("depthwise"),
    _dense_prediction(4, 2305),
    _dense_prediction(1, 4097),
    Case("apply", (4, 12, 4096), {"factored": FACTORED}, SDPA),
    _dense_prediction(4, 4097),
    _dense_prediction(1, 2305),
    # Last: the profiler that counts launches may slow down what is launched after it.
    _single("apply", APPLY),
    _single("attention", ATTENTION),
)


def named(case: Case, row: str) -> str:
    return f"{case.name} {row}"


def select(pattern: str | None, cases: Sequence[Case] = CASES) -> list[Case]:
    """Cases whose name matches a glob, or contains the text if it has no wildcard; all for None.

    Raises:
        ValueError: no case matches.
    """
    if pattern is None:
        return list(cases)
    glob = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    chosen = [case for case in cases if fnmatchcase(case.name, glob)]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f'--cases: got "{pattern}", which no case matches; they are {names}')
    return chosen


def counts(case: Case, row: str, itemsize: int = 2) -> tuple[float, float]:
    """FLOPs of matrix products and bytes, the fewest that will do: each input once, each output
    once, no padding."""
    if case.kind.startswith("pool"):
        batch, side, channels = case.shape
        kept = 1 + ((side - 1) // 2 + 1) ** 2
        parameters = channels * (2 + (9 if case.kind == "pool-depthwise" else 0))
        return 0.0, float(itemsize * (batch * channels * (1 + side**2 + kept) + parameters))
    b, h, n = case.shape
    core, rows, full = b * h * n * HEAD_DIM, b * h * n, b * h * n * n
    if case.kind == "group":
        # Q K^T, dQ and dK once; P V, P^T dO and dO V^T in each layer. Inputs: q, k and three v;
        # their gradients; outputs and the gradients of those.
        return 2.0 * full * HEAD_DIM * (3 + 3 * 3), float(itemsize * core * (2 * 5 + 2 * 3))
    nbytes = map_bytes(case, row, itemsize)
    if case.kind == "attention":
        return 4.0 * full * HEAD_DIM, float(itemsize * 4 * core + nbytes)
    products = 4.0 if row == "factored" else 2.0
    inputs = 2 * itemsize * core + 4 * rows if row == "factored" else nbytes
    return products * full * HEAD_DIM, float(inputs + 2 * itemsize * core)


def map_bytes(case: Case, row: str, itemsize: int = 2) -> int:
    """Of a stored map without its padding: what reading or writing it once moves."""
    b, h, n = case.shape
    if row == "dense":
        return b * h * n * n * itemsize
    return b * h * n * (n + 4) if row in ("uint8", "e4m3") else 0
