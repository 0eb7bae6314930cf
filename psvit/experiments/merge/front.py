"""Whether sharing attention pays beside merging: accuracy and FLOPs with it and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...accelerate import convert_quietly
from ...calibrate import calibrate
from ...planning.score import Held, split
from ...schedule import ATTEND, SHARE, Schedule
from .. import convert

#: Pixels of a side, by the name of the part: 197 and 577 tokens.
SIDES = {"197 tokens": 224, "577 tokens": 384}
#: To fit to and to choose by; fewer where each takes longer.
IMAGES = {"197 tokens": 400, "577 tokens": 200}
#: Pairs that every layer merges, as a part of the tokens at the input: 8, 13, 16 and 20 of 197.
MERGED = (0.041, 0.066, 0.081, 0.102)
#: Layers that share a map which follows the tokens.
SHARED = (0, 1, 3)
#: Merged while it is found out which layers should share.
USUAL = MERGED[1]

Step = Callable[[float], object]


def rows(
    model: Any, images: Tensor, report: convert.Report, step: Step = lambda part: None
) -> list[dict[str, Any]]:
    """For each number of sharing layers and each number of pairs accuracy and FLOPs.

    Layers that share are corrected in closed form on ``images``, without labels. ``on_front`` says
    whether no other row has as few FLOPs and as good an accuracy.
    """
    tokens = 1 + model.patch_embed.num_patches
    counts = [round(part * tokens) for part in MERGED]
    prices = _prices(model, images, round(USUAL * tokens), step)
    found = []
    for shared in SHARED:
        schedule = _sharing(prices, shared)
        for r in counts:
            fast = _merged(model, schedule, r, images)
            row = report.row(schedule, fast)
            found.append({**row, "shared": shared, "merge": r, "flops": _flops(model, schedule, r)})
            step(1)
    for row in found:
        row["on_front"] = not any(_beats(other, row) for other in found)
    return found


def steps() -> int:
    """How often ``rows`` calls its step."""
    return convert.DEPTH - 1 + len(SHARED) * len(MERGED)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    better = (one["accuracy"], -one["flops"]), (other["accuracy"], -other["flops"])
    return better[0] != better[1] and all(a >= b for a, b in zip(*better, strict=True))


def _prices(model: nn.Module, images: Tensor, r: int, step: Step) -> dict[int, float]:
    """For each layer but the first: error that sharing adds beside merging, per FLOPs it saves.

    Each is corrected on some images and scored on the others.
    """
    some, held_out = split(images)
    held = Held(model, held_out)
    plain = _sharing({}, 0)
    base = held.score(_merged(model, plain, r, some)).error
    found = {}
    for layer in range(1, convert.DEPTH):
        schedule = _sharing({layer: 0.0}, 1)
        error = held.score(_merged(model, schedule, r, some)).error
        found[layer] = (error - base) / (_flops(model, plain, r) - _flops(model, schedule, r))
        step(1)
    return found


def _sharing(prices: dict[int, float], count: int) -> Schedule:
    """So many layers share, those with the lowest prices."""
    chosen = sorted(prices, key=lambda layer: prices[layer])[:count]
    kinds = (SHARE if layer in chosen else ATTEND for layer in range(convert.DEPTH))
    return Schedule("".join(kinds))


def _merged(model: nn.Module, schedule: Schedule, r: int, images: Tensor) -> nn.Module:
    if schedule.is_plain:
        return convert_quietly(model, schedule, merge=r).eval()
    fast, _ = calibrate(model, schedule, images, merge=r)
    return fast.eval()


def _flops(model: nn.Module, schedule: Schedule, r: int) -> float:
    """As a part of the original's."""
    return schedule.flops(model, merge=r) / Schedule(ATTEND * convert.DEPTH).flops(model)
