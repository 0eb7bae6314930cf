"""Shapes of equal FLOPs, on digits and on images of 32 x 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ..cost import layer_costs
from ..models.presets import PRESETS

#: Part of DeiT's FLOPs by which another shape may differ.
TOLERANCE = 0.02


class Shape(NamedTuple):
    """What ``PSViT`` needs to know of one."""

    schedule: str
    widths: tuple[int, ...]
    dims: Literal[1, 2]


class Task(NamedTuple):
    """Shapes of equal FLOPs by name, DeiT's first, and what is common to them."""

    shapes: Mapping[str, Shape]
    image: tuple[int, int, int]
    patch: int
    head_dim: int
    mlp_ratio: int


DEIT = "DeiT"


def _cifar(patch: int, one: Shape, two: Shape) -> Task:
    shapes = {DEIT: Shape("A" * 12, (192,), 1), "PSViT-1D": one, "PSViT-2D": two}
    return Task(shapes, (3, 32, 32), patch, head_dim=64, mlp_ratio=4)


def _preset(name: str) -> Shape:
    return Shape(**PRESETS[name].arguments())


# A token a pixel, the widths in the ratios of the presets. With patches of 2 the tiny presets are
# 3 % below DeiT-Ti: a layer that shares more brings them to it.
TASKS: Mapping[tuple[str, int], Task] = {
    ("digits", 1): Task(
        {
            DEIT: Shape("AAAA", (96,), 1),
            "PSViT-1D": Shape("AS|ASA|A", (96, 96, 128), 1),
            "PSViT-2D": Shape("AAS|AS|AS", (96, 128, 160), 2),
        },
        (1, 8, 8),
        patch=1,
        head_dim=32,
        mlp_ratio=2,
    ),
    ("packed", 2): _cifar(
        2,
        Shape("AASAASAA|AASAASAS|AA", (192, 192, 256), 1),
        Shape("AASAASAASA|ASASAS|AS", (192, 256, 320), 2),
    ),
    ("packed", 4): _cifar(4, _preset("psvit_1d_tiny"), _preset("psvit_2d_tiny")),
}


def model_of(task: Task, shape: Shape, classes: int) -> Any:
    from ..models.vit import PSViT

    channels, height, width = task.image
    return PSViT(
        shape.schedule,
        shape.widths,
        dims=shape.dims,
        img_size=(height, width),
        patch_size=task.patch,
        in_chans=channels,
        num_classes=classes,
        head_dim=task.head_dim,
        mlp_ratio=task.mlp_ratio,
    )


def costs(task: Task, classes: int) -> dict[str, dict[str, Any]]:
    """Tokens of each stage, parameters and FLOPs of each shape.

    Raises:
        ValueError: FLOPs that differ from DeiT's by more than ``TOLERANCE``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, shape in task.shapes.items():
        with torch.device("meta"):  # no weights are needed
            model = model_of(task, shape, classes)
        found[name] = {
            "schedule": shape.schedule,
            "widths": list(shape.widths),
            "tokens": [layout.tokens for layout in model.layouts()],
            "params": sum(p.numel() for p in model.parameters()),
            "flops": sum(row.flops for row in layer_costs(model, model.schedule)),
        }
        part = found[name]["flops"] / found[DEIT]["flops"]
        if abs(part - 1) > TOLERANCE:
            raise ValueError(f"shapes: {name} has {part:.3f} of DeiT's FLOPs, expected 1 ± 0.02")
    return found
