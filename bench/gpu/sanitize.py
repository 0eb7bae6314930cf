"""``python -m bench.gpu --sanitize``: each CUDA kernel on a small case under compute-sanitizer.

Each kernel and tool has a process of its own, ``python -m bench.gpu.sanitize KERNEL`` inside the
tool. Inputs are made on the CPU, so that nothing but the kernel runs on the device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psvit_kernels import AttentionMap, DenseMap, apply_attention, attention, token_pool, use

from . import machine
from .providers import serving
from .rows import AMPERE, CUDA, HOPPER, split
from .sharing_layer import Projection, fold, sharing_layer

FILE = "sanitizer.json"
TOOLS = ("memcheck", "racecheck")

#: Operation and form, and the provider with its family of kernels.
KERNELS = (
    *(
        f"{op}-{form} {provider}"
        for provider in (HOPPER, AMPERE)
        for op, forms in (
            ("apply", ("dense", "uint8", "e4m3")),
            ("attention", ("none", "dense", "uint8", "e4m3")),
        )
        for form in forms
    ),
    f"sharing-fused {HOPPER}",
    *(f"pool-{kind} {CUDA}" for kind in ("max", "avg", "stride", "depthwise")),
)

CLEAN, FOUND, FAILED, STUCK = "clean", "errors found", "did not run", "did not end"

#: Exit code of a process in which the tool found something.
ERRORS = 86

SECONDS = 120.0
AT_ONCE = 6

#: Of what a process printed: the end is kept.
KEPT = 4000

ROOT = Path(__file__).resolve().parents[2]


# --- the process inside the tool --------------------------------------------------------------


def small(kernel: str, device: str) -> Callable[[], object]:
    """A call of one kernel, ready to run where its provider is forced."""
    form, _ = split(kernel)
    op, form = form.split("-")
    if op == "pool":
        return _pool(form, device)
    if op == "sharing":
        return _sharing(device)
    fused = torch.randn(2, 197, 3, 3, 64).to(torch.bfloat16)
    q, k, v = fused.to(device).permute(2, 0, 3, 1, 4)
    if op == "attention":
        return lambda: attention(q, k, v, return_map=None if form == "none" else form)  # type: ignore[arg-type]
    with use("reference"):
        stored = attention(*fused.permute(2, 0, 3, 1, 4), return_map=form)[1]  # type: ignore[arg-type]
    assert stored is not None
    stored = _moved(stored, device)
    return lambda: apply_attention(stored, v)


def _sharing(device: str) -> Callable[[], object]:
    folded = fold(torch.nn.LayerNorm(192), torch.nn.Linear(192, 192).to(torch.bfloat16))
    projection = Projection(*(t.to(device) for t in folded))
    stored = DenseMap.from_dense(torch.randn(2, 3, 197, 197).softmax(-1).to(torch.bfloat16))
    x, moved = torch.randn(2, 197, 192).to(device, torch.bfloat16), _moved(stored, device)
    return lambda: sharing_layer(x, 1e-6, projection, moved)  # type: ignore[arg-type]


def _moved(stored: AttentionMap, device: str) -> AttentionMap:
    fields = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)}  # type: ignore[arg-type]
    tensors = {name: t.to(device) for name, t in fields.items() if isinstance(t, Tensor)}
    return dataclasses.replace(stored, **tensors)  # type: ignore[type-var]


def _pool(kind: str, device: str) -> Callable[[], object]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, torch.bfloat16)

    options: dict[str, Any] = {"kind": kind, "norm_weight": random(64), "norm_bias": random(64)}
    if kind == "depthwise":
        options |= {"kind": "conv", "weight": random(64, 1, 3, 3), "groups": 64}
    if kind == "stride":
        options |= {"kernel": 1, "padding": 0}
    x = random(2, 1 + 14 * 14, 64)
    return lambda: token_pool(x, (14, 14), prefix=1, **options)


def run(kernel: str, device: str) -> None:
    call = small(kernel, device)
    with serving(split(kernel)[1]), torch.no_grad():
        call()


# --- the process that starts the tool ----------------------------------------------------------


def find_tool() -> str | None:
    """On the PATH, or beside nvcc, or of CUDA_HOME."""
    nvcc = shutil.which("nvcc")
    folders = [] if nvcc is None else [Path(nvcc).resolve().parent]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def main(folder: Path) -> int:
    """0 if everything is clean, 1 if not, 2 if there is no tool; the file says which."""
    tool = find_tool()
    data = machine.describe() | {
        "schema": 1,
        "kind": "psvit sanitizer",
        "available": tool is not None,
    }
    data["kernels"] = {} if tool is None else examine(tool)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(data, indent=1) + "\n")
    if tool is None:
        print("compute-sanitizer: not available on this machine")
        return 2
    for kernel, found in data["kernels"].items():
        print(kernel, *(f"{name}: {result['status']}" for name, result in found.items()), sep="  ")
    results = [result for found in data["kernels"].values() for result in found.values()]
    return 0 if all(result["status"] == CLEAN for result in results) else 1


def examine(tool: str, kernels: Sequence[str] = KERNELS) -> dict[str, dict[str, Any]]:
    """What each tool says of each kernel."""

    def one(job: tuple[str, str]) -> dict[str, Any]:
        kernel, name = job
        command = [tool, "--tool", name, "--error-exitcode", str(ERRORS), "--launch-timeout", "0"]
        return _judge([*command, sys.executable, "-m", "bench.gpu.sanitize", kernel])

    jobs = [(kernel, name) for kernel in kernels for name in TOOLS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = dict(zip(jobs, pool.map(one, jobs), strict=True))
    return {kernel: {name: results[kernel, name] for name in TOOLS} for kernel in kernels}


def _judge(command: Sequence[str]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        printed = late.output or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return {"status": STUCK, "report": text[-KEPT:]}
    status = {0: CLEAN, ERRORS: FOUND}.get(done.returncode, FAILED)
    return {"status": status, "report": done.stdout[-KEPT:]}


if __name__ == "__main__":
    run(sys.argv[1], "cuda")
    torch.cuda.synchronize()
