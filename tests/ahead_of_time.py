"""Compiles Triton's kernels for GPUs that are not there, as their launchers would launch them.

``launches`` runs an operation of the provider on tensors without memory and catches what it would
have launched; ``compiled`` compiles one of that. A plain module, so that worker processes can
import it. As a script, it writes what every case takes on every target, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from psvit_kernels.codes import CODES
from psvit_kernels.maps import row_pitch
from psvit_kernels.triton import capability as capability_of
from psvit_kernels.triton import launch, provider
from psvit_kernels.triton.exponentials import exponentials

#: Bytes of shared memory that one program may have.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """One kernel with all of its arguments, the configuration's among them."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    name: str


class Compiled(NamedTuple):
    name: str
    registers: int
    stack: int
    shared: int
    assembly: str


def launches(call: Callable[[], object], capability: tuple[int, int]) -> list[Launch]:
    """What ``call`` launches on such a GPU, once for each configuration of its table."""
    caught: list[Launch] = []
    capability_of.cache_clear()  # it remembers the GPU that was asked for before

    def catch(kernel, grid, arguments, configs, key):
        for config in configs:
            caught.append(_launch(kernel, arguments, config))
            assert all(n > 0 for n in grid({**arguments, **config.all_kwargs()}))

    with (
        patch.object(launch, "run", catch),
        patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        torch.device("meta"),
    ):
        call()
    return caught


def _launch(kernel: Any, arguments: dict[str, Any], config: triton.Config) -> Launch:
    arguments = {**arguments, **config.kwargs}
    while not isinstance(kernel, triton.JITFunction):  # heuristics around it
        for name, value in kernel.values.items():
            arguments[name] = value(arguments)
        kernel = kernel.fn
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    name = f"{kernel.__name__} {config.kwargs | options}"
    return Launch(kernel, arguments, options, name)


