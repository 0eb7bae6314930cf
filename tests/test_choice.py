"""The choice of a map's form: its arithmetic, the rates it rests on, and that nothing breaks it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from importlib import util
from pathlib import Path

import pytest
import torch
from helpers import BF16, F16, F32, F64
from torch.fx.experimental import symbolic_shapes

import psvit_kernels as pk
from psvit_kernels import choice, info, probe
from psvit_kernels.probe import Rates

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is missing")

#: The H200 of the estimates that the model is held against.
H200 = Rates(4.3e12, 3.7e12, 67e12, 790e12, 790e12, 141e9, "e4m3", "test")
MEASURED = {"copy": 4e12, "exp": 3e12, "float32": 5e13, "bfloat16": 7e14, "float16": 7e14}


def form(n, reuses=1, *, b=64, h=12, d=64, dtype=BF16, device=GPU, training=False, rates=H200):
    return choice.choose_form((b, h, n, n, d), reuses, dtype, device, training, rates)


def applied(kind: str, n: int, dtype: torch.dtype = BF16, rates: Rates = H200) -> float:
    """Nanoseconds a head."""
    return 1e9 * choice.estimate(kind, (1, 1, n, n, 64), dtype, GPU, rates).applied


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in a process that knows no rates and isn't deterministic."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_known", {})
    probe._warn.cache_clear()
    torch.use_deterministic_algorithms(False)  # conftest sets it again
    return tmp_path


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that were measured; each gives the same rates at once."""
    devices: list[torch.device] = []

    def measure(device: torch.device) -> dict[str, float]:
        devices.append(device)
        return dict(MEASURED)

    monkeypatch.setattr(probe, "_measure", measure)
    return devices


# --- the arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "dense", "eight"), [(197, 29.8, 20.8), (577, 189, 112), (1025, 550, 336)]
)
def test_applying_a_stored_map_takes_its_bytes(n: int, dense: float, eight: float) -> None:
    # Counted by hand, without the padding of rows and tiles.
    assert applied("dense", n) == pytest.approx(dense, rel=0.02)
    assert applied("e4m3", n) == pytest.approx(eight, rel=0.1)


def test_a_factored_map_overtakes_a_dense_one_between_577_and_1025_tokens() -> None:
    assert applied("factored", 197) > 1.3 * applied("dense", 197)
    assert applied("factored", 577) > applied("dense", 577)
    assert applied("factored", 1025) < applied("dense", 1025)
    assert applied("e4m3", 1025) < applied("factored", 1025)


def test_the_choice_flips_with_tokens_and_reuses() -> None:
    assert form(197) == form(197, 2) == "dense"
    assert form(577) == form(1025) == form(2305) == "factored"
    assert form(577, 4) == form(1025, 6) == "e4m3"
    assert form(197, 50, training=True) == form(577, 50, training=True) == "dense"
    assert form(1025, 50, training=True) == "factored"


def test_older_gpus_use_the_integer_code() -> None:
    assert form(577, 4, rates=H200._replace(eight_bits="uint8")) == "uint8"


def test_one_estimate_by_hand() -> None:
    made = choice.estimate("dense", (2, 3, 65, 300, 64), BF16, GPU, H200).making
    # q and out, k and v, log-sum-exp; 300 columns are 304 of the pitch; 2 x 5 tiles, two sweeps
    assert made.tensors == 6 * (2 * 65 * 64 * 2 + 2 * 300 * 64 * 2 + 65 * 4)
    assert made.map == 6 * 65 * 304 * 2
    assert made.exps == 2 * 6 * 10 * 64**2
    assert made.flops == 3 * 2 * 6 * 10 * 64**2 * 64
    on_cpu = choice.estimate("dense", (2, 3, 65, 300, 64), BF16, CPU, H200).making
    assert on_cpu.exps == made.exps / 2


@pytest.mark.parametrize("kind", ["dense", "factored", "e4m3"])
def test_estimated_memory_is_that_of_the_map(kind: str) -> None:
    q, k, v = torch.randn(2, 3, 9, 16), torch.randn(2, 3, 21, 16), torch.randn(2, 3, 21, 16)
    found = choice.estimate(kind, (2, 3, 9, 21, 16), F32, CPU, H200).memory
    if kind == "e4m3":
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
    assert form(4097, 8, b=256) == "factored" and form(4097, 8, b=1) == "e4m3"
    # Half of the bytes still fit.
    assert form(197, 20, b=256, rates=H200._replace(memory=1.5e9)) == "e4m3"


