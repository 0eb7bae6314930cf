"""A whole network of timm, compiled: under a schedule or with tokens merged, beside the unconverted
one with its fused attention, and beside the merging that people write in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from psvit import Schedule
from psvit.accelerate import convert_quietly
from psvit.experiments.merge.plain import Plain
from psvit.schedule import ATTEND
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
    assert case.network is not None
    host = _host(case.network, side).to(device, dtype)
    images = [torch.randn(batch, 3, side, side, dtype=dtype, device=device) for _ in range(sets)]

    @cache
    def converted(form: str) -> tuple[nn.Module, Callable]:
        """Also compiled, once for all providers: they are chosen call by call."""
        schedule, pairs = _plan(host, form)
        fast = convert_quietly(host, schedule, merge=pairs)
        return fast, compiled(fast)

    def subject(form: str) -> Subject:
        return _subject(host, form, *converted(form), images)

    def baseline(name: str) -> Contender:
        function = _baseline(host, name)
        return Contender([partial(function, x) for x in images])

    forms = dict.fromkeys(split(row)[0] for row in case.rows)
    return Work(
        {form: partial(subject, form) for form in forms},
        {name: partial(baseline, name) for name in case.baselines},
    )


def _host(name: str, side: int) -> nn.Module:
    import timm

    return timm.create_model(name, img_size=side).eval()


def _plan(host: Any, form: str) -> tuple[Schedule, int]:
    """The schedule that a row names, and how many pairs each layer merges."""
    plain = ATTEND * len(host.blocks)
    kind, _, pairs = form.partition("=")
    return (Schedule(plain), int(pairs)) if kind == "merge" else (Schedule.parse(form), 0)


def _baseline(host: nn.Module, name: str) -> Callable:
    kind, _, which = name.partition("/")
    return compiled(Plain(host, int(which))) if kind == "plain" else _pinned(host, which)


def _pinned(host: nn.Module, name: str) -> Callable:
    """Its attention's backend is pinned inside, where the compiler sees it."""
    backend = BACKENDS[name]

    def unconverted(x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return host(x)

    return compiled(unconverted)


def _subject(
    host: nn.Module, form: str, fast: nn.Module, call: Callable, images: Sequence[Tensor]
) -> Subject:
    schedule, pairs = _plan(host, form)
    before = Schedule(ATTEND * schedule.depth).flops(host)
    after = schedule.flops(host, merge=pairs)
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