def compiled(one: Launch, target: GPUTarget) -> Compiled:
    """With Triton's own specialisation: 1 is a constant, multiples of 16 are known to be such."""
    constants: dict[tuple[int, ...], Any] = {}
    multiples: dict[tuple[int, ...], Any] = {}

    def kind(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(kind((*path, i), item) for i, item in enumerate(value))
        found = _kind(value)
        if found.startswith("*") or (found.startswith("i") and value % 16 == 0):
            multiples[path] = [["tt.divisibility", 16]]
        if found == "constexpr":
            constants[path] = value
        return found

    signature = {}
    for i, parameter in enumerate(one.kernel.params):
        value = one.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", value
        else:
            signature[parameter.name] = kind((i,), value)
    source = ASTSource(one.kernel, signature, constexprs=constants, attrs=multiples)
    result = triton.compile(source, target=target, options=one.options)
    if target.backend != "cuda":
        return Compiled(one.name, 0, 0, result.metadata.shared, result.asm["amdgcn"])
    registers, stack = _resources(result.asm["cubin"])
    return Compiled(one.name, registers, stack, result.metadata.shared, result.asm["ptx"])


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack and local memory: where spills go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    usage = dict(item.split(":")[:2] for item in line.split() if ":" in item)
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


# --- what is compiled -------------------------------------------------------------------------

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _qkv(n: int, dtype: torch.dtype, d: int = 64) -> list[Tensor]:
    """Views of one projection, (B, N, 3 H d), as models have them."""
    return list(torch.empty(64, n, 3, 12, d, dtype=dtype).permute(2, 0, 3, 1, 4))


def _attention(n: int, dtype: torch.dtype, dense: bool, d: int = 64, bias: bool = False) -> None:
    q, k, v = _qkv(n, dtype, d)
    b = torch.empty(12, n, n, dtype=dtype).expand(64, 12, n, n) if bias else None
    provider.attention(q, k, v, b, 0.125, dense)


def _quantized(n: int, code: torch.dtype) -> None:
    provider.attention_quantized(*_qkv(n, BF16), None, 0.125, code)


def _backward(
    n: int, dtype: torch.dtype, pairs: int, stored: bool, d: int = 64, bias: bool = False
) -> None:
    q, k, v = _qkv(n, dtype, d)
    out = torch.empty(64, n, 12, d, dtype=dtype)
    lse = torch.empty(64, 12, n)
    storage = torch.empty(64, 12, n, row_pitch(n, q.element_size()), dtype=dtype)
    b = torch.empty(12, n, n, dtype=dtype).expand(64, 12, n, n) if bias else None
    provider.attention_backward(
        out, None, lse if pairs else None, [out] * pairs, [v] * pairs, q, k, v, b, 0.125,
        storage if stored else q.new_empty(0), lse, out, bias,
    )  # fmt: skip


def _applied(n: int, form: str, dtype: torch.dtype = BF16, all_options: bool = False) -> tuple:
    """The tensors of the map, and all that follows of an application."""
    q, k, v = _qkv(n, dtype)
    if form == "dense":
        m: tuple = (torch.empty(64, 12, n, row_pitch(n, q.element_size()), dtype=dtype),)
    elif form == "factored":
        m = (q, k, torch.empty(64, 12, n), None, 0.125)
    else:
        codes = torch.empty(64, 12, n, row_pitch(n, 1), dtype=CODES[form])
        m = (codes, torch.empty(64, 12, n))
    rest = (None, None, 0.0, None)
    if all_options:
        seed = torch.empty(1, dtype=torch.int64)
        rest = (list(range(12)), torch.empty(12, 3), 0.1, seed)
    return (*m, v, *rest)


def _apply(n: int, form: str, dtype: torch.dtype = BF16, all_options: bool = False) -> None:
    op = form if form in ("dense", "factored") else "quantized"
    getattr(provider, f"apply_{op}")(*_applied(n, form, dtype, all_options), [])


def _apply_backward(n: int, form: str, linked: bool, dtype: torch.dtype = BF16) -> None:
    op = form if form in ("dense", "factored") else "quantized"
    arguments = _applied(n, form, dtype)
    out = torch.empty(64, n, 12, 64, dtype=dtype)
    more = (linked, False, out) if form == "factored" else (linked, out)
    getattr(provider, f"apply_{op}_backward")(out, *arguments, *more)


def _pool(kind: str, norm: bool, dtype: torch.dtype = BF16, c: int = 768) -> tuple:
    residual = torch.empty(64, 197, c, dtype=dtype)
    window = ([1, 1], [2, 2], [0, 0]) if kind == "stride" else ([3, 3], [2, 2], [1, 1])
    groups = 1 if kind == "dense" else c
    weight = torch.empty(c, c // groups, 3, 3, dtype=dtype)
    conv = (weight, torch.empty(c, dtype=dtype), groups)
    conv = conv if kind in ("conv", "dense") else (None, None, 1)
    norms = (torch.empty(c, dtype=dtype), torch.empty(c, dtype=dtype)) if norm else (None, None)
    kind = "conv" if kind == "dense" else kind
    return torch.empty(64, 197, c, dtype=dtype), residual, [14, 14], 1, kind, *window, *conv, *norms


def _pool_forward(*case: Any) -> None:
    provider.token_pool(*_pool(*case), 1e-6)


def _pool_backward(kind: str, norm: bool, dtype: torch.dtype = BF16) -> None:
    provider.token_pool_backward(
        torch.empty(64, 50, 768, dtype=dtype), *_pool(kind, norm, dtype), 1e-6
    )


def _match(n: int, heads: int, d: int, r: int, dtype: torch.dtype = BF16) -> None:
    provider.match_tokens(torch.empty(64, heads, n, d, dtype=dtype), r, 1, torch.empty(64, n))


def _merge(c: int, everything: bool, backward: bool, dtype: torch.dtype = BF16) -> None:
    n, m = 197, 184
    x, g = torch.empty(64, n, c, dtype=dtype), torch.empty(64, m, c, dtype=dtype)
    into, order, starts = (torch.empty(64, size, dtype=torch.int64) for size in (n, n, m + 1))
    more = (x, torch.empty(64, n), torch.empty(c), torch.empty(c)) if everything else (None,) * 4
    residual, weights, *norm = more
    if backward:
        norm = [None, None]  # PyTorch's own
        arguments = (x, residual, into, order, starts, weights, *norm, 1e-6, torch.empty(64, m))
        provider.merge_tokens_backward(*arguments, g, None, None, False)
    else:
        provider.merge_tokens(x, residual, into, order, starts, weights, *norm, 1e-6)


def _reduce_map(n: int, m: int, shares: bool, dtype: torch.dtype = BF16) -> None:
    order, starts = (torch.empty(64, size, dtype=torch.int64) for size in (n, m + 1))
    means = torch.empty(64, n)
    storage = torch.empty(64, 6, n, row_pitch(n, dtype.itemsize), dtype=dtype)
    provider.reduce_map(storage, n, order, starts, means, means if shares else None)


CASES: dict[str, Callable[[], None]] = {
    "attention, 197": partial(_attention, 197, BF16, False),
    "attention, dense map, 197": partial(_attention, 197, BF16, True),
    "attention, dense map, 257": partial(_attention, 257, BF16, True),
    "attention, dense map, 577": partial(_attention, 577, BF16, True),
    "attention, dense map, 197, d = 128": partial(_attention, 197, BF16, True, 128),
    "attention, 577, d = 128": partial(_attention, 577, BF16, False, 128),
    "attention, dense map, bias, 197": partial(_attention, 197, F16, True, 64, True),
    "attention, bias, 1025": partial(_attention, 1025, BF16, False, 64, True),
    "attention, dense map, 197, float32": partial(_attention, 197, F32, True),
    "attention, dense map, 577, float32": partial(_attention, 577, F32, True),
    "attention, uint8 map, 197": partial(_quantized, 197, torch.uint8),
    "attention, uint8 map, 577": partial(_quantized, 577, torch.uint8),
    "attention, e4m3 map, 197": partial(_quantized, 197, torch.float8_e4m3fn),
    "attention, e4m3 map, 577": partial(_quantized, 577, torch.float8_e4m3fn),
    "attention backward, 577": partial(_backward, 577, BF16, 0, False),
    "attention backward, stored map, 197": partial(_backward, 197, BF16, 0, True),
    "attention backward, group of 3, 197": partial(_backward, 197, BF16, 2, True),
    "attention backward, group of 4, factored, 577": partial(_backward, 577, F16, 3, False),
    "attention backward, group of 3, d = 128": partial(_backward, 197, BF16, 2, True, 128),
    "attention backward, bias": partial(_backward, 577, BF16, 0, False, 64, True),
    "attention backward, group of 3, float32": partial(_backward, 197, F32, 2, True),
    "apply, dense, 197": partial(_apply, 197, "dense"),
    "apply, dense, 1025, float16": partial(_apply, 1025, "dense", F16),
    "apply, dense, 577, float32": partial(_apply, 577, "dense", F32),
    "apply, dense, 197, with everything": partial(_apply, 197, "dense", BF16, True),
    "apply, uint8, 577": partial(_apply, 577, "uint8"),
    "apply, e4m3, 577": partial(_apply, 577, "e4m3"),
    "apply, factored, 1025": partial(_apply, 1025, "factored"),
    "apply, factored, 577, with everything": partial(_apply, 577, "factored", F16, True),
    "apply backward, dense, linked": partial(_apply_backward, 197, "dense", True),
    "apply backward, dense": partial(_apply_backward, 577, "dense", False),
    "apply backward, uint8": partial(_apply_backward, 577, "uint8", True),
    "apply backward, factored, linked": partial(_apply_backward, 577, "factored", True),
    "apply backward, factored": partial(_apply_backward, 577, "factored", False),
    "apply backward, dense, linked, float32": partial(_apply_backward, 197, "dense", True, F32),
    "match, 197": partial(_match, 197, 6, 64, 13),
    "match, 577, d = 80": partial(_match, 577, 16, 80, 40),
    "match, 197, float32": partial(_match, 197, 6, 64, 13, F32),
    "merge, 384": partial(_merge, 384, False, False),
    "merge, 768, with everything": partial(_merge, 768, True, False),
    "merge, 1024, with everything, float32": partial(_merge, 1024, True, False, F32),
    "merge backward, 768, weights": partial(_merge, 768, True, True),
    "reduce map, 197": partial(_reduce_map, 197, 184, False),
    "reduce map, 577, shares": partial(_reduce_map, 577, 537, True),
    "reduce map, 197, float32": partial(_reduce_map, 197, 184, False, F32),
    "exponentials": lambda: exponentials(torch.empty(4096, 4096)),
    "pool, max": partial(_pool_forward, "max", False),
    "pool, max, norm": partial(_pool_forward, "max", True),
    "pool, avg, norm": partial(_pool_forward, "avg", True),
    "pool, depthwise, norm": partial(_pool_forward, "conv", True),
    "pool, depthwise, norm, float32": partial(_pool_forward, "conv", True, F32),
    "pool, dense convolution": partial(_pool_forward, "dense", True),
    "pool backward, max, norm": partial(_pool_backward, "max", True),
    "pool backward, avg": partial(_pool_backward, "avg", False),
    "pool backward, depthwise, norm": partial(_pool_backward, "conv", True),
}


def compiled_case(name: str, backend: str, architecture: int | str, warp: int) -> list[Compiled]:
    """Every kernel and configuration of a case for one target."""
    target = GPUTarget(backend, architecture, warp)
    capability = divmod(architecture, 10) if isinstance(architecture, int) else (9, 4)
    return [compiled(one, target) for one in launches(CASES[name], capability)]


TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def main(output: Path) -> None:
    """Writes registers, bytes of stack (spills) and of shared memory, or why there are none."""
    table: dict[str, dict[str, Any]] = {target: {} for target in TARGETS}
    for target, where in TARGETS.items():
        for case in CASES:
            try:
                found = compiled_case(case, *where)
            except triton.CompilationError as error:
                table[target][case] = str(error).splitlines()[-1]
                continue
            sizes = [one._asdict() for one in found]
            table[target][case] = [
                {key: value for key, value in one.items() if key != "assembly"} for one in sizes
            ]
    result = {"triton": triton.__version__, "targets": table}
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