def test_ties_go_to_the_more_exact_form() -> None:
    at_once = H200._replace(copy=math.inf, exp=math.inf, bfloat16=math.inf)
    assert form(577, 3, rates=at_once._replace(eight_bits=None)) == "dense"
    assert form(577, 3, training=True, rates=at_once) == "dense"


def test_eight_bits_have_to_save_their_margin() -> None:
    for n in (64, 197, 257, 577, 1025, 2305):
        for reuses in range(1, 20):
            found = choice.choose((8, 12, n, n, 64), reuses, BF16, GPU, False, H200)
            totals = {kind: e.total(reuses) for kind, e in found.estimates.items()}
            exact = min(totals["dense"], totals["factored"])
            assert (found.form == "e4m3") == (totals["e4m3"] <= (1 - choice.MARGIN) * exact)


def test_more_reuses_never_speak_for_rebuilding_what_is_read_faster() -> None:
    for n in (50, 197, 257, 577, 1025, 2305):
        eight = [form(n, reuses, b=1) == "e4m3" for reuses in range(1, 40)]
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
    assert "8 bits not considered: no kernel on cpu" in text
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


# --- rates --------------------------------------------------------------------------------------


def test_measures_a_cpu_once_and_keeps_it(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_WARM_UP", 0.0)
    monkeypatch.setattr(probe, "_SECONDS", 0.01)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=BF16):
        found = probe.rates("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(1e6 < getattr(found, name) < 1e16 for name in MEASURED)
    assert found.eight_bits is None and found.memory > 1e8
    assert found.origin.startswith("measured just now")
    (entry,) = json.loads((cache_folder / "psvit" / "rates.json").read_text()).values()
    assert entry == {name: getattr(found, name) for name in MEASURED}
    assert probe.rates("cpu") is found
    probe._known.clear()
    again = probe.rates("cpu")
    assert again[:7] == found[:7] and again.origin.startswith("measured earlier")


def test_other_threads_are_another_machine(cache_folder: Path, probed: list) -> None:
    before = torch.get_num_threads()
    probe.rates("cpu")
    try:
        torch.set_num_threads(before + 1)
        probe.rates("cpu")
    finally:
        torch.set_num_threads(before)
    probe.rates("cpu")
    assert probed == [CPU, CPU]
    assert len(json.loads(probe.cache_file().read_text())) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"%s": null}',
        b'{"%s": {"copy": 1.0}}',
        b'{"%s": {"copy": "1", "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": 0, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": NaN, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
        b'{"%s": {"copy": 1e999, "exp": 1, "float32": 1, "bfloat16": 1, "float16": 1}}',
    ],
)
@pytest.mark.filterwarnings("ignore:psvit_kernels. kept rates could not be read")
def test_a_corrupt_cache_is_measured_again(cache_folder, probed, content: bytes) -> None:
    path = probe.cache_file()
    path.parent.mkdir()
    path.write_bytes(content.replace(b"%s", probe.device_key(CPU).encode()))
    assert probe.rates("cpu").copy == MEASURED["copy"] and probed == [CPU]
    assert json.loads(path.read_text())[probe.device_key(CPU)] == MEASURED


def test_a_corrupt_cache_is_one_warning(cache_folder: Path, probed: list) -> None:
    path = probe.cache_file()
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="kept rates could not be read") as caught:
        probe.rates("cpu")
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(cache_folder: Path, probed: list) -> None:
    cache_folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="could not be kept") as caught:
        assert probe.rates("cpu").copy == MEASURED["copy"]
    cache_folder.chmod(stat.S_IRWXU)
    assert len(caught) == 1


