"""Whether sharing attention pays beside merging: accuracy and FLOPs with it and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...accelerate import convert_quietly
from ...calibrate import calibrate
from ...planning.score import Held, split
from ...schedule import ATTEND, SHARE, Schedule
from .. import convert


class Size(NamedTuple):
    """Pixels of a side, images to fit to (fewer where each takes longer), and numbers of layers
    that share a map which follows the tokens."""

    side: int
    images: int
    shared: tuple[int, ...]


#: By the name of the part.
SIZES = {"197 tokens": Size(224, 400, (0, 1, 3)), "577 tokens": Size(384, 200, (0, 1))}
#: Pairs that every layer merges, as a part of the tokens at the input: 8, 13, 16 and 20 of 197.
MERGED = (0.041, 0.066, 0.081, 0.102)
#: Merged while it is found out which layers should share.
USUAL = MERGED[1]

Step = Callable[[float], object]


def rows(
    model: Any,
    images: Tensor,
    report: convert.Report,
    prices: dict[int, float],
    shared: Sequence[int],
    step: Step = lambda part: None,
) -> list[dict[str, Any]]:
    """For each number of sharing layers and each number of pairs accuracy and FLOPs.

    Layers that share are corrected in closed form on ``images``, without labels. ``on_front`` says
    whether no other row has as few FLOPs and as good an accuracy.

    Args:
        prices: of layers, from ``prices``: the cheapest share.
        shared: numbers of sharing layers.
    """
    counts = [round(part * tokens(model)) for part in MERGED]
    found = []
    for count in shared:
        schedule = _sharing(prices, count)
        for r in counts:
            fast = _merged(model, schedule, r, images)
            row = report.row(schedule, fast)
            found.append(
                {**row, "shared": count, "merge": r, "flops": report.flops(schedule, merge=r)}
            )
            step(1)
    for row in found:
        row["on_front"] = not any(_beats(other, row) for other in found)
    return found


def tokens(model: Any) -> int:
    """At the input."""
    return 1 + model.patch_embed.num_patches


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    better = (one["accuracy"], -one["flops"]), (other["accuracy"], -other["flops"])
    return better[0] != better[1] and all(a >= b for a, b in zip(*better, strict=True))


def prices(model: nn.Module, images: Tensor, step: Step = lambda part: None) -> dict[int, float]:
    """For each layer but the first: error that sharing adds beside merging, per FLOPs it saves.

    Each is corrected on some images and scored on the others.
    """
    r = round(USUAL * tokens(model))
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
