"""The Triton provider where there is no GPU: what it refuses, and how kernels are launched."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from inputs import BF16, F16, F32, F64, normal

import psvit_kernels as pk
from psvit_kernels.triton import interpreting, provider

triton = pytest.importorskip("triton")

from psvit_kernels.triton import launch as launching  # noqa: E402


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, of Hopper's capability."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(provider, "missing", lambda: None)
    monkeypatch.setattr(provider, "capability", lambda device: (9, 0))


def on_gpu(*shape: int, dtype: torch.dtype = F32):
    """What the provider looks at, of a tensor on a GPU."""
    device = SimpleNamespace(type="cuda", index=0)
    return SimpleNamespace(shape=shape, dtype=dtype, device=device)


def reason(*shape: int, dtype: torch.dtype = F32) -> str | None:
    x = on_gpu(*shape, dtype=dtype)
    return provider.supports("attention", (x, x, x, None, 1.0, True))


# --- what it refuses --------------------------------------------------------------------------


@pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="a provider is here")
def test_forced_provider_without_a_gpu_says_so():
    q = normal(1, 1, 4, 16)
    with pk.use("triton"), pytest.raises(ValueError, match="no GPU that PyTorch can use"):
        pk.attention(q, q, q)


def test_forced_provider_refuses_a_cpu_tensor(gpu):
    q = normal(1, 1, 4, 16)
    message = 'provider "triton" was forced but cannot serve attention: device cpu, not cuda'
    with pk.use("triton"), pytest.raises(ValueError, match=message):
        pk.attention(q, q, q)


def test_dtypes_that_it_serves(gpu):
    assert [reason(1, 1, 4, 16, dtype=dtype) for dtype in (F32, BF16, F16)] == [None] * 3
    assert reason(1, 1, 4, 16, dtype=F64) == (
        "dtype torch.float64, not one of torch.float32, torch.bfloat16, torch.float16"
    )


def test_head_dims_that_it_serves(gpu):
    """Any up to 128: those between the powers of two are padded within a tile."""
    assert [reason(1, 1, 4, d) for d in (1, 16, 32, 64, 80, 96, 128)] == [None] * 7
    assert reason(1, 1, 4, 129) == "head dim 129 > 128"


def test_gpu_that_is_too_old(gpu, monkeypatch):
    monkeypatch.setattr(provider, "capability", lambda device: (7, 5))
    assert reason(1, 1, 4, 16) == "compute capability (7, 5), below (8, 0)"


def test_triton_that_is_too_old(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert provider.missing.__wrapped__() == "Triton 3.2.0, older than 3.6"
    monkeypatch.setattr(triton, "__version__", "3.10.1+git")
    assert provider.missing.__wrapped__() is None


def test_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(provider, "missing", lambda: None)
    refused = "dtype torch.bfloat16, whose products Triton's interpreter gets wrong"
    assert reason(1, 1, 4, 16, dtype=BF16) == refused
    assert reason(1, 1, 4, 16, dtype=F16) is None


def test_triton_is_imported_only_when_it_serves():
    script = (
        "import sys, torch, psvit_kernels as pk; q = torch.ones(1, 1, 2, 16); pk.attention(q, q, q)"
        "; pk.providers(); assert 'psvit_kernels.triton.launch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- how kernels are launched -----------------------------------------------------------------


class Kernel:
    """Remembers with what it was launched."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __getitem__(self, grid):
        return lambda **arguments: self.calls.append(arguments)


@pytest.fixture
def tuner(monkeypatch):
    """As if timing found the last configuration to be the best; counts how often it was asked."""
    asked = []

    def autotune(configs, key):
        def decorate(kernel):
            asked.append(kernel)
            best = configs[-1]
            run = lambda **arguments: kernel[None](**arguments, **best.all_kwargs())  # noqa: E731
            tuned = type("Tuned", (), {"best_config": best, "__getitem__": lambda s, g: run})
            return tuned()

        return decorate

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.setattr(launching, "_best", {})
    monkeypatch.setattr(launching, "_may_time", lambda: True)
    torch.use_deterministic_algorithms(False)
    return asked


CONFIGS = [triton.Config({"BLOCK": size}, num_warps=4) for size in (16, 32)]


def block_of(kernel, key="197", x=None) -> int:
    x = torch.zeros(2) if x is None else x
    launching.launch(kernel, lambda meta: (1,), {"x": x, "bias": None}, CONFIGS, key)
    return kernel.calls[-1]["BLOCK"]


def test_best_configuration_is_found_once_for_each_key_and_kind_of_arguments(tuner):
    kernel = Kernel()
    assert [block_of(kernel) for _ in range(3)] == [32, 32, 32] and len(tuner) == 1
    block_of(kernel, key="577")
    block_of(kernel, x=torch.zeros(2, dtype=F16))
    assert len(tuner) == 3 and len(kernel.calls) == 5


def test_deterministic_mode_takes_the_first_configuration(tuner):
    kernel = Kernel()
    assert block_of(kernel) == 32
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert block_of(kernel) == 16 and len(tuner) == 1


def test_nothing_is_timed_while_a_graph_is_captured(tuner, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(launching, "_may_time", lambda: False)
    assert block_of(kernel) == 16 and not tuner
    monkeypatch.setattr(launching, "_may_time", lambda: True)
    block_of(kernel)
    monkeypatch.setattr(launching, "_may_time", lambda: False)
    assert block_of(kernel) == 32 and len(tuner) == 1


def test_a_single_configuration_is_never_timed(tuner):
    kernel = Kernel()
    launching.launch(kernel, lambda meta: (1,), {"x": torch.zeros(2)}, CONFIGS[:1], "197")
    assert kernel.calls[-1]["BLOCK"] == 16 and not tuner