def test_a_cache_that_cannot_be_written_is_one_warning(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache_folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder / "file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert probe.rates("cpu").copy == probe.rates("cpu").copy == MEASURED["copy"]
    assert ["could not be kept" in str(w.message) for w in caught] in ([True], [False, True])
    assert probed == [CPU]


def test_nothing_is_left_behind_where_renaming_fails(cache_folder: Path, probed: list) -> None:
    probe.cache_file().mkdir(parents=True)  # a folder where the file should be
    with pytest.warns(UserWarning, match="could not be"):
        probe.rates("cpu")
    assert [path.name for path in (cache_folder / "psvit").iterdir()] == ["rates.json"]


def test_no_home_is_no_error(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="could not be"):
        assert probe.rates("cpu").copy == MEASURED["copy"]


@pytest.mark.parametrize(
    ("system", "folder"),
    [("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")],
)
def test_where_rates_are_kept(
    system: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification wants ignored
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", system)
    assert probe.cache_file() == tmp_path / folder / "psvit" / "rates.json"


def _keep_many(folder: str, name: str) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    for i in range(100):
        probe._keep(f"{name}{i % 2}", MEASURED)


def test_two_processes_write_at_once(cache_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_keep_many, args=(str(cache_folder), name)) for name in ("a", "b")
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        time.sleep(0.01)
        content = probe._read()  # a warning, if half of a file is seen, fails the test
        assert all(entry == MEASURED for entry in content.values())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert probe._read()
    assert [path.name for path in (cache_folder / "psvit").iterdir()] == ["rates.json"]


def test_measuring_that_fails_is_one_warning(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> dict[str, float]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(probe, "_measure", broken)
    with pytest.warns(UserWarning, match="could not be measured: no memory") as caught:
        assert probe.rates("cpu").origin.endswith("measuring failed")
        assert probe.rates("cpu").origin.endswith("measuring failed")
    assert len(caught) == 1 and not probe.cache_file().exists()


def test_deterministic_mode_freezes_the_choice(cache_folder: Path, probed: list) -> None:
    probe._known[probe.device_key(CPU)] = H200
    before = pk.explain((8, 12, 577, 64), device="cpu")
    torch.use_deterministic_algorithms(True)
    frozen = probe.rates("cpu")
    assert frozen[:7] == probe._ASSUMED["cpu"][:7]
    assert probe.rates("cuda")[:7] == probe._ASSUMED["cuda"][:7]
    text = pk.explain((8, 12, 577, 64), device="cpu")
    assert text != before and "deterministic mode freezes the choice" in text
    assert not probed


def test_other_devices_are_not_measured(cache_folder: Path, probed: list) -> None:
    found = probe.rates("meta")
    assert found.eight_bits is None and "nothing is measured on meta" in found.origin
    assert choice.resolve((8, 12, 197, 197, 64), 2, BF16, torch.device("meta"), False) == "dense"
    assert not probed


def test_nothing_is_measured_while_a_graph_is_captured(
    cache_folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(probe, "device_key", lambda device: "a GPU")
    monkeypatch.setattr(probe, "_hardware", lambda device: (8e10, "e4m3"))
    assert "while a CUDA graph is captured" in probe.rates(GPU).origin
    assert not probed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert probe.rates(GPU)[:7] == (*(MEASURED[n] for n in MEASURED), 8e10, "e4m3")
    assert probed == [GPU]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "measured just now" in probe.rates(GPU).origin


def test_nothing_is_measured_with_fake_tensors(cache_folder: Path, probed: list) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert "while PyTorch traces" in probe.rates("cpu").origin
    assert not probed


def test_threads_may_ask_at_once(cache_folder: Path, probed: list) -> None:
    found: list[Rates] = []
    threads = [threading.Thread(target=lambda: found.append(probe.rates("cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({rates[:7] for rates in found}) == 1


def test_info_shows_what_is_kept_and_measures_nothing(cache_folder: Path, probed: list) -> None:
    def shown() -> str:
        return dict(info.lines(info.collect()))["rates"]

    assert shown() == "not measured yet: psvit_kernels.explain(...) does" and not probed
    probe.rates("cpu")
    assert shown().startswith(f"{probe.device_key(CPU)}: copy 4 TB/s, exponentials 3 T/s")
    assert len(probed) == 1


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


# --- the kernel that counts exponentials --------------------------------------------------------

_INTERPRETED = """
import torch
from psvit_kernels.triton.exponentials import ROUNDS, exponentials
x = torch.linspace(0, 8, 1500)
expected = x
for _ in range(ROUNDS):
    expected = torch.exp2(-expected)
torch.testing.assert_close(exponentials(x), expected)
"""


@needs_triton
def test_exponentials_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
