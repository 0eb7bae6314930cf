"""Which provider serves a call, how a person forces one, and that nothing is silent about it."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from forced_providers import skip_unless_available
from inputs import BF16, F16, F32, F64, normal, probabilities

import psvit_kernels as pk
from psvit_kernels import cpu, reference, registry

needs_native = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@pytest.fixture(autouse=True)
def nothing_forced():
    """Whatever PSVIT_PROVIDER says where the tests run."""
    with pk.use("auto"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """(provider, operation) of each call, in order."""
    seen = []
    choose = registry.choose

    def spy(op, args):
        chosen = choose(op, args)
        seen.append((next(n for n, m in registry.PROVIDERS.items() if m is chosen), op))
        return chosen

    monkeypatch.setattr(registry, "choose", spy)
    return seen


def attend(dtype: torch.dtype = F32, d: int = 16, **options):
    q, k, v = (normal(1, 2, 9, d, dtype=dtype).requires_grad_() for _ in range(3))
    return pk.attention(q, k, v, **options)


# --- choice ---------------------------------------------------------------------------------


def test_reference_comes_last_and_serves_everything():
    assert list(registry.PROVIDERS)[-1] == "reference"
    assert reference.supports("attention", ()) is None


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cpu_provider_serves_every_operation_forward_and_backward(calls, dtype):
    q, k, v, values = (normal(1, 2, 16, 16, dtype=dtype).requires_grad_() for _ in range(4))
    out, dense = pk.attention(q, k, v, return_map="dense")
    _, factored = pk.attention(q, k, v, return_map="factored")
    total = out.sum() + pk.apply_attention(dense, values).sum()
    total = total + pk.apply_attention(factored, values).sum()
    total = total + pk.token_pool(values.flatten(1, 2)[:, :16], (4, 4))[0].sum()
    total.backward()
    served = {op for provider, op in calls if provider == "cpu"}
    assert served == {
        "attention", "attention_backward", "apply_dense", "apply_dense_backward",
        "apply_factored", "apply_factored_backward", "token_pool", "token_pool_backward",
    }  # fmt: skip
    assert not any(provider == "reference" for provider, _ in calls)


@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
def test_reference_serves_other_dtypes(calls, dtype):
    attend(dtype)[0].sum().backward()
    assert calls == [("reference", "attention"), ("reference", "attention_backward")]


@needs_native
def test_fallback_keeps_its_reason(calls, monkeypatch):
    monkeypatch.setattr(registry, "fallbacks", type(registry.fallbacks)())
    attend(F64)
    attend(F64)
    assert registry.fallbacks == {
        "attention: not cpu: dtype torch.float64, not float32 or bfloat16": 2
    }


@needs_native
def test_wide_heads_go_to_the_reference_with_a_reason(monkeypatch):
    monkeypatch.setattr(registry, "fallbacks", type(registry.fallbacks)())
    q, k = normal(1, 2, 9, 16), normal(1, 2, 9, 16)
    wide = normal(1, 2, 9, 129)
    out, m = pk.attention(q, k, wide, return_map="dense")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, wide)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(pk.apply_attention(m, wide), want)
    pk.attention(wide, wide, q)
    assert registry.fallbacks == {
        "attention: not cpu: head dim 129 > 128": 2,
        "apply_dense: not cpu: head dim 129 > 128": 1,
    }


def test_wide_heads_have_the_gradients_of_pytorch():
    q, k, v = (normal(1, 2, 9, 160).requires_grad_() for _ in range(3))
    got = torch.autograd.grad(pk.attention(q, k, v)[0].square().sum(), (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for one, want in zip(got, torch.autograd.grad(sdpa.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)


# --- forcing --------------------------------------------------------------------------------


def test_use_forces_inside_a_with_block_and_restores(calls):
    assert registry.forced() is None
    with pk.use("reference"):
        assert registry.forced() == "reference"
        attend()
        with pk.use("auto"):
            assert registry.forced() is None
        assert registry.forced() == "reference"
    assert registry.forced() is None
    assert calls == [("reference", "attention")]


def test_use_restores_after_an_error():
    with pytest.raises(KeyError), pk.use("reference"):
        raise KeyError
    assert registry.forced() is None


def test_use_as_a_call_lasts_until_auto(calls):
    pk.use("reference")
    attend()
    attend()
    pk.use("auto")
    assert registry.forced() is None
    assert calls == [("reference", "attention")] * 2


def test_unknown_provider_changes_nothing():
    with pk.use("reference"):
        with pytest.raises(ValueError, match="expected one of"):
            pk.use("tpu")
        assert registry.forced() == "reference"


def test_backward_is_served_by_the_provider_in_use_when_it_runs(calls):
    with pk.use("reference"):
        out, _ = attend()
        out.sum().backward()
    assert calls == [("reference", "attention"), ("reference", "attention_backward")]


@needs_native
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attend(F64),
            'provider "cpu" was forced but cannot serve attention: dtype torch.float64, not '
            "float32 or bfloat16",
        ),
        (
            lambda: attend(F16, return_map="dense"),
            'provider "cpu" was forced but cannot serve attention: dtype torch.float16, not '
            "float32 or bfloat16",
        ),
        (
            lambda: attend(d=129),
            'provider "cpu" was forced but cannot serve attention: head dim 129 > 128',
        ),
        (
            lambda: pk.apply_attention(
                pk.DenseMap.from_dense(probabilities(1, 2, 5, 5)), normal(1, 2, 5, 200)
            ),
            'provider "cpu" was forced but cannot serve apply_dense: head dim 200 > 128',
        ),
        (
            lambda: pk.token_pool(normal(1, 9, 4), (3, 3), kind="conv", weight=normal(4, 4, 3, 3)),
            'provider "cpu" was forced but cannot serve token_pool: a convolution that is not '
            "depthwise (PyTorch's own serves it)",
        ),
    ],
    ids=["float64", "float16", "wide heads", "wide values", "dense convolution"],
)
def test_forced_provider_never_falls_back_silently(call, message, calls, monkeypatch):
    monkeypatch.setattr(registry, "fallbacks", type(registry.fallbacks)())
    with pk.use("cpu"), pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
    assert not calls and not registry.fallbacks


def test_forced_provider_that_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_import_error", "No module named 'psvit_kernels._native'")
    with pk.use("cpu"), pytest.raises(ValueError) as caught:
        attend()
    assert str(caught.value) == (
        'provider "cpu" was forced but cannot serve attention: the compiled module is missing: '
        "No module named 'psvit_kernels._native'"
    )
    assert cpu.missing() in str(caught.value)


def test_missing_provider_is_passed_over(calls, monkeypatch):
    monkeypatch.setattr(cpu, "_native", None)
    attend()[0].sum().backward()
    assert calls == [("reference", "attention"), ("reference", "attention_backward")]


def test_another_provider_needs_one_function_per_operation_and_a_predicate(monkeypatch):
    seen = []
    other = types.SimpleNamespace(
        supports=lambda op, args: None if op == "token_pool" else "only pools",
        token_pool=lambda *args: seen.append("token_pool") or reference.token_pool(*args),
    )
    monkeypatch.setitem(registry.PROVIDERS, "other", other)
    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("other", "cpu"))
    pk.token_pool(normal(1, 9, 4), (3, 3))
    attend()
    assert seen == ["token_pool"]
    with pk.use("other"), pytest.raises(ValueError, match="cannot serve attention: only pools"):
        attend()


# --- environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "forced"), [(None, None), ("auto", None), ("reference", "reference"), ("cpu", "cpu")]
)
def test_environment_forces_a_provider(monkeypatch, value, forced):
    if value is None:
        monkeypatch.delenv("PSVIT_PROVIDER", raising=False)
    else:
        monkeypatch.setenv("PSVIT_PROVIDER", value)
    assert registry._from_environment() == forced


@pytest.mark.parametrize("value", ["fast", "", "Reference"])
def test_wrong_environment_names_the_variable_and_the_choices(monkeypatch, value):
    monkeypatch.setenv("PSVIT_PROVIDER", value)
    choices = ", ".join(registry.PROVIDERS)
    with pytest.raises(ValueError) as caught:
        registry._from_environment()
    assert str(caught.value) == f'PSVIT_PROVIDER: got "{value}", expected one of {choices}, or auto'


def imported(code: str, **environment: str) -> subprocess.CompletedProcess:
    folder = os.path.dirname(os.path.dirname(pk.__file__))
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,  # the package under test, not the sources beside the tests
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_is_read_at_import():
    code = "import psvit_kernels.registry as r; print(r.forced())"
    done = imported(code, PSVIT_PROVIDER="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reference\n"


@needs_native
def test_unknown_instruction_set_names_those_that_this_machine_runs():
    """The compiled module says it; the package still imports, and the reference serves."""
    code = "import psvit_kernels.cpu as c; print(c.missing())"
    done = imported(code, PSVIT_CPU_ISA="mmx")
    assert done.returncode == 0, done.stderr
    assert 'PSVIT_CPU_ISA: got "mmx", expected one of those this machine runs' in done.stdout


# --- the compiled module --------------------------------------------------------------------


@needs_native
def test_compiled_module_tells_its_instruction_set_and_openmp():
    isas = cpu._native.usable_isas()
    assert isas[-1] == "portable" and cpu._native.isa() in isas
    assert os.path.basename(cpu._native.openmp()).startswith(("libgomp", "libiomp", "libomp", ""))


@needs_native
def test_compiled_module_uses_the_openmp_of_pytorch():
    """Two thread pools would fight for the same cores."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux can tell which libraries are loaded")
    with open("/proc/self/maps") as file:
        loaded = {line.split()[-1] for line in file if "libgomp" in line or "libiomp" in line}
    assert cpu._native.openmp() in loaded


def test_skips_name_the_provider(monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda op, args: "nowhere")
    with pytest.raises(pytest.skip.Exception, match='provider "cpu": nowhere'):
        skip_unless_available("cpu")
