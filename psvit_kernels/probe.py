"""Three rates of a machine: how fast it copies, multiplies matrices and makes exponentials.

They are measured once, in about two seconds, and kept as JSON in the user's cache folder. Where
nothing may be measured (deterministic mode, a graph that is captured, tracing), what was kept
earlier or fixed assumptions serve; ``Rates.origin`` says which.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import storage


class Rates(NamedTuple):
    """What a device does in a second, and what else of it the choice of a form depends on."""

    copy: float  # bytes, read + written
    exp: float  # exponentials of float32
    float32: float  # FLOPs of large matrix products, by dtype
    bfloat16: float
    float16: float
    memory: float  # bytes, all that the device has
    origin: str  # where the rates come from

    def matrix(self, dtype: torch.dtype) -> float:
        known = {torch.bfloat16: self.bfloat16, torch.float16: self.float16}
        return self.float32 / 2 if dtype == torch.float64 else known.get(dtype, self.float32)


#: What is measured and kept.
_MEASURED = ("copy", "exp", "float32", "bfloat16", "float16")

#: What serves where nothing is measured, so that every process and machine chooses alike.
_ASSUMED = {
    # Measured elsewhere on one H200: copy, exp and bfloat16. float32: its data sheet. Memory: of a
    # smaller card, so that the choice fits that as well.
    "cuda": Rates(4.3e12, 3.7e12, 67e12, 790e12, 790e12, 24e9, "those of an H200"),
    # Measured on two cores of a server processor (EPYC, Zen 5). Half precision is computed in
    # float32 there.
    "cpu": Rates(
        70e9, 3.3e9, 200e9, 200e9, 200e9, 16e9, "those of two cores of a server processor"
    ),
}

#: Seconds and samples of one measurement.
_WARM_UP = 0.1
_SECONDS = 0.3
_SAMPLES = (3, 300)

_known: dict[str, Rates] = {}


def rates(device: torch.device | str, *, may_measure: bool = True) -> Rates:
    """The rates of a device, measured on the first call on a machine.

    Args:
        device: "cpu" and "cuda" are measured; assumptions serve for others.
        may_measure: False if this is no moment for it: what is known, or assumptions, serve.
    """
    device = torch.device(device)
    reason = _frozen(device)
    if reason is not None:
        return _assumed(device, reason)
    key = device_key(device)
    if key not in _known:
        found = kept(device)
        origin = "measured earlier, kept in the cache folder (psvit/rates.json)"
        if found is None:
            reason = _not_now(device) if may_measure else "nothing is measured while PyTorch traces"
            if reason is not None:
                return _assumed(device, reason)
            try:
                found, origin = _measure(device), "measured just now"
            except RuntimeError as error:  # no memory left, a device in an error state
                storage.warn_once(f"the rates of {key} could not be measured: {error}")
                return _known.setdefault(key, _assumed(device, "measuring failed"))
            storage.keep("rates", key, found)
        copy, exp, float32, bfloat16, float16 = (found[name] for name in _MEASURED)
        memory = _memory(device)
        _known[key] = Rates(copy, exp, float32, bfloat16, float16, memory, f"{origin}: {key}")
    return _known[key]


def _frozen(device: torch.device) -> str | None:
    """Why measured rates never serve for this device in this process, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic mode freezes the choice"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU here that PyTorch can use"
    return None if device.type in _ASSUMED else f"nothing is measured on {device.type}"


def _not_now(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "nothing is measured while a CUDA graph is captured"
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return "nothing is measured while PyTorch traces"
    return None


def _assumed(device: torch.device, reason: str) -> Rates:
    found = _ASSUMED[device.type if device.type in _ASSUMED else "cuda"]
    return found._replace(origin=f"assumed, {found.origin}: {reason}")


# --- what the device is -----------------------------------------------------------------------


def device_key(device: torch.device) -> str:
    """What rates are kept under: the device, PyTorch's version and, on a CPU, its threads."""
    return _key(device, torch.get_num_threads())


@cache
def _key(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{cpu_name()}, torch {torch.__version__}, {threads} threads"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@cache
def _memory(device: torch.device) -> float:
    """Bytes that it has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return _ASSUMED["cpu"].memory


# --- measuring ----------------------------------------------------------------------------------


class Work(NamedTuple):
    """Something to time, and how many bytes, FLOPs or exponentials one call of it is."""

    run: Callable[[], object]
    amount: float


def copy_work(device: torch.device | str, nbytes: int) -> Work:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2 * nbytes)


def matrix_work(device: torch.device | str, dtype: torch.dtype, size: int) -> Work:
    # A generator of its own: measuring changes no random number of the process.
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=random, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return Work(lambda: torch.mm(a, b, out=c), 2 * size**3)


def exp_work(device: torch.device) -> Work:
    from .triton import interpreting, provider

    if device.type == "cuda" and provider.missing() is None and not interpreting():
        from .triton.exponentials import ROUNDS, exponentials

        x = torch.ones(2**24, device=device)
        return Work(lambda: exponentials(x), ROUNDS * x.numel())
    # In the caches of a processor. On a GPU this is bound by memory, as is all that runs without
    # Triton there.
    x = torch.linspace(-8, 0, 2**18, device=device)
    out = torch.empty_like(x)
    return Work(lambda: torch.exp(x, out=out), x.numel())


def _measure(device: torch.device) -> dict[str, float]:
    gpu = device.type == "cuda"
    nearby = torch.cuda.device(device) if gpu else contextlib.nullcontext()
    with nearby, torch.no_grad(), torch.autocast(device.type, enabled=False):
        size = 8192 if gpu else 512
        float32 = _rate(device, matrix_work(device, torch.float32, size))
        found = {
            "copy": _rate(device, copy_work(device, 2**28 if gpu else 2**27)),
            "exp": _rate(device, exp_work(device)),
            "float32": float32,
            "bfloat16": float32,  # on a CPU half precision is computed in float32
            "float16": float32,
        }
        if gpu:
            for name in ("bfloat16", "float16"):
                found[name] = _rate(device, matrix_work(device, getattr(torch, name), size))
    return found


def _rate(device: torch.device, work: Work) -> float:
    sample = _sample_gpu if device.type == "cuda" else _sample_cpu
    sample(work)
    warm = time.monotonic() + _WARM_UP
    while time.monotonic() < warm:  # clocks rise under load only
        sample(work)
    samples: list[float] = []
    end, (few, most) = time.monotonic() + _SECONDS, _SAMPLES
    while len(samples) < few or (len(samples) < most and time.monotonic() < end):
        samples.append(sample(work))
    # On a CPU the fastest: others who use the machine only make it slower, by a hundred times where
    # threads wait for each other.
    time_of_one = statistics.median(samples) if device.type == "cuda" else min(samples)
    return work.amount / time_of_one


def _sample_cpu(work: Work) -> float:
    start = time.perf_counter()
    work.run()
    return max(time.perf_counter() - start, 1e-9)


def _sample_gpu(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work.run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1e3, 1e-9)


# --- keeping ------------------------------------------------------------------------------------


def kept(device: torch.device | str) -> dict[str, float] | None:
    """What was measured on this device earlier, by this or another process; measures nothing."""
    entry = storage.read("rates").get(device_key(torch.device(device)))
    if not isinstance(entry, dict) or not all(_is_rate(entry.get(name)) for name in _MEASURED):
        return None
    return {name: float(entry[name]) for name in _MEASURED}


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
