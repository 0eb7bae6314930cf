"""A whole DeiT-S, converted and not: does the speed-up keep what the FLOPs promise?"""

from __future__ import annotations

import copy
from typing import Any

import torch

from psvit import Schedule
from psvit.accelerate import convert_quietly
from psvit_kernels import use

from .cases import Bar, Case, UnavailableError, Work

UNCONVERTED = "unconverted, SDPA"

#: Attention sharing alone, and with two pools.
SCHEDULES = ("AASSASSSASSS", "AASA|ASAS|ASSS")


def model_cases() -> list[Case]:
    return [model_case(schedule, batch) for batch in (1, 8) for schedule in SCHEDULES]


def model_case(
    schedule: str, batch: int, name: str = "deit_small_patch16_224", **options: Any
) -> Case:
    """A timm model with random weights; its speed-up is divided by the ratio of FLOPs.

    Args:
        schedule: for ``psvit.accelerate``.
        batch: images at a time.
        name: of the timm model.
        options: for ``timm.create_model``.
    """

    def build() -> Work:
        host = _host(name, options)
        images = _images(batch, host.patch_embed.img_size)
        fast = _converted(host, schedule)
        exact = copy.deepcopy(fast).double()
        plain = "A" * Schedule.parse(schedule).depth
        before, after = (Schedule.parse(text).flops(host) for text in (plain, schedule))

        def reference(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            with use("reference"):
                return model(x)

        return Work(
            psvit=lambda: fast(images),
            baselines={UNCONVERTED: lambda: host(images)},
            exact=lambda: reference(exact, images.double()),
            eager=lambda: reference(fast, images),
            flops=float(batch * after),
            nbytes=None,
            per=before / after,
        )

    label = f"{name}/{schedule}/batch{batch}"
    return Case(label, torch.float32, {UNCONVERTED: Bar(0.95, 1.0)}, build)


def _host(name: str, options: dict[str, Any]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UnavailableError('needs timm: pip install "psvit[timm]"') from error
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options).eval()


def _images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def _converted(host: Any, schedule: str) -> Any:
    return convert_quietly(host, schedule)
