"""Which form of a map is fastest, and the arithmetic behind it.

A map is made once, by the kernel that computes the output of its own layer, and applied by
``reuses`` layers. The time of one kernel is

    tensors / copy rate + max(map / copy rate, FLOPs / matrix rate, exponentials / exp rate)

with bytes of the tensors (q, k, v, out, row statistics: each once) and of the map. A map streams by
under the arithmetic; what a program loads first and stores last waits, as its loop is short at the
lengths of images. Products and exponentials are of whole tiles. Only the forward pass is counted.
Ceilings, not predictions: a form is chosen by how they compare.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from . import checks, probe
from .maps import row_pitch
from .probe import Rates

Shape = tuple[int, int, int, int, int]

#: Rows and columns of the tiles that are computed whole.
TILE = 64

#: Longest row that the GPU kernel keeps in registers, for a dense map and for 8 bits. A longer one
#: is normalised and stored in a second sweep, which repeats scores and exponentials.
ONE_SWEEP = {False: 272, True: 208}

#: Largest part of a device's memory that one map may take.
MEMORY_SHARE = 1 / 8

#: Part of the time that 8 bits must save, as they are less exact.
MARGIN = 0.2

#: The 8-bit form that is considered: e4m3 takes as many bytes and is less exact.
CODED = "uint8"

#: Stands for a size that tracing knows nothing of.
_UNKNOWN_SIZE = 1024

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Kernel(NamedTuple):
    """What one launch moves and computes."""

    tensors: int  # bytes
    map: int  # bytes
    flops: int
    exps: int

    def seconds(self, rates: Rates, dtype: torch.dtype) -> float:
        arithmetic = max(self.flops / rates.matrix(dtype), self.exps / rates.exp)
        return self.tensors / rates.copy + max(self.map / rates.copy, arithmetic)


class Estimate(NamedTuple):
    making: Kernel
    applying: Kernel
    memory: int  # bytes that the map holds between the two
    made: float  # seconds
    applied: float  # seconds, of one application

    def total(self, reuses: int) -> float:
        return self.made + reuses * self.applied


def estimate(
    form: str, shape: Shape, dtype: torch.dtype, device: torch.device, rates: Rates
) -> Estimate:
    b, h, m, n, d = shape
    heads = b * h
    queries, keys = heads * m * d * dtype.itemsize, heads * n * d * dtype.itemsize
    rows = 4 * heads * m  # one float32 for each
    exps = heads * -(-m // TILE) * -(-n // TILE) * TILE**2
    product = 2 * exps * d
    everything = 2 * queries + 2 * keys + rows  # q and out, k and v, log-sum-exp
    if form == "factored":
        making = applying = Kernel(everything, 0, 2 * product, exps)
        memory = queries + keys + rows
    else:
        itemsize, scales = (dtype.itemsize, 0) if form == "dense" else (1, rows)
        stored = heads * m * row_pitch(n, itemsize) * itemsize
        longest = ONE_SWEEP[form != "dense"]
        sweeps = 2 if device.type != "cpu" and n > longest else 1
        making = Kernel(everything + scales, stored, (sweeps + 1) * product, sweeps * exps)
        applying = Kernel(queries + keys + scales, stored, product, 0)
        memory = stored + scales
    made, applied = making.seconds(rates, dtype), applying.seconds(rates, dtype)
    return Estimate(making, applying, memory, made, applied)


class Choice(NamedTuple):
    form: str
    reason: str
    estimates: dict[str, Estimate]  # most exact first
    refused: dict[str, str]  # form: why it is not considered


@lru_cache(maxsize=1024)
def choose(
    shape: Shape,
    reuses: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_grad: bool,
    rates: Rates,
) -> Choice:
    """The choice and what it rests on: a function of its arguments and of nothing else.

    Args:
        shape: (B, H, M, N, d).
        reuses: how many layers apply the map besides the one that makes it.
        dtype: of q, k and v.
        device: where they are.
        needs_grad: whether gradients are wanted.
        rates: of the device.
    """
    refused = {}
    forms: tuple[str, ...] = ("dense", "factored", CODED)
    if device.type != "cuda":
        forms = forms[:2]
        refused[CODED] = f"no kernel on {device.type} stores or applies 8 bits"
    elif needs_grad:
        refused[CODED] = "training keeps exact maps"
    estimates = {form: estimate(form, shape, dtype, device, rates) for form in forms}
    limit = MEMORY_SHARE * rates.memory
    for form in forms:
        if form != "factored" and estimates[form].memory > limit:
            share = f"{MEMORY_SHARE:.1%} of the device's memory"
            refused.setdefault(form, f"takes more than {scaled(limit)}B, {share}")
    total = {form: estimates[form].total(reuses) for form in forms if form not in refused}
    coded_total = total.pop(CODED, None)
    best = min(total, key=lambda form: total[form])  # the first, and more exact, of equals
    reason = "the fastest exact form" if len(total) > 1 else "the only exact form that fits"
    if coded_total is None:
        return Choice(best, reason, estimates, refused)
    saved = 1 - coded_total / total[best]
    if saved >= MARGIN:
        reason = f"saves {saved:.0%} of the time of the fastest exact form, {best}"
        return Choice(CODED, reason, estimates, refused)
    reason += f"; {CODED} is less exact and would have to save {MARGIN:.0%} of its time"
    return Choice(best, reason, estimates, refused)


def choose_form(
    shape: Shape,
    reuses: int,
    dtype: torch.dtype,
    device: torch.device,
    needs_grad: bool,
    rates: Rates | None = None,
) -> str:
    """ "dense", "factored" or "uint8", as ``choose``; rates of the device if None."""
    rates = probe.rates(device) if rates is None else rates
    return choose(shape, reuses, dtype, device, needs_grad, rates).form


# --- return_map="auto" --------------------------------------------------------------------------


def resolve(
    shape: Shape, reuses: int, dtype: torch.dtype, device: torch.device, needs_grad: bool
) -> str:
    """The form that ``attention(return_map="auto")`` makes. For ``torch.compile`` a constant.

    Where a size is symbolic, the size at hand chooses for all: no guard, no recompilation.
    """
    if torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in shape):
        b, h, m, n, d = [_hint(size) for size in shape]
        return _resolve_traced((b, h, m, n, d), _hint(reuses), dtype, device, needs_grad)
    return choose_form(shape, reuses, dtype, device, needs_grad)


def _resolve_traced(
    shape: Shape, reuses: int, dtype: torch.dtype, device: torch.device, needs_grad: bool
) -> str:
    rates = probe.rates(device, may_measure=False)
    return choose_form(shape, reuses, dtype, device, needs_grad, rates)


# What torch.compiler.assume_constant_result does, but that imports the compiler: three seconds.
_resolve_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _hint(size: int) -> int:
    """A number for a symbolic size."""
    # Not at the top: it imports SymPy, which takes longer than the rest of this package.
    from torch.fx.experimental import symbolic_shapes

    if hasattr(symbolic_shapes, "optimization_hint"):  # its newer name
        return symbolic_shapes.optimization_hint(size, _UNKNOWN_SIZE)
    if hasattr(symbolic_shapes, "size_hint"):
        return symbolic_shapes.size_hint(size, _UNKNOWN_SIZE)
    return operator.index(size)  # PyTorch 2.6: the size becomes a constant


# --- for people ---------------------------------------------------------------------------------


def explain(
    shape: Sequence[int],
    reuses: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    needs_grad: bool = False,
) -> str:
    """Which form ``attention(return_map="auto")`` chooses, with the arithmetic, to be printed.

    The first call on a machine measures it, in about two seconds; call this before a model is
    compiled or captured in a graph, where nothing can be measured.

    Args:
        shape: `(B, H, N, d)`, as q of self-attention, or `(B, H, M, N, d)` for M queries that
            attend to N keys.
        reuses: how many layers apply the map besides the one that makes it.
        dtype: of q, k and v: float32, bfloat16, float16 or float64.
        device: where they are; the GPU if there is one, else the CPU, if None.
        needs_grad: True for training.

    Returns:
        A text of some lines: the rates and where they come from; for each form the bytes, FLOPs and
        exponentials of making it and of applying it once, their times, and the memory it holds;
        what is chosen, and why.

    Raises:
        ValueError: a shape of another length or with a size below 1, ``reuses`` below 1, no such
            device.
        TypeError: not integers, another dtype.
    """
    shape, reuses, device = _checked(shape, reuses, dtype, device)
    rates = probe.rates(device)
    choice = choose(shape, reuses, dtype, device, bool(needs_grad), rates)
    head = (
        f"map of (B, H, M, N, d) = {shape}, {str(dtype).removeprefix('torch.')} on {device}, "
        f"made once, applied {reuses} time{'s' * (reuses > 1)}{', training' * bool(needs_grad)}"
    )
    lines = [
        head,
        f"copy {scaled(rates.copy)}B/s, products {scaled(rates.matrix(dtype))}FLOP/s, "
        f"exponentials {scaled(rates.exp)}/s",
        f"  {rates.origin}",
        "",
        _row("", "tensors", "map", "FLOPs", "exps", "time"),
    ]
    for form, e in choice.estimates.items():
        lines += [_kernel_row(f"{form}: make", e.making, e.made)]
        lines += [_kernel_row(" " * len(form) + "  apply", e.applying, e.applied)]
    lines += ["", _row("", "map holds", "total")]
    lines += [
        _row(form, f"{scaled(e.memory)}B", f"{scaled(e.total(reuses))}s")
        + (f"   not considered: {choice.refused[form]}" if form in choice.refused else "")
        for form, e in choice.estimates.items()
    ]
    uncounted = choice.refused.keys() - choice.estimates.keys()
    lines += [f"{form} not considered: {choice.refused[form]}" for form in uncounted]
    return "\n".join([*lines, "", f"chosen: {choice.form}, {choice.reason}"])


def _kernel_row(name: str, kernel: Kernel, seconds: float) -> str:
    moved = (f"{scaled(kernel.tensors)}B", f"{scaled(kernel.map)}B")
    return _row(name, *moved, scaled(kernel.flops), scaled(kernel.exps), f"{scaled(seconds)}s")


def _row(name: str, *cells: str) -> str:
    return f"{name:<16}" + "".join(f"{cell:>11}" for cell in cells)


def scaled(value: float) -> str:
    """Three digits and the prefix of the unit that follows: "790 T"."""
    if not value:
        return "0 "
    power = min(max(math.floor(math.log10(value) / 3), -4), 4)
    return f"{value / 1000.0**power:.3g} {'pnum kMGT'[power + 4].strip()}"


def _checked(
    shape: object, reuses: object, dtype: object, device: object
) -> tuple[Shape, int, torch.device]:
    sizes = checks.integers("shape", shape)
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise ValueError(
            f"shape: got {sizes}, expected (B, H, N, d) or (B, H, M, N, d), each at least 1"
        )
    b, h, m, n, d = sizes if len(sizes) == 5 else (*sizes[:3], *sizes[2:])
    count = checks.integer("reuses", reuses)
    if count < 1:
        raise ValueError(f"reuses: got {count}, expected at least 1")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, expected one of {', '.join(map(str, _DTYPES))}")
    return (b, h, m, n, d), count, _checked_device(device)


def _checked_device(device: object) -> torch.device:
    gpus = torch.cuda.device_count()
    if device is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f'device: got {device!r}, expected one such as "cpu" or "cuda"') from None
    if found.type == "cuda" and gpus and (found.index or 0) >= gpus:
        raise ValueError(f'device: got {device!r}, expected "cuda:0" to "cuda:{gpus - 1}"')
    return found
