"""Each provider with each dtype that it serves, forced, so that nothing falls back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import building
import emulated
import pytest
import torch
from inputs import BF16, F16, F32
from surroundings import threads

from psvit_kernels import cuda, reference, registry
from psvit_kernels.triton import interpreting


class Backend(NamedTuple):
    provider: str
    dtype: torch.dtype
    device: str = "cpu"
    family: str | None = None  # of the CUDA kernels

    def __str__(self) -> str:
        parts = [self.provider, str(self.dtype).removeprefix("torch.")]
        parts += [] if self.family is None else [self.family]
        return "-".join(parts if self.device == "cpu" else [*parts, self.device])


#: Triton's kernels run on a GPU, or in its interpreter on CPU tensors (not in bfloat16).
TRITON_DEVICE = "cpu" if interpreting() else "cuda"

#: The CUDA kernels run on a GPU, or on CPU tensors as ``emulated.py`` compiles them.
CUDA_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA_FAMILIES = ("sm_80", "sm_90a")

#: Float64 through the reference is the oracle itself: it is held against PyTorch's own functions.
BACKENDS = [Backend("cpu", F32), Backend("cpu", BF16), Backend("reference", F32)]
BACKENDS += [Backend("reference", BF16), Backend("reference", F16)]
BACKENDS += [Backend("triton", dtype, TRITON_DEVICE) for dtype in (F32, F16, BF16)]
BACKENDS += [
    Backend("cuda", t, CUDA_DEVICE, family) for family in CUDA_FAMILIES for t in (BF16, F16)
]


def device_of(provider: str) -> str:
    return {"triton": TRITON_DEVICE, "cuda": CUDA_DEVICE}.get(provider, "cpu")


def unavailable(provider: str, dtype: torch.dtype = F32) -> str | None:
    """Why a provider serves no call of this dtype here, or None."""
    missing = registry.PROVIDERS[provider].missing()
    if missing is not None:
        return missing
    x = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device_of(provider))
    return registry.PROVIDERS[provider].supports("attention", (x, x, x, None, 1.0, True))


def skip_unless_available(provider: str, dtype: torch.dtype = F32) -> None:
    reason = unavailable(provider, dtype)
    if reason is not None:
        pytest.skip(f'provider "{provider}": {reason}')


@contextmanager
def serving(provider: str, dtype: torch.dtype = F32, family: str | None = None) -> Iterator[None]:
    """Forces a provider, so that nothing falls back; new tensors are made where it serves.

    One CPU thread: sizes are small, and on a busy machine threads wait for each other. What more
    threads change (not a bit) has its own tests.
    """
    place = nullcontext() if device_of(provider) == "cpu" else torch.device(device_of(provider))
    with cuda_kernels(family) if provider == "cuda" else nullcontext():
        if provider != "cuda":  # what that refuses is skipped call by call
            skip_unless_available(provider, dtype)
        with registry.use(provider), threads(1), place:
            yield


class _ForwardOnly:
    """The CUDA provider in tests of values and gradients: the reference has the latter."""

    missing = staticmethod(cuda.missing)

    @staticmethod
    def supports(op: str, args: tuple) -> str | None:
        return None if op.endswith("_backward") else cuda.supports(op, args)

    def __getattr__(self, op: str) -> Callable:
        return getattr(reference if op.endswith("_backward") else cuda, op)


@contextmanager
def cuda_kernels(family: str | None, gradients: bool = True) -> Iterator[None]:
    """One family of the CUDA kernels; without a GPU, emulated."""
    with ExitStack() as stack:
        if CUDA_DEVICE == "cpu":
            stack.enter_context(patch.object(cuda, "_cuda", emulated_kernels()))
        if family is not None:
            stack.enter_context(patch.dict(os.environ, PSVIT_CUDA_KERNELS=family))
        if gradients:
            stack.enter_context(patch.dict(registry.PROVIDERS, cuda=_ForwardOnly()))
        for known in (cuda.family, cuda._capability):
            known.cache_clear()
            stack.callback(known.cache_clear)
        skip_unless_kernels()
        yield


def skip_unless_kernels() -> None:
    if (reason := cuda.missing()) is not None:
        pytest.skip(f'provider "cuda": {reason}')
    try:
        cuda.family(torch.device(CUDA_DEVICE))
    except ValueError as error:  # this GPU doesn't run them
        pytest.skip(str(error))


def emulated_kernels() -> ModuleType:
    if (reason := building.unavailable()) is not None:
        pytest.skip(f"the CUDA kernels can't be compiled for a CPU: {reason}")
    module = emulated.module()
    if isinstance(module, str):
        pytest.fail(module, pytrace=False)
    return module
