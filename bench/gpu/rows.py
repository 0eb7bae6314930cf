"""The rows of the GPU table as plain data: what is measured, beside what, and what it must reach.

A case is one set of inputs. Its rows are the things of psvit that run on them, each served by one
provider and each with its bars; its baselines run in the same rounds. Cases stand in order of
importance: when the time is over, what stands last is not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

HEAD_DIM = 64

#: Providers; of the CUDA kernels also with one family of them. Pools have but one.
TRITON, CUDA, HOPPER, AMPERE = "triton", "cuda", "cuda/sm_90a", "cuda/sm_80"


@dataclass(frozen=True)
class Bar:
    """Something that is to be at least ``least``.

    Args:
        what: "speed-up" over the fastest baseline of the family ``over``; "copy", the share of the
            measured copy bandwidth; "map", the time of the fastest of ``over`` plus writing the map
            once at copy bandwidth, over the row's own time; "launches", those of the fastest of
            ``over`` over the row's own; "dense", the speed-up over the same provider's row "dense";
            "flops", that over ``over``, divided by the FLOPs of ``over`` over the row's.
        least: the value to reach.
        over: a family of baselines: what their names start with, up to a "/".
        moonshot: wished for, not required.
    """

    what: Literal["speed-up", "copy", "map", "launches", "dense", "flops"]
    least: float
    over: str = "sdpa"
    moonshot: bool = False

    def __str__(self) -> str:
        text = {
            "speed-up": f"{self.least:.3g}x {self.over}",
            "copy": f"{100 * self.least:.0f} % of copy",
            "map": f"{self.over} + writing the map",
            "launches": f"launches of {self.over}",
            "dense": f"{self.least:.3g}x dense",
            "flops": f"{self.least:.3g}x the FLOPs of {self.over}",
        }[self.what]
        return f"moonshot: {text}" if self.moonshot else text


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Args:
        kind: "apply", "attention", "group", "sharing", "merge" and "follow", shape (B, H, N); a
            kind of "pool-", shape (B, side, C): a square grid and one prefix token; or a network
            of timm after "model-" or "merging-", shape (B, side, side): images.
        rows: bars by row: the form of the map ("fused" for pools, merging, following and for a
            sharing layer as one kernel; for networks the schedule, or "merge=" and how many pairs
            of tokens each layer merges), a space, and the provider.
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

    @property
    def network(self) -> str | None:
        """What timm calls it, if it is a whole network."""
        kind, _, name = self.kind.partition("-")
        return name if kind in ("model", "merging") else None


SDPA = ("sdpa/flash", "sdpa/cudnn", "sdpa/efficient", "sdpa/math")
ATTENTION = (*SDPA, "eager", "compile", "flex")
APPLY = (*ATTENTION, "eager A @ v")
POOL = ("eager", "compile")
UNCONVERTED = ("unconverted/flash", "unconverted/cudnn")

Rows = dict[str, tuple[Bar, ...]]
Bars = tuple[Bar, ...]


def _over_sdpa(least: float, moonshot: float | None = None) -> Bars:
    bars = (Bar("speed-up", least),)
    return bars if moonshot is None else (*bars, Bar("speed-up", moonshot, moonshot=True))


def _copy(least: float, moonshot: float) -> Bars:
    return Bar("copy", least), Bar("copy", moonshot, moonshot=True)


def _served(form: str, triton: Bars, hopper: Bars = ()) -> Rows:
    """A row for each provider; the kernels for every GPU are to be seen, not to be reached."""
    return {f"{form} {TRITON}": triton, f"{form} {HOPPER}": hopper, f"{form} {AMPERE}": ()}


EIGHT_BITS = (*_copy(0.8, 0.9), Bar("dense", 1.5), Bar("dense", 1.8, moonshot=True))


def _apply(n: int, dense: float, eight_bits: float, **more: Bars) -> Case:
    rows = _served("dense", (Bar("copy", 0.85), *_over_sdpa(dense)), _copy(0.9, 0.95))
    for form in ("uint8", "e4m3"):
        rows |= _served(form, _over_sdpa(eight_bits), EIGHT_BITS)
    rows |= {f"{form} {TRITON}": bars for form, bars in more.items()}
    return Case("apply", (64, 12, n), rows, APPLY)


def _dense_prediction(batch: int, n: int) -> Case:
    """Attention is half of the block there; dense maps are reported only."""
    rows = _served("dense", ())
    for form in ("uint8", "e4m3"):
        rows |= _served(form, _over_sdpa(1.6))
    return Case("apply", (batch, 12, n), rows, APPLY)


def _attention(n: int) -> Case:
    dense = (Bar("map", 1.0), Bar("speed-up", 1.0, moonshot=True))
    rows = _served("dense", dense, _over_sdpa(1.0, 1.5)) | _served("uint8", (), _over_sdpa(1.0))
    return Case("attention", (64, 12, n), rows, ATTENTION)


def _group(n: int) -> Case:
    """One layer that attends and two that share, forward and backward, beside three of SDPA."""
    rows = {f"dense {TRITON}": _over_sdpa(1.6), f"factored {TRITON}": ()}
    return Case("group", (64, 12, n), rows, ATTENTION)


def _sharing(heads: int) -> Case:
    """Three launches, of each provider, and one kernel that goes unless it is faster."""
    rows = _served("dense", ()) | {f"fused {HOPPER}": (Bar("dense", 1.0),)}
    return Case("sharing", (64, heads, 197), rows, ("eager", "compile"))


def _pool(kind: str) -> Case:
    bars = (Bar("copy", 0.85), Bar("speed-up", 1.5, "eager"), Bar("speed-up", 1.0, "compile"))
    rows = {f"fused {provider}": bars for provider in (TRITON, CUDA)}
    return Case(f"pool-{kind}", (256, 14, 768), rows, POOL)


#: Pairs of tokens that an image merges.
PAIRS = 13


def _merge(heads: int) -> Case:
    """Matching by keys and merging with sizes: 35 microseconds, and 20 as a moonshot, where plain
    PyTorch takes some 170."""
    bars = (Bar("speed-up", 170 / 35, "eager"), Bar("speed-up", 170 / 20, "eager", moonshot=True))
    return Case("merge", (256, heads, 197), {f"fused {TRITON}": bars}, POOL)


def _follow(heads: int) -> Case:
    """The map of tokens that were merged: read once and written once."""
    bars = (Bar("copy", 0.7), Bar("speed-up", 3.0, "eager"))
    return Case("follow", (64, heads, 197), {f"fused {TRITON}": bars}, POOL)


def _single(kind: str, baselines: tuple[str, ...]) -> Case:
    """Batch 1: what it takes to launch is what it takes."""
    bars = (Bar("launches", 1.0),)
    rows = {f"dense {provider}": bars for provider in (TRITON, HOPPER, AMPERE)}
    return Case(kind, (1, 12, 197), rows, baselines, launches=True)


#: Attention sharing alone, and with two pools.
SCHEDULES = ("AASSASSSASSS", "AASA|ASAS|ASSS")


def _of_flops(least: float) -> Bars:
    return Bar("flops", least, "unconverted"), Bar("flops", 1.0, "unconverted", moonshot=True)


def _model(name: str) -> Case:
    """A whole network, compiled, beside the unconverted one."""
    rows: Rows = {}
    for schedule in SCHEDULES:
        rows |= _served(schedule, _of_flops(0.97), _of_flops(0.97))
    return Case(f"model-{name}", (256, 224, 224), rows, UNCONVERTED)


def _merging(name: str, pairs: int, batch: int) -> Case:
    """The same where tokens are merged, which also runs as it is written in plain PyTorch."""
    rows = {f"merge={pairs} {TRITON}": _of_flops(0.9)}
    return Case(f"merging-{name}", (batch, 224, 224), rows, (*UNCONVERTED, f"plain/{pairs}"))


FACTORED = _over_sdpa(1 / 0.85)

OPERATIONS: tuple[Case, ...] = (
    _apply(197, 1.8, 2.5),
    _attention(197),
    _group(197),
    _pool("max"),
    _merge(6),
    _follow(6),
    _apply(577, 1.4, 2.1),
    _apply(1025, 1.15, 1.7, factored=FACTORED),
    _group(577),
    _attention(257),
    Case("attention", (64, 12, 50), _served("dense", ()) | _served("uint8", ()), ATTENTION),
    _sharing(6),
    _sharing(12),
    _pool("avg"),
    _pool("depthwise"),
    _dense_prediction(4, 2305),
    _dense_prediction(1, 4097),
    Case("apply", (4, 12, 4096), {f"factored {TRITON}": FACTORED}, SDPA),
    _dense_prediction(4, 4097),
    _dense_prediction(1, 2305),
    # Last: the profiler that counts launches may slow down what is launched after it.
    _single("apply", APPLY),
    _single("attention", ATTENTION),
)

MODELS = (_model("vit_base_patch16_224"), _model("deit_small_patch16_224"))

MERGING = tuple(
    _merging(name, pairs, batch)
    for batch in (256, 1, 32)
    for name, pairs in (
        ("deit_small_patch16_224", 13),
        ("vit_base_patch16_224", 13),
        ("vit_large_patch16_224", 8),
    )
)

#: What one session measures, and one table shows.
GROUPS = {"operations": OPERATIONS, "networks": MODELS, "merging": MERGING}

CASES = (*OPERATIONS, *MODELS, *MERGING)


def split(row: str) -> tuple[str, str]:
    """Form and provider."""
    form, provider = row.split(" ")
    return form, provider


def is_new(row: str) -> bool:
    """Whether kernels serve it that may never have run on a device."""
    return split(row)[1].split("/")[0] == CUDA


def named(case: Case, row: str) -> str:
    return f"{case.name} {row}"


def select(pattern: str | None, cases: Sequence[Case] = CASES) -> list[Case]:
    """The cases of a group; those whose name matches a glob, or contains the text if it has no
    wildcard; all for None.

    Raises:
        ValueError: no case matches.
    """
    if pattern is None:
        return list(cases)
    if pattern in GROUPS:
        return list(GROUPS[pattern])
    glob = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    chosen = [case for case in cases if fnmatchcase(case.name, glob)]
    if not chosen:
        names = ", ".join(case.name for case in cases)
        raise ValueError(
            f'--cases: got "{pattern}", which no case matches; the groups are '
            f"{', '.join(GROUPS)}, the cases {names}"
        )
    return chosen


def counts(case: Case, row: str, itemsize: int = 2) -> tuple[float, float]:
    """FLOPs of matrix products and bytes, the fewest that will do: each input once, each output
    once, no padding. Of a network more bytes than any cache has; its FLOPs are among its facts."""
    if case.kind.startswith("pool"):
        batch, side, channels = case.shape
        kept = 1 + ((side - 1) // 2 + 1) ** 2
        parameters = channels * (2 + (9 if case.kind == "pool-depthwise" else 0))
        return 0.0, float(itemsize * (batch * channels * (1 + side**2 + kept) + parameters))
    if case.network:
        return 0.0, math.inf
    b, h, n = case.shape
    core, rows, full = b * h * n * HEAD_DIM, b * h * n, b * h * n * n
    if case.kind == "merge":  # keys, tokens and what is left of them
        merged = core // n * (n - PAIRS)
        return 2.0 * b * (n // 2) ** 2 * HEAD_DIM, float(itemsize * (2 * core + merged))
    if case.kind == "follow":
        return 0.0, float(itemsize * b * h * (n**2 + (n - PAIRS) ** 2))
    if case.kind == "group":
        # Q K^T, dQ and dK once; P V, P^T dO and dO V^T in each layer. Inputs: q, k and three v;
        # their gradients; outputs and the gradients of those.
        return 2.0 * full * HEAD_DIM * (3 + 3 * 3), float(itemsize * core * (2 * 5 + 2 * 3))
    if case.kind == "sharing":  # x, W, the map and the output
        width = h * HEAD_DIM
        moved = 2 * core + width**2 + full
        return 2.0 * core * width + 2.0 * full * HEAD_DIM, float(itemsize * moved)
    nbytes = map_bytes(case, row, itemsize)
    if case.kind == "attention":
        return 4.0 * full * HEAD_DIM, float(itemsize * 4 * core + nbytes)
    factored = split(row)[0] == "factored"
    products = 4.0 if factored else 2.0
    inputs = 2 * itemsize * core + 4 * rows if factored else nbytes
    return products * full * HEAD_DIM, float(inputs + 2 * itemsize * core)


def map_bytes(case: Case, row: str, itemsize: int = 2) -> int:
    """Of a stored map without its padding: what reading or writing it once moves."""
    b, h, n = case.shape
    form, _ = split(row)
    if form == "dense":
        return b * h * n * n * itemsize
    return b * h * n * (n + 4) if form in ("uint8", "e4m3") else 0
