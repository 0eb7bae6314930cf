"""The machine of a session: what it is, and how fast it was seen to be in this session."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import psvit_kernels
from psvit.bench import machine as host
from psvit_kernels import probe

from .session import Clock

#: Large enough that neither the cache nor the start of a kernel matters.
COPY_BYTES = 2**31
MATRIX_SIZE = 8192

#: Samples of each rate; the median counts.
SAMPLES = 11


def describe() -> dict[str, Any]:
    """For the file: device, host, versions and commit; nothing that names this one machine."""
    seen = torch.cuda.get_device_properties(0)
    device = {
        "name": seen.name,
        "compute_capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
        "cache_bytes": seen.L2_cache_size,
        "driver": _driver(),
    }
    return {
        "device": device,
        "machine": host.machine(),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str | None]:
    return host.versions() | {"triton": _version("triton"), "cuda": torch.version.cuda}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def commit() -> str:
    """Of the checkout; or PSVIT_COMMIT; or a digest of the operations' sources."""
    return host.commit() or os.environ.get("PSVIT_COMMIT") or _digest()


def _digest() -> str:
    folder = Path(psvit_kernels.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return f"sources-{digest.hexdigest()[:12]}"


# --- how fast ---------------------------------------------------------------------------------


def rates(
    clock: Clock, device: str = "cuda", copied: int = COPY_BYTES, size: int = MATRIX_SIZE
) -> dict[str, Any]:
    """What the percentages are percentages of; the copy counts bytes read and bytes written."""
    matrix = {
        name: _rate(clock, probe.matrix_work(device, getattr(torch, name), size))
        for name in ("bfloat16", "float16")
    }
    copy = _rate(clock, probe.copy_work(device, copied))
    exp = _rate(clock, probe.exp_work(torch.device(device)))
    clock.release()
    return {"copy_bytes_per_s": copy, "matrix_flops_per_s": matrix, "exp_per_s": exp}


def _rate(clock: Clock, work: probe.Work) -> float:
    calls = [work.run] * 3
    clock.warm_up(calls)
    sample = clock.captured(calls)
    return 1e6 * work.amount / statistics.median(sample() for _ in range(SAMPLES))
