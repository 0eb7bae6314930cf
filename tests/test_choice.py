"""The choice of a map's form: its arithmetic, in words, and in compiled code."""

from __future__ import annotations

import math
import re
from importlib import util
from pathlib import Path

import pytest
import torch
from inputs import BF16, F16, F32, F64
from torch.fx.experimental import symbolic_shapes

import psvit_kernels as pk
from psvit_kernels import choice, probe
from psvit_kernels.probe import Rates

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is missing")

#: The H200 of the estimates that the model is held against.
H200 = Rates(4.3e12, 3.7e12, 67e12, 790e12, 790e12, 141e9, "test")


def form(n, reuses=1, *, b=64, h=12, d=64, dtype=BF16, device=GPU, training=False, rates=H200):
    return choice.choose_form((b, h, n, n, d), reuses, dtype, device, training, rates)


def applied(kind: str, n: int, dtype: torch.dtype = BF16, rates: Rates = H200) -> float:
    """Nanoseconds a head."""
    return 1e9 * choice.estimate(kind, (1, 1, n, n, 64), dtype, GPU, rates).applied


# --- the arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "dense", "eight"), [(197, 29.8, 20.8), (577, 189, 112), (1025, 550, 336)]
)
def test_applying_a_stored_map_takes_its_bytes(n: int, dense: float, eight: float) -> None:
    # Counted by hand, without the padding of rows and tiles.
    assert applied("dense", n) == pytest.approx(dense, rel=0.02)
    assert applied("uint8", n) == pytest.approx(eight, rel=0.1)


def test_a_factored_map_overtakes_a_dense_one_between_577_and_1025_tokens() -> None:
    assert applied("factored", 197) > 1.3 * applied("dense", 197)
    assert applied("factored", 577) > applied("dense", 577)
    assert applied("factored", 1025) < applied("dense", 1025)
    assert applied("uint8", 1025) < applied("factored", 1025)


def test_the_choice_flips_with_tokens_and_reuses() -> None:
    assert form(197) == form(197, 2) == "dense"
    assert form(577) == form(1025) == form(2305) == "factored"
    assert form(577, 4) == form(1025, 6) == "uint8"
    assert form(197, 50, training=True) == form(577, 50, training=True) == "dense"
    assert form(1025, 50, training=True) == "factored"


def test_one_estimate_by_hand() -> None:
    made = choice.estimate("dense", (2, 3, 65, 300, 64), BF16, GPU, H200).making
    # q and out, k and v, log-sum-exp; 300 columns are 304 of the pitch; 2 x 5 tiles, two sweeps
    assert made.tensors == 6 * (2 * 65 * 64 * 2 + 2 * 300 * 64 * 2 + 65 * 4)
    assert made.map == 6 * 65 * 304 * 2
    assert made.exps == 2 * 6 * 10 * 64**2
    assert made.flops == 3 * 2 * 6 * 10 * 64**2 * 64
    on_cpu = choice.estimate("dense", (2, 3, 65, 300, 64), BF16, CPU, H200).making
    assert on_cpu.exps == made.exps / 2


@pytest.mark.parametrize("kind", ["dense", "factored", "uint8"])
def test_estimated_memory_is_that_of_the_map(kind: str) -> None:
    q, k, v = torch.randn(2, 3, 9, 16), torch.randn(2, 3, 21, 16), torch.randn(2, 3, 21, 16)
    found = choice.estimate(kind, (2, 3, 9, 21, 16), F32, CPU, H200).memory
    if kind == "uint8":
        made = pk.QuantizedMap.from_dense(torch.rand(2, 3, 9, 21), kind)
    else:
        made = pk.attention(q, k, v, return_map=kind)[1]
    assert found == made.nbytes


def test_training_and_cpus_keep_exact_maps() -> None:
    for n in (50, 197, 577, 1025, 2305):
        for reuses in (1, 4, 30):
            assert form(n, reuses, training=True) in ("dense", "factored")
            assert form(n, reuses, b=1, device=CPU, rates=probe._ASSUMED["cpu"]) == "dense"


def test_a_map_that_does_not_fit_is_factored() -> None:
    small = H200._replace(memory=2e9)
    assert form(197, 2, training=True, b=256) == "dense"
    assert form(197, 2, training=True, b=256, rates=small._replace(memory=1e9)) == "factored"
    assert form(4097, 8, b=256) == "factored" and form(4097, 8, b=1) == "uint8"
    # Half of the bytes still fit.
    assert form(197, 20, b=256, rates=H200._replace(memory=1.5e9)) == "uint8"


