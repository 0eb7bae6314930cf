"""Merging as ``psvit.plan`` spreads it over the layers, and what distillation adds."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from ...distill import Distillation, distill
from ...planning.plan import Plan
from ...planning.run import plan
from .. import convert

#: What is asked for; the first is distilled too.
BUDGETS = ("flops<=0.48", "flops<=0.6")
#: Of the distillation.
STEPS = 60


def rows(model: nn.Module, images: Tensor, report: convert.Report) -> list[dict[str, Any]]:
    """For each budget what was chosen, accuracy, agreement, FLOPs and the seconds that it took."""
    found = []
    for budget in BUDGETS:
        started = time.perf_counter()
        made = plan(model, images, budget)
        found.append(_row(budget, model, made, report, time.perf_counter() - started))
        if budget == BUDGETS[0]:
            started = time.perf_counter()
            tuned = distill(model, made, images, Distillation(steps=STEPS))
            seconds = time.perf_counter() - started
            found.append(_row(f"{budget}, distilled", model, tuned, report, seconds))
    return found


def _row(
    name: str, model: nn.Module, made: Plan, report: convert.Report, seconds: float
) -> dict[str, Any]:
    return {
        "name": name,
        **report.row(made.schedule, made.apply(model).eval()),
        "merge": list(made.merge),
        "protect": made.protect,
        "flops": report.flops(made.schedule, pool=made.pool, dims=made.dims, merge=made.merge),
        "seconds": round(seconds, 1),
    }
