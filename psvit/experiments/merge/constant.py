"""What a trained ViT-Tiny keeps when tokens are merged, beside the algorithm in plain PyTorch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accelerate import convert_quietly
from ..bench.merging import plain_merge
from ..console import progress as console_progress
from ..schedule import ATTEND, Schedule
from ..timing import interleaved, waiting
from . import convert
from .runs import Progress, about, check_folder, write_json

#: Pairs that every layer merges.
COUNTS = (8, 13, 16)


@dataclass(frozen=True)
class Settings:
    """What ``run`` does.

    Args:
        data: as for ``psvit.experiments.convert``.
        device: "cpu" or "cuda".
    """

    data: str
    device: str = "cpu"

    def common(self) -> dict[str, Any]:
        return about("merge", {**asdict(self), "data": Path(self.data).name})


def run(settings: Settings, output: Path, progress: Progress = console_progress) -> dict[str, Any]:
    """Merges and reports, in float32.

    Returns:
        What ``results.json`` holds: ``rows``, each with accuracies (0 to 1), the part of the images
        that both versions say the same of, FLOPs and latencies as parts of the original's.

    Raises:
        ValueError: as ``check``.
        OSError: the data can't be read, the folder can't be written.
    """
    started = time.perf_counter()
    check(settings, output)
    torch.set_num_threads(convert.THREADS)
    model, _, report = convert.loaded(settings.data, settings.device)
    with progress("merging", len(COUNTS)) as step:
        rows = []
        for r in COUNTS:
            rows.append(_row(model, report, r))
            step(1)
    original = report.row(Schedule(ATTEND * convert.DEPTH), model)
    results = {
        **settings.common(),
        "report_images": len(report.images),
        "original": original["accuracy"],
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    return results


def check(settings: Settings, output: Path) -> None:
    """Raises ValueError for data that aren't there, or a folder with other runs."""
    convert.check_data(settings.data, settings.device)
    check_folder(output, settings.common())


def _row(model: nn.Module, report: convert.Report, r: int) -> dict[str, Any]:
    schedule = Schedule(ATTEND * convert.DEPTH)
    fast, plain = convert_quietly(model, schedule, merge=r).eval(), Plain(model, r).eval()
    found, same = report.classes(fast), report.classes(plain)
    return {
        "merge": r,
        "accuracy": float((found == report.labels).double().mean()),
        "plain_accuracy": float((same == report.labels).double().mean()),
        "same": float((found == same).double().mean()),
        "flops": schedule.flops(model, merge=r) / schedule.flops(model),
        "latency": _latencies(model, fast, plain, report),
    }


@torch.inference_mode()
def _latencies(
    model: nn.Module, fast: nn.Module, plain: nn.Module, report: convert.Report
) -> dict[str, dict[str, float]]:
    """By the number of images, of both versions: parts of the original's, all in turn."""
    images, found = report.images.to(report.device), {}
    models = {"original": model, "psvit": fast, "plain": plain}
    for batch in convert.BATCHES[report.device.type]:
        some = images[:batch]
        calls = {k: waiting(partial(m, some), report.device) for k, m in models.items()}
        times = interleaved(calls, seconds=convert.SECONDS)
        base = times.pop("original").median
        found[str(batch)] = {name: each.median / base for name, each in times.items()}
    return found


class Plain(nn.Module):
    """timm's ViT with a class token, Token Merging written in plain PyTorch.

    Better than usual: what size there is goes as a mask to PyTorch's fused attention.

    Args:
        model: timm's, plain: no layer scale, no norm of queries and keys.
        r: pairs that every layer merges.
    """

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, images: Tensor) -> Tensor:
        """Class scores `(B, classes)`."""
        model: Any = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes, mask = x.new_ones(x.shape[:2]), None
        for block in model.blocks:
            attn = block.attn
            fused = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1))
            q, k, v = fused.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + attn.proj(out.transpose(1, 2).flatten(2))
            x, sizes = plain_merge(x, k, sizes, min(self.r, (x.shape[1] - 1) // 2))
            mask = sizes.log()[:, None, None]
            x = x + block.mlp(block.norm2(x))
        return model.forward_head(model.norm(x))