def test_ties_go_to_the_more_exact_form() -> None:
    at_once = H200._replace(copy=math.inf, exp=math.inf, bfloat16=math.inf)
    assert form(577, 3, training=True, rates=at_once) == "dense"


def test_eight_bits_have_to_save_their_margin() -> None:
    for n in (64, 197, 257, 577, 1025, 2305):
        for reuses in range(1, 20):
            found = choice.choose((8, 12, n, n, 64), reuses, BF16, GPU, False, H200)
            totals = {kind: e.total(reuses) for kind, e in found.estimates.items()}
            exact = min(totals["dense"], totals["factored"])
            assert (found.form == "uint8") == (totals["uint8"] <= (1 - choice.MARGIN) * exact)


def test_more_reuses_never_speak_for_rebuilding_what_is_read_faster() -> None:
    for n in (50, 197, 257, 577, 1025, 2305):
        eight = [form(n, reuses, b=1) == "uint8" for reuses in range(1, 40)]
        assert eight == sorted(eight)  # once chosen, chosen for more
        if applied("dense", n) < applied("factored", n):
            dense = [form(n, reuses, b=1, training=True) == "dense" for reuses in range(1, 40)]
            assert dense == sorted(dense)


def test_the_choice_does_not_depend_on_the_batch_while_maps_fit() -> None:
    for n in (197, 577, 1025):
        assert len({form(n, 3, b=b, h=h) for b in (1, 3, 16) for h in (1, 12)}) == 1


def test_faster_exponentials_never_speak_for_storing() -> None:
    forms = [form(577, 3, training=True, rates=H200._replace(exp=e)) for e in (1e11, 1e12, 9e12)]
    assert forms[0] == "dense" and forms[-1] == "factored"


def test_half_of_float32_stands_for_float64() -> None:
    assert H200.matrix(F64) == H200.float32 / 2
    assert H200.matrix(F16) == H200.float16


@needs_triton
def test_the_kernel_for_short_rows_has_the_length_that_is_counted_with() -> None:
    from psvit_kernels.triton.attention import fits_registers

    for coded, longest in choice.ONE_SWEEP.items():
        served = [fits_registers(n, 64, BF16, not coded) for n in (longest, longest + 1)]
        assert served == [True, False]


# --- explain ------------------------------------------------------------------------------------


def test_explains_in_words_and_numbers(cache_folder: Path, probed: list) -> None:
    text = pk.explain((8, 12, 197, 64), 2, device="cpu", dtype=F32)
    assert "(8, 12, 197, 197, 64), float32 on cpu, made once, applied 2 times" in text
    assert "measured just now" in text and probe.device_key(CPU) in text
    assert "copy 4 TB/s, products 50 TFLOP/s, exponentials 3 T/s" in text
    assert re.search(r"^dense +15\.1 MB +\d", text, re.M)
    assert "uint8 not considered: no kernel on cpu" in text
    assert text.splitlines()[-1].startswith("chosen: dense, the fastest exact form")


def test_explains_a_gpu_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.use_deterministic_algorithms(False)
    text = pk.explain((64, 12, 577, 64), 4, device="cuda")
    assert "assumed, those of an H200: there is no GPU here" in text
    assert "chosen: uint8, saves 2" in text and "fastest exact form, factored" in text
    assert "not considered: training keeps exact maps" in pk.explain(
        (64, 12, 577, 64), 4, device="cuda", needs_grad=True
    )


def test_explains_what_does_not_fit() -> None:
    text = pk.explain((64, 12, 4097, 4097, 64), device="cuda")
    assert text.count("not considered: takes more than 3 GB, 12.5% of the device's memory") == 2
    assert "chosen: factored, the only exact form that fits" in text


def test_explain_takes_queries_and_keys() -> None:
    assert "(B, H, M, N, d) = (2, 3, 7, 9, 16)" in pk.explain(torch.Size((2, 3, 7, 9, 16)))
    assert pk.explain((2, 3, 7, 16)) == pk.explain((2, 3, 7, 7, 16))


