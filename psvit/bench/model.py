"""A whole DeiT-S, converted and not: does the speed-up keep what the FLOPs promise?"""

from __future__ import annotations

import copy
from typing import Any

import torch

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
        accelerate, flops_of = _library()
        host = _host(name, options)
        size = host.patch_embed.img_size
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
        fast = accelerate(copy.deepcopy(host), schedule).eval()
        exact = copy.deepcopy(fast).double()
        flops = flops_of(host, schedule)

        def reference(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            with use("reference"):
                return model(x)

        return Work(
            psvit=lambda: fast(images),
            baselines={UNCONVERTED: lambda: host(images)},
            exact=lambda: reference(exact, images.double()),
            eager=lambda: reference(fast, images),
            flops=batch * flops[1],
            nbytes=None,
            per=flops[0] / flops[1],
        )

    label = f"{name}/{schedule}/batch{batch}"
    return Case(label, torch.float32, {UNCONVERTED: Bar(0.95, 1.0)}, build)


def _library() -> tuple[Any, Any]:
    """``psvit.accelerate``, and FLOPs of one image before and after a schedule."""
    try:
        from psvit import Schedule, accelerate
    except ImportError as error:
        raise UnavailableError(f"psvit.accelerate is not there: {error}") from error

    def flops_of(host: torch.nn.Module, schedule: str) -> tuple[float, float]:
        plain = "A" * len(schedule.replace("|", ""))
        before, after = (float(Schedule.parse(s).flops(host)) for s in (plain, schedule))
        return before, after

    return accelerate, flops_of


def _host(name: str, options: dict[str, Any]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UnavailableError('needs timm: pip install "psvit[timm]"') from error
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options).eval()
