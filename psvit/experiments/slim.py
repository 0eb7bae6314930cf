"""What a trained ViT-Tiny keeps under EViT and Evo-ViT, whose scores need no training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..slimming import evit, evo_vit
from ..stack import find_stack
from .convert import Report

#: Method and the part of the patches that each selection keeps.
METHODS: dict[str, Callable[..., nn.Module]] = {"EViT": evit, "Evo-ViT": evo_vit}
KEPT = {"EViT": (0.9, 0.8, 0.7, 0.5), "Evo-ViT": (0.7, 0.5)}


def rows(
    model: nn.Module, report: Report, step: Callable[[int], object] = lambda count: None
) -> list[dict[str, Any]]:
    """One for each method and part kept, at the layers of the papers.

    Args:
        model: timm's, as ``psvit.experiments.convert.loaded`` gives it.
        report: images that are reported on.
        step: called after each row.

    Returns:
        ``method``, ``keep``, ``accuracy`` and ``agreement`` with the original (0 to 1), ``flops``
        as a part of the original's.
    """
    found = []
    for name, parts in KEPT.items():
        for keep in parts:
            slim = METHODS[name](model, keep)
            classes = report.classes(slim)
            schedule = find_stack(slim).schedule
            found.append(
                {
                    "method": name,
                    "keep": keep,
                    "accuracy": report.accuracy(classes),
                    "agreement": float((classes == report.reference).double().mean()),
                    "flops": schedule.flops(slim) / schedule.flops(model),
                }
            )
            step(1)
    return found