BAD = [
    (
        lambda: pk.explain((2, 3, 4)),
        ValueError,
        "shape: got (2, 3, 4), expected (B, H, N, d) or (B, H, M, N, d), each at least 1",
    ),
    (
        lambda: pk.explain((2, 3, 0, 16)),
        ValueError,
        "shape: got (2, 3, 0, 16), expected (B, H, N, d) or (B, H, M, N, d), each at least 1",
    ),
    (lambda: pk.explain(197), TypeError, "shape: got 197, expected a sequence of integers"),
    (lambda: pk.explain((2, 3, 7, 16), 0), ValueError, "reuses: got 0, expected at least 1"),
    (lambda: pk.explain((2, 3, 7, 16), 1.5), TypeError, "reuses: got 1.5, expected an integer"),
    (
        lambda: pk.explain((2, 3, 7, 16), dtype=torch.int8),
        TypeError,
        "dtype: got torch.int8, expected one of torch.float32, torch.bfloat16, torch.float16, "
        "torch.float64",
    ),
    (
        lambda: pk.explain((2, 3, 7, 16), dtype="bfloat16"),
        TypeError,
        "dtype: got 'bfloat16', expected one of torch.float32, torch.bfloat16, torch.float16, "
        "torch.float64",
    ),
    (
        lambda: pk.explain((2, 3, 7, 16), device="gpu"),
        ValueError,
        'device: got \'gpu\', expected one such as "cpu" or "cuda"',
    ),
    (
        lambda: pk.explain((2, 3, 7, 16), device=2.5),
        ValueError,
        'device: got 2.5, expected one such as "cpu" or "cuda"',
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = 'device: got \'cuda:5\', expected "cuda:0" to "cuda:1"'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pk.explain((2, 3, 7, 16), device="cuda:5")


# --- torch.compile ------------------------------------------------------------------------------

#: PyTorch 2.6 tells no size to who traces: there a size becomes a constant.
hints = hasattr(symbolic_shapes, "size_hint") or hasattr(symbolic_shapes, "optimization_hint")


def scaled_by_form(q: torch.Tensor, k: torch.Tensor, reuses: int) -> torch.Tensor:
    """As many times q as the chosen form has letters."""
    training = torch.is_grad_enabled() and q.requires_grad
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return q * len(choice.resolve(shape, reuses, q.dtype, q.device, training))


@pytest.fixture
def flip_at_100(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A choice that depends on nothing but N; the arguments it was asked with."""
    asked: list[tuple] = []

    def choose(shape, reuses, dtype, device, needs_grad, rates=None):
        assert all(type(size) is int for size in (*shape, reuses))
        asked.append((shape, reuses, dtype, device, needs_grad, rates))
        return "dense" if shape[3] < 100 else "factored"

    monkeypatch.setattr(choice, "choose_form", choose)
    torch._dynamo.reset()
    return asked


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_compiles_without_a_graph_break(dynamic, flip_at_100, cache_folder, probed) -> None:
    compiled = torch.compile(scaled_by_form, fullgraph=True, backend="eager", dynamic=dynamic)
    by_size = {}
    for n in (10, 200, 37, 300):
        q = torch.ones(2, 3, n, 16)
        for reuses in (1, 2):
            by_size[n] = compiled(q, q, reuses).flatten()[0].item()
    assert all(rates.origin.endswith("while PyTorch traces") for *_, rates in flip_at_100)
    assert by_size[10] == len("dense") and not probed
    if dynamic is False:
        assert by_size == {10: 5, 200: 8, 37: 5, 300: 8}
    if dynamic and hints:  # one graph for all sizes, chosen for the first
        assert set(by_size.values()) == {5} and len(flip_at_100) == 1


def test_compiled_code_uses_the_real_choice(cache_folder: Path, probed: list) -> None:
    torch._dynamo.reset()
    q = torch.ones(2, 3, 20, 16, requires_grad=True)
    compiled = torch.compile(scaled_by_form, fullgraph=True, backend="eager")
    assert compiled(q, q, 2).flatten()[0].item() == len("dense")
    assert not probed


@pytest.mark.skipif(not hints, reason="this PyTorch can't tell sizes while it traces")
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_dynamic_size(strict: bool, flip_at_100: list) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return scaled_by_form(q, q, 2)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(
        Module(), (torch.ones(2, 3, 20, 16),), dynamic_shapes={"q": {2: tokens}}, strict=strict
    )
    assert exported.module()(torch.ones(2, 3, 500, 16)).flatten()[0].item() == len("dense")
