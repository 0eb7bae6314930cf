"""A whole network of timm, compiled: under a schedule, and unconverted with its fused attention."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from psvit import Schedule, accelerate
from psvit_kernels import use

from . import gate
from .contender import BACKENDS, Contender, Subject, Work, compiled
from .gate import Oracle
from .rows import Case, split

#: Images for which the oracle in float64 runs at a time.
STEP = 32


def build(case: Case, sets: int, device: str) -> Work:
    """Random weights: what a network computes doesn't matter to its speed."""
    batch, side, _ = case.shape
    dtype = getattr(torch, case.dtype)
    host = _host(case.kind.removeprefix("model-"), side).to(device, dtype)
    images = [torch.randn(batch, 3, side, side, dtype=dtype, device=device) for _ in range(sets)]

    @cache
    def converted(schedule: str) -> tuple[nn.Module, Callable]:
        """Also compiled, once for all providers: they are chosen call by call."""
        fast = _converted(host, schedule)
        return fast, compiled(fast)

    def subject(schedule: str) -> Subject:
        return _subject(host, schedule, *converted(schedule), images)

    def baseline(name: str) -> Contender:
        function = _pinned(host, name)
        return Contender([partial(function, x) for x in images])

    schedules = dict.fromkeys(split(row)[0] for row in case.rows)
    return Work(
        {schedule: partial(subject, schedule) for schedule in schedules},
        {name: partial(baseline, name) for name in case.baselines},
    )


def _host(name: str, side: int) -> nn.Module:
    import timm

    return timm.create_model(name, img_size=side).eval()


def _converted(host: nn.Module, schedule: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights need no fine-tuning
        return accelerate(host, schedule)


def _pinned(host: nn.Module, name: str) -> Callable:
    """Its attention's backend is pinned inside, where the compiler sees it."""
    backend = BACKENDS[name.split("/")[1]]

    def unconverted(x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return host(x)

    return compiled(unconverted)


def _subject(
    host: nn.Module, schedule: str, fast: nn.Module, call: Callable, images: Sequence[Tensor]
) -> Subject:
    plain = "A" * Schedule.parse(schedule).depth
    before, after = (Schedule.parse(text).flops(host) for text in (plain, schedule))
    calls = [partial(call, x) for x in images]
    exact = copy.deepcopy(fast).double()

    def oracle(part: slice) -> Oracle:
        x = images[0][part]
        with use("reference"):
            logits, eager = exact(x.double()), fast(x)
        return Oracle(
            {"logits": logits},
            {"logits": eager},
            {"logits": torch.full_like(logits, logits.abs().amax())},
        )

    return Subject(
        calls,
        # Its kernels have rows of their own, on memory that is NaN; in the mode that fills memory
        # it would be compiled a second time.
        check=lambda: gate.hold([{"logits": calls[0]()}], oracle, STEP),
        facts={
            "flops": float(len(images[0]) * after),
            "bytes": None,
            "flops_ratio": before / after,
        },
    )
