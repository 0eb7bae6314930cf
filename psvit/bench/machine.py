"""The machine that a run was made on: what it is, and how fast it was seen to be."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import psvit
from psvit_kernels.probe import Work, copy_work, cpu_name, matrix_work

from .measure import interleave


@dataclass(frozen=True)
class Ceilings:
    """What this machine does: GFLOP/s of large matrix products by dtype, GB/s of a large copy."""

    matrix: dict[str, float]
    copy: float
    fma: float | None = None


def ceilings(
    threads: int,
    dtypes: tuple[str, ...] = ("float32",),
    size: int = 2048,
    before: Ceilings | None = None,
) -> Ceilings:
    """Measures, in this run, what the percentages in the table are percentages of.

    The fastest of some rounds counts: others who use the machine only make it slower. With
    ``before``, what was seen earlier in the run, the higher of both.
    """
    matrix = {name: _rate(matrix_work("cpu", getattr(torch, name), size)) for name in dtypes}
    seen = Ceilings(matrix, _rate(copy_work("cpu", 32 * size**2)), _fma_rate(threads))
    return seen if before is None else _higher(seen, before)


def _higher(a: Ceilings, b: Ceilings) -> Ceilings:
    matrix = {name: max(rate, b.matrix.get(name, 0.0)) for name, rate in a.matrix.items()}
    return Ceilings(matrix, max(a.copy, b.copy), max(a.fma or 0.0, b.fma or 0.0) or None)


def _rate(work: Work) -> float:
    """In a nanosecond, the fastest."""
    return work.amount / float(interleave({"": work.run}, rounds=9)[0][""].min())


def _fma_rate(threads: int) -> float | None:
    """GFLOP/s of fused multiply-adds in registers, if the compiled module can measure it."""
    try:
        from psvit_kernels import _native
    except ImportError:
        return None
    peak = getattr(_native, "peak_gflops", None)
    return max(float(peak(threads)) for _ in range(5)) if peak else None


# --- what it is -------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The kind of machine; nothing that names this one."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
    }


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), "torch": torch.__version__} | {
        name: _version(name) for name in ("psvit", "numpy", "timm")
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, with "-dirty" if files differ from it, where psvit runs from a checkout."""
    root = Path(psvit.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
