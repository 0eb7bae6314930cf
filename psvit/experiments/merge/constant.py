"""The same number of pairs in every layer, beside the algorithm in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...accelerate import convert_quietly
from ...schedule import ATTEND, Schedule
from .. import convert
from .plain import Plain
from .speed import parts

#: Pairs that every layer merges.
COUNTS = (8, 13, 16)


def rows(model: nn.Module, report: convert.Report) -> list[dict[str, Any]]:
    """For each number accuracies (0 to 1), the part of the images that both versions say the same
    of, FLOPs and latencies as parts of the original's."""
    return [_row(model, report, r) for r in COUNTS]


def _row(model: nn.Module, report: convert.Report, r: int) -> dict[str, Any]:
    schedule = Schedule(ATTEND * convert.DEPTH)
    fast, plain = convert_quietly(model, schedule, merge=r).eval(), Plain(model, r).eval()
    found, same = report.classes(fast), report.classes(plain)
    return {
        "merge": r,
        "accuracy": report.accuracy(found),
        "plain_accuracy": report.accuracy(same),
        "same": float((found == same).double().mean()),
        "flops": report.flops(schedule, merge=r),
        "latency": parts(model, fast, plain, report.images.to(report.device)),
    }
