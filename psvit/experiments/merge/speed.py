"""How much of what merging saves in FLOPs larger models save in time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerate import convert_quietly
from ...schedule import ATTEND, Schedule
from ...timing import interleaved, waiting
from .plain import Plain

#: timm's names, with random weights, and the pairs that every layer merges.
MODELS = {"deit_small_patch16_224": 13, "vit_base_patch16_224": 13}
#: Images of a call.
BATCHES = {"cpu": (1, 8), "cuda": (1, 32, 256)}
#: Spent on each latency.
SECONDS = 30.0


def rows(device: str) -> list[dict[str, Any]]:
    """For each model FLOPs and latencies, as parts of the original's."""
    return [_row(name, r, torch.device(device)) for name, r in MODELS.items()]


def _row(name: str, r: int, device: torch.device) -> dict[str, Any]:
    import timm

    model: Any = timm.create_model(name).eval().to(device)
    schedule = Schedule(ATTEND * len(model.blocks))
    fast, plain = convert_quietly(model, schedule, merge=r).eval(), Plain(model, r).eval()
    images = torch.randn(max(BATCHES[device.type]), 3, *model.patch_embed.img_size, device=device)
    return {
        "model": name,
        "merge": r,
        "flops": schedule.flops(model, merge=r) / schedule.flops(model),
        "latency": parts(model, fast, plain, images),
    }


@torch.inference_mode()
def parts(
    model: nn.Module, fast: nn.Module, plain: nn.Module, images: Tensor
) -> dict[str, dict[str, float]]:
    """Latencies of ours and of plain PyTorch as parts of the original's, by number of images.

    In turn, in float32 on a CPU; in bfloat16 and compiled on a GPU.
    """
    models: dict[str, Any] = {"original": model, "psvit": fast, "plain": plain}
    if images.device.type == "cuda":
        images = images.bfloat16()
        models = {k: torch.compile(m.bfloat16()) for k, m in models.items()}
    found = {}
    for batch in BATCHES[images.device.type]:
        some = images[:batch]
        calls = {k: waiting(partial(m, some), images.device) for k, m in models.items()}
        times = interleaved(calls, seconds=SECONDS)
        base = times.pop("original").median
        found[str(batch)] = {name: each.median / base for name, each in times.items()}
    return found
