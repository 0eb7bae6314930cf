"""What runs here and why: ``python -m psvit_kernels``, and the first part of ``psvit info``."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from . import cpu, cuda, probe, registry
from .choice import scaled
from .maps import ROW_ALIGNMENT
from .triton import provider as triton

#: Distributions whose versions matter; none of them is imported to find out.
PACKAGES = (
    "psvit",
    "torch",
    "triton",
    "numpy",
    "timm",
    "transformers",
    "torchvision",
    "matplotlib",
    "scikit-learn",
    "safetensors",
)

#: Processor flags, as Linux and macOS name them, that the kernels or PyTorch can use.
FEATURES = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimddp",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def collect() -> dict[str, Any]:
    """Versions, processor, threads, providers and fallbacks, as plain values for JSON."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "threads": {
            "intra-op": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "openmp": _native("openmp"),
        },
        "providers": _providers(),
        "forced": registry.forced(),
        "fallbacks": dict(registry.fallbacks),
        "rates": _rates(),
        "limits": {
            "triton": "float32, bfloat16 and float16, head dim up to "
            f"{triton.MAX_HEAD_DIM}, compute capability {triton.MIN_CAPABILITY[0]}.0 and up; not "
            "run on hardware yet",
            "cuda": f"bfloat16 and float16, head dim a multiple of 8 up to {cuda.MAX_HEAD_DIM}, "
            f"attention of up to {cuda.MAX_TOKENS} tokens, dense and 8-bit maps, no gradients, "
            f"compute capability {cuda.MIN_CAPABILITY[0]}.0 and up; not run on hardware yet",
            "cpu": f"float32 and bfloat16, head dim up to {cpu.MAX_HEAD_DIM}; the reference serves "
            "the rest, down to float16 and up to float64, and 8-bit maps",
            "map rows": f"start on multiples of {ROW_ALIGNMENT} bytes",
        },
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    found["psvit"] = found["psvit"] or "run from its source folder"
    return found


def _processor() -> dict[str, Any]:
    model, flags = "unknown", set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except OSError:
        model = platform.processor() or "unknown"
    return {
        "model": model,
        "features": [name for name in FEATURES if name in flags],
        "in use by psvit": _native("isa"),
        "in use by torch": torch.backends.cpu.get_cpu_capability(),
    }


def _native(question: str) -> str | None:
    """What the compiled module answers, or None where there is none."""
    if cpu.missing() is not None:
        return None
    from . import _native as module

    return str(getattr(module, question)())


def _providers() -> dict[str, str]:
    found = {
        name: "ready" if missing is None else f"missing: {missing}"
        for name, missing in registry.providers().items()
    }
    if found["cuda"] == "ready":
        found["cuda"] = "ready when forced; not yet run on hardware"
    if cuda.compiled_for() is not None:
        found["cuda"] += f"; compiled for {cuda.compiled_for()}"
    return found


def _rates() -> dict[str, dict[str, float]]:
    """What was measured earlier of the devices that are here; nothing is measured now."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = {probe.device_key(d): probe.kept(d) for d in [torch.device("cpu"), *gpus]}
    return {device: rates for device, rates in found.items() if rates is not None}


def lines(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people: pairs of a name and a line of text, "" under the one above."""
    cpu_, threads = info["cpu"], info["threads"]
    versions = info["versions"]
    found = [f"{name} {version}" for name, version in versions.items() if version]
    absent = [name for name, version in versions.items() if not version]
    rows = [("versions", ", ".join(found))]
    if absent:
        rows.append(("not installed", ", ".join(absent)))
    rows += [
        ("system", info["system"]),
        ("processor", cpu_["model"]),
        ("features", " ".join(cpu_["features"]) or "unknown"),
        ("in use", f"psvit kernels: {cpu_['in use by psvit'] or 'none'}; torch: "
         f"{cpu_['in use by torch']}"),
        ("threads", f"{threads['intra-op']} of {threads['processors']} processors"),
        ("OpenMP", threads["openmp"] or "not used: no compiled kernels"),
    ]  # fmt: skip
    rows += _under("providers", [f"{name}: {state}" for name, state in info["providers"].items()])
    rows.append(("forced", info["forced"] or "no: the first provider that can serve a call does"))
    served = [f"{count} x {reason}" for reason, count in info["fallbacks"].items()]
    rows += _under("fallbacks", served or ["none in this process"])
    rates = [
        f"{device}: copy {scaled(r['copy'])}B/s, exponentials {scaled(r['exp'])}/s, products "
        + ", ".join(f"{scaled(r[n])}FLOP/s {n}" for n in ("float32", "bfloat16", "float16"))
        for device, r in info["rates"].items()
    ]
    rows += _under("rates", rates or ["not measured yet: psvit_kernels.explain(...) does"])
    return rows + _under("limits", [f"{name}: {text}" for name, text in info["limits"].items()])


def _under(name: str, texts: list[str]) -> list[tuple[str, str]]:
    return [(name if i == 0 else "", text) for i, text in enumerate(texts)]


def show(info: Mapping[str, Any], *more: tuple[str, str]) -> None:
    """Prints the information, and further pairs, as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in [*lines(info), *more]:
        table.add_row(name, text)
    Console(highlight=False, markup=False).print(table)
