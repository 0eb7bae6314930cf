"""The GPU runner, without a GPU: whole sessions on tiny shapes, on the clock of the host."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: psvit is the installed one

import helpers  # noqa: E402

from bench.gpu import (  # noqa: E402
    clock,
    command,
    gate,
    network,
    providers,
    report,
    rows,
    sanitize,
    session,
    trial,
    work,
)
from bench.gpu.rows import Bar, Case  # noqa: E402
from psvit_kernels import cuda, registry  # noqa: E402

BESIDE = ("sdpa/flash", "sdpa/cudnn", "sdpa/math", "eager")
TINY = (
    Case(
        "apply",
        (2, 2, 9),
        {
            "dense reference": (Bar("copy", 0.5), Bar("speed-up", 0.001)),
            "uint8 reference": (),
            "e4m3 reference": (),
        }
        | {"factored reference": (Bar("speed-up", 1e6),)},
        (*BESIDE, "eager A @ v"),
        "float32",
    ),
    Case("attention", (2, 2, 9), {"dense reference": (Bar("map", 0.001),)}, BESIDE, "float32"),
    Case("group", (2, 2, 9), {"dense reference": (), "factored reference": ()}, BESIDE, "float32"),
    Case(
        "pool-max",
        (2, 5, 16),
        {"fused reference": (Bar("speed-up", 0.001, "eager"),)},
        rows.POOL[:1],
    ),
    Case("pool-avg", (2, 5, 16), {"fused reference": ()}, ("eager",), "float32"),
    Case("pool-depthwise", (2, 5, 16), {"fused reference": ()}, ("eager",), "float32"),
    Case(
        "apply",
        (1, 2, 5),
        {"dense reference": (Bar("launches", 1.0),)},
        BESIDE,
        "float32",
        launches=True,
    ),
)
RATES = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": {"float32": 1e10}, "exp_per_s": 1e9}


class HostClock:
    """Stands in for ``CudaClock``."""

    name = "host"

    def sets(self, nbytes: float) -> int:
        return 2

    def warm_up(self, calls) -> None:
        for call in calls:
            call()

    def captured(self, calls):
        def sample() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return max(1e6 * (time.perf_counter() - start) / len(calls), 1e-3)

        return sample

    wall = captured

    def peak_bytes(self, call) -> int:
        return 1000

    def launches(self, call) -> list[str]:
        call()
        return ["kernel"]

    def check_health(self) -> None:
        pass

    def release(self) -> None:
        pass


@pytest.fixture
def store(tmp_path) -> session.Store:
    return session.Store(tmp_path / "results")


def run(
    store, cases, seconds: float = 1e6, *, fresh: bool = True, host=None, **options
) -> list[str]:
    """A session with the reference in place of Triton; what it said."""
    said: list[str] = []
    if fresh:
        store.create(cases)
    options = {"reserve": 30.0, "rounds": (3, 3)} | options
    deadline = time.time() + seconds
    options = {"device": "cpu", "deadline": deadline, "say": said.append} | options
    session.run(store, cases, host or HostClock(), **options)
    return said


def stored(store) -> dict:
    return json.loads(store.file.read_text())


def states(store) -> set[str]:
    """Of all rows."""
    cases = stored(store)["cases"].values()
    return {row["status"] for case in cases for row in case["rows"].values()}


def shown(data: dict, cases) -> str:
    console = Console(width=command.WIDTH, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(data, console, cases)
    return console.export_text()


def spoilt(function, how):
    return lambda *args, **options: how(function(*args, **options))


# --- the rows -------------------------------------------------------------------------------


def reach() -> dict[str, list[str]]:
    """What each row is to reach."""
    return {line.title: list(map(str, line.case.rows[line.name])) for line in report.lines(None)}


def test_every_row_of_triton_is_there():
    bars = reach()
    for n, dense, eight_bits in ((197, 1.8, 2.5), (577, 1.4, 2.1), (1025, 1.15, 1.7)):
        assert bars[f"apply/64x12x{n} dense triton"] == ["85 % of copy", f"{dense}x sdpa"]
        for form in ("uint8", "e4m3"):
            assert bars[f"apply/64x12x{n} {form} triton"] == [f"{eight_bits}x sdpa"]
        assert 64 * 12 >= 768
    for batch in (1, 4):
        for n in (2305, 4097):
            assert bars[f"apply/{batch}x12x{n} dense triton"] == []
            assert bars[f"apply/{batch}x12x{n} uint8 triton"] == ["1.6x sdpa"]
    for title in ("apply/64x12x1025 factored triton", "apply/4x12x4096 factored triton"):
        assert bars[title] == ["1.18x sdpa"]
    for n in (197, 257):
        assert bars[f"attention/64x12x{n} dense triton"] == [
            "sdpa + writing the map", "moonshot: 1x sdpa"
        ]  # fmt: skip
    for n in (197, 577):
        assert bars[f"group/64x12x{n} dense triton"] == ["1.6x sdpa"]
    for kind in ("max", "avg", "depthwise"):
        for provider in ("triton", "cuda"):
            assert bars[f"pool-{kind}/256x14x768 fused {provider}"] == [
                "85 % of copy", "1.5x eager", "1x compile"
            ]  # fmt: skip
    for kind in ("apply", "attention"):
        assert bars[f"{kind}/1x12x197 dense triton"] == ["launches of sdpa"]
    names = [case.name for case in rows.CASES]
    assert len(names) == len(set(names))


def test_every_row_of_the_cuda_kernels_is_there():
    bars = reach()
    for n in (197, 577, 1025):
        assert bars[f"apply/64x12x{n} dense cuda/sm_90a"] == [
            "90 % of copy", "moonshot: 95 % of copy"
        ]  # fmt: skip
        for form in ("uint8", "e4m3"):
            assert bars[f"apply/64x12x{n} {form} cuda/sm_90a"] == [
                "80 % of copy", "moonshot: 90 % of copy", "1.5x dense",
                "moonshot: 1.8x dense",
            ]  # fmt: skip
    for n in (197, 257):
        assert bars[f"attention/64x12x{n} dense cuda/sm_90a"] == ["1x sdpa", "moonshot: 1.5x sdpa"]
    for name in ("vit_base_patch16_224", "deit_small_patch16_224"):
        for schedule in rows.SCHEDULES:
            for provider in ("triton", "cuda/sm_90a"):
                assert bars[f"model-{name}/256x224x224 {schedule} {provider}"] == [
                    "0.97x the FLOPs of unconverted", "moonshot: 1x the FLOPs of unconverted"
                ]  # fmt: skip
    for title in bars:  # both families, wherever one of them is
        if title.endswith("cuda/sm_90a") and "fused" not in title:
            assert title.replace("sm_90a", "sm_80") in bars
            assert title.replace("cuda/sm_90a", "triton") in bars


def test_bytes_and_flops_are_the_fewest_that_will_do():
    n, heads = 197, 64 * 12
    case = rows.CASES[0]
    core, full = heads * n * 64, heads * n * n
    assert rows.counts(case, "dense triton") == (2 * full * 64, 2 * full + 2 * 2 * core)
    assert rows.counts(case, "uint8 triton") == (2 * full * 64, full + 4 * heads * n + 2 * 2 * core)
    assert rows.counts(case, "factored triton") == (4 * full * 64, 2 * 4 * core + 4 * heads * n)
    attention = Case("attention", (64, 12, n), {"dense triton": ()}, ())
    assert rows.counts(attention, "dense triton") == (4 * full * 64, 2 * full + 2 * 4 * core)
    pool = Case("pool-max", (256, 14, 768), {"fused triton": ()}, ())
    tokens = 256 * (1 + 14 * 14 + 1 + 7 * 7)
    assert rows.counts(pool, "fused triton") == (0, 2 * (tokens * 768 + 2 * 768))


def test_select():
    assert [case.name for case in rows.select("group")] == ["group/64x12x197", "group/64x12x577"]
    assert rows.select(None) == list(rows.CASES)
    assert [case.name for case in rows.select("pool-m*")] == ["pool-max/256x14x768"]
    with pytest.raises(ValueError, match='--cases: got "nothing"'):
        rows.select("nothing")


# --- a session ------------------------------------------------------------------------------


def test_a_whole_session(store):
    said = run(store, TINY)
    data = stored(store)
    assert list(store.file.parent.iterdir()) == [store.file]
    assert (
        len(said) == len(TINY)
        and "apply/2x2x9: dense reference measured, uint8 reference" in said[0]
    )
    assert list(data["cases"]) == [case.name for case in TINY]
    for case in TINY:
        record = data["cases"][case.name]
        assert record["status"] == "done" and record["sets"] == 2, record
        for name in case.rows:
            row, entry = record["rows"][name], record["contenders"][name]
            assert row["status"] == "measured", row
            assert row["error"]["psvit"] >= 0 and row["bytes"] > 0
            for mode in ("captured", "wall"):
                assert entry[mode]["samples"] == 3
                assert 0 < entry[mode]["p20"] <= entry[mode]["median"] <= entry[mode]["p80"]
            assert entry["peak_bytes"] == 1000
        beside = record["contenders"]
        assert beside["eager"]["captured"] and set(case.baselines) <= set(beside)
        if "sdpa/cudnn" in beside:
            assert beside["sdpa/cudnn"]["captured"] is None and beside["sdpa/cudnn"]["reason"]
            assert "sdpa/math" in record["ratios"][next(iter(case.rows))]
    automatic = data["cases"]["apply/2x2x9"]["automatic"]
    assert set(automatic["picked"]) == {"1", "2", "5"}, automatic
    assert set(automatic["picked"].values()) <= {"dense", "uint8", "e4m3", "factored"}
    assert any("FLOPs" in text for text in automatic["explained"])
    assert data["cases"]["apply/1x2x5"]["contenders"]["dense reference"]["launches"] == ["kernel"]
    assert not report.failed(data)


def test_compiled_baselines(store, monkeypatch):
    monkeypatch.setattr(work, "compiled", lambda function: function)
    # FlexAttention itself is slow to import, and slow where it isn't compiled.
    monkeypatch.setattr(work, "flex", lambda: torch.nn.functional.scaled_dot_product_attention)
    beside = ("compile", "flex", "eager")
    cases = [
        Case("apply", (1, 2, 5), {"dense reference": ()}, beside, "float32"),
        Case("group", (1, 2, 5), {"dense reference": ()}, beside, "float32"),
        Case("pool-max", (1, 3, 16), {"fused reference": ()}, ("compile",), "float32"),
    ]
    run(store, cases)
    for case in cases:
        for name in case.baselines:
            entry = stored(store)["cases"][case.name]["contenders"][name]
            assert entry["captured"], entry


def test_three_calls_of_sdpa_are_beside_a_group():
    built = work.build(
        Case("group", (1, 2, 5), {"dense reference": ()}, BESIDE, "float32"), 1, "cpu"
    )
    for name, tensors in (("sdpa/math", 9), ("eager", 5)):
        contender = built.baselines[name]()
        with contender.pinned():
            results = contender.calls[0]()
        assert len(results) == 3 + tensors  # outputs, and a gradient for each input


@pytest.mark.parametrize("how", [lambda out: out * 1.1, lambda out: out * math.nan])
def test_a_wrong_kernel_has_no_speed(store, monkeypatch, how):
    monkeypatch.setattr(work, "apply_attention", spoilt(work.apply_attention, how))
    right = Case("pool-max", (2, 5, 16), {"fused reference": ()}, ("eager",), "float32")
    wrong = Case(
        "apply", (2, 2, 9), {"dense reference": (Bar("speed-up", 0.001),)}, BESIDE, "float32"
    )
    monkeypatch.setattr(work, "_apply_oracle", _right_oracle)
    run(store, [wrong, right])
    data = stored(store)
    assert data["cases"][wrong.name]["rows"]["dense reference"]["status"] == "FAILED correctness"
    assert data["cases"][wrong.name]["contenders"] == {}
    assert data["cases"][right.name]["rows"]["fused reference"]["status"] == "measured"
    assert report.failed(data)
    (line,) = (t for t in shown(data, [wrong, right]).splitlines() if "x9 dense reference  " in t)
    assert line.split() == ["apply/2x2x9", "dense", "reference", "FAILED", "correctness"]
    monkeypatch.setattr(report, "OPERATIONS", [wrong])
    assert "| apply/2x2x9 dense | reference | FAILED correctness |  |" in report.markdown(data)


def _right_oracle(kept, qkv, part) -> gate.Oracle:
    p, v = kept.dense()[part], qkv[2]
    exact = p.double() @ v.double()
    return gate.Oracle({"out": exact}, {"out": p @ v}, {"out": p.double() @ v.double().abs()})


def test_memory_that_a_kernel_leaves_unwritten_shows():
    want = torch.ones(2, 3)
    oracle = gate.Oracle({"out": want.double()}, {"out": want}, {"out": want.double()})

    def forgetful() -> gate.Results:
        out = torch.empty(2, 3)
        out[:, :2] = 1
        return {"out": out}

    with pytest.raises(AssertionError, match="NaN"):
        gate.check(forgetful, lambda part: _part(oracle, part), 1)
    assert gate.check(lambda: {"out": torch.ones(2, 3)}, lambda part: _part(oracle, part), 1)


def _part(oracle: gate.Oracle, part: slice) -> gate.Oracle:
    each = ({"out": results["out"][part]} for results in vars(oracle).values())
    return gate.Oracle(*each)


def test_the_configuration_that_is_timed_is_checked():
    """In deterministic mode, which fills memory, kernels keep to another one."""
    want = torch.ones(2, 3)
    oracle = gate.Oracle({"out": want.double()}, {"out": want}, {"out": want.double()})

    def wrong_when_tuned() -> gate.Results:
        tuned = not torch.are_deterministic_algorithms_enabled()
        return {"out": want * (1 + tuned)}

    torch.use_deterministic_algorithms(False)
    with pytest.raises(AssertionError, match="miss the bar"):
        gate.check(wrong_when_tuned, lambda part: oracle, 2)


def test_an_exception_costs_its_row_alone(store, monkeypatch):
    def fails(stored, v):
        if isinstance(stored, work.QuantizedMap):
            raise RuntimeError("no such\nthing")
        return real(stored, v)

    real = work.apply_attention
    monkeypatch.setattr(work, "apply_attention", fails)
    run(store, TINY[:2])
    found = stored(store)["cases"]["apply/2x2x9"]["rows"]
    assert found["uint8 reference"] == {
        "status": "error", "reason": "RuntimeError: no such thing"
    }  # fmt: skip
    assert found["dense reference"]["status"] == found["factored reference"]["status"] == "measured"
    words = "apply/2x2x9 uint8 reference: error: RuntimeError: no such thing"
    assert words in shown(stored(store), TINY[:2])
    assert report.failed(stored(store))


def test_a_provider_that_cannot_serve_says_so(store):
    cases = [Case("apply", (2, 2, 9), {"uint8 cpu": (), "uint8 reference": ()}, BESIDE, "float32")]
    run(store, cases)
    found = stored(store)["cases"]["apply/2x2x9"]["rows"]
    assert found["uint8 cpu"]["status"] == "refused"
    assert 'provider "cpu" was forced but cannot serve' in found["uint8 cpu"]["reason"]
    assert found["uint8 reference"]["status"] == "measured"
    assert not report.failed(stored(store))
    assert "rows: 1 measured, 1 refused" in shown(stored(store), cases)


def test_what_the_clock_cannot_tell_is_not_told(store):
    class Blind(HostClock):
        def captured(self, calls):
            raise RuntimeError("capture failed")

        def peak_bytes(self, call):
            raise RuntimeError("no memory statistics")

    run(store, TINY[:1], host=Blind())
    record = stored(store)["cases"]["apply/2x2x9"]
    assert record["contenders"]["dense reference"]["captured"] is None
    assert record["contenders"]["dense reference"]["wall"]
    assert record["rows"]["dense reference"]["status"] == "error"
    assert "captured: RuntimeError: capture failed" in record["rows"]["dense reference"]["reason"]
    assert record["contenders"]["dense reference"]["peak_bytes"]["reason"].startswith(
        "RuntimeError"
    )


def test_no_case_starts_when_the_time_is_over(store):
    run(store, TINY, seconds=29.0)
    for record in stored(store)["cases"].values():
        assert record["status"] == "not measured" and record["reason"] == "the time was over"
    assert states(store) == {"not measured"}
    assert not report.failed(stored(store))
    assert "11 not measured" in shown(stored(store), TINY)


# --- a device that is lost, a process that ends ------------------------------------------------


class Lost(HostClock):
    """From the first error on, nothing works in this process."""

    def __init__(self) -> None:
        self.broken = False

    def check_health(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_device_costs_one_row(store, monkeypatch):
    host = Lost()

    def breaks(stored, v):
        if host.broken or isinstance(stored, work.QuantizedMap):
            host.broken = True
            raise RuntimeError("illegal access")
        return real(stored, v)

    real = work.apply_attention
    monkeypatch.setattr(work, "apply_attention", breaks)
    starts = 0

    def start() -> Ended:
        nonlocal starts
        starts, host.broken = starts + 1, False
        store.load()
        try:
            run(store, TINY[:2], fresh=False, host=host)
        except session.DeviceLostError:
            return Ended(3)
        return Ended(0)

    store.create(TINY[:2])
    command.supervise(store, start, time.time() + 1e6)
    found = stored(store)["cases"]
    assert {name: row["status"] for name, row in found["apply/2x2x9"]["rows"].items()} == {
        "dense reference": "measured", "uint8 reference": "error",
        "e4m3 reference": "error", "factored reference": "measured",
    }  # fmt: skip
    assert starts == 3 and found["apply/2x2x9"]["lost"] == ["uint8 reference", "e4m3 reference"]
    assert found["attention/2x2x9"]["rows"]["dense reference"]["status"] == "measured"


class Ended:
    """A process that has ended, or, without a code, one that has to be killed."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9

    def wait(self) -> int:
        assert self.code is not None
        return self.code


def begins(store, name: str, ago: float = 0.0) -> None:
    store.load()
    store.case(name).update(status="running", began=time.time() - ago)
    store.save()


def test_a_killed_process_costs_its_case(store):
    def start() -> Ended:
        store.load()
        if store.case("apply/2x2x9")["status"] == "not measured":
            begins(store, "apply/2x2x9")
            return Ended(-11)
        run(store, TINY[:2], fresh=False)
        return Ended(0)

    store.create(TINY[:2])
    command.supervise(store, start, time.time() + 1e6)
    found = stored(store)["cases"]
    assert found["apply/2x2x9"]["status"] == "error"
    assert found["apply/2x2x9"]["rows"]["dense reference"]["reason"] == "ended its process with -11"
    assert found["attention/2x2x9"]["rows"]["dense reference"]["status"] == "measured"


@pytest.mark.parametrize(
    ("seconds", "status", "reason"),
    [(1e6, "error", "was not done after 5 s"), (0.0, "not measured", "the time was over")],
)
def test_a_case_that_does_not_end_is_ended(store, seconds, status, reason):
    first = True

    def start() -> Ended:
        nonlocal first
        if first:
            first = False
            begins(store, "attention/2x2x9", ago=10)
            return Ended(None)
        return Ended(0)

    store.create(TINY[:2])
    command.supervise(store, start, time.time() + seconds, stuck=5, nap=0)
    row = stored(store)["cases"]["attention/2x2x9"]["rows"]["dense reference"]
    assert row == {"status": status, "reason": reason}


def test_processes_that_never_begin_are_not_started_for_ever(store):
    starts = []

    def start() -> Ended:
        starts.append(1)
        return Ended(1)

    store.create(TINY)
    command.supervise(store, start, time.time() + 1e6)
    assert len(starts) == command.FALSE_STARTS
    assert {
        row["status"] for c in stored(store)["cases"].values() for row in c["rows"].values()
    } == {"not measured"}


def test_results_are_whole_at_every_moment(store, monkeypatch):
    store.create(TINY)
    before = store.file.read_bytes()
    store.data["cases"]["apply/2x2x9"]["bad"] = math.nan  # no JSON
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save()
    assert store.file.read_bytes() == before
    assert list(store.file.parent.iterdir()) == [store.file]


# --- the CUDA kernels, emulated where there is no GPU -----------------------------------------


def both_families(*forms: str, bars: tuple[Bar, ...] = ()) -> rows.Rows:
    return {f"{form} {name}": bars for form in forms for name in (rows.HOPPER, rows.AMPERE)}


DENSE_AND_CODED = {"dense reference": (), **both_families("dense", "uint8")}
NEW = (
    Case("apply", (1, 2, 21), DENSE_AND_CODED | both_families("e4m3"), ("eager",)),
    Case("attention", (1, 2, 21), DENSE_AND_CODED, ("eager",)),
    Case("sharing", (1, 2, 21), {"fused cuda/sm_90a": (), "dense cuda/sm_90a": ()}, ("eager",)),
    Case("pool-max", (1, 5, 16), {"fused cuda": ()}, ("eager",)),
    Case("pool-depthwise", (1, 5, 16), {"fused cuda": ()}, ("eager",)),
)


@pytest.fixture
def kernels():
    with helpers.cuda_kernels("sm_90a", gradients=False):  # skips where a GPU is no Hopper
        yield


def try_out(store, cases, host=None) -> list[str]:
    said: list[str] = []
    clock = host or HostClock()
    trial.run(store, cases, clock, device=helpers.CUDA_DEVICE, say=said.append)
    return said


def test_new_kernels_are_tried_then_measured_beside_the_others(store, kernels):
    store.create(NEW)
    said = try_out(store, NEW)
    assert len(said) == 14 and said[0] == "tried apply/1x2x21 dense cuda/sm_90a: right"
    assert states(store) == {"not measured"}
    run(store, NEW, fresh=False, device=helpers.CUDA_DEVICE)
    assert states(store) == {"measured"}
    record = stored(store)["cases"]["apply/1x2x21"]
    ratios = record["ratios"]["uint8 cuda/sm_90a"]
    assert set(ratios) == {*NEW[0].rows, "eager"} - {"uint8 cuda/sm_90a"}
    line = next(line for line in report.lines(stored(store), NEW) if "uint8" in line.title)
    assert line.over_dense == record["ratios"][line.name]["dense cuda/sm_90a"]


def test_new_kernels_that_nobody_has_tried_are_not_measured(store, kernels):
    run(store, NEW[1:2])
    found = stored(store)["cases"]["attention/1x2x21"]["rows"]
    assert found.pop("dense reference")["status"] == "measured"
    assert {(row["status"], row["reason"]) for row in found.values()} == {
        ("not measured", session.UNTRIED)
    }
    assert not report.failed(stored(store))


def test_a_row_is_served_by_its_family_alone(kernels):
    place = torch.device(helpers.CUDA_DEVICE)
    before = registry.forced()
    for name in ("sm_90a", "sm_80"):
        with providers.serving(f"cuda/{name}"):
            assert cuda.family(place) == name and registry.forced() == "cuda"
    assert registry.forced() == before and cuda.family(place) == "sm_90a"


def test_what_the_kernels_refuse_is_no_failure(store, kernels):
    cases = [Case("attention", (1, 1, 280), both_families("dense"), ("eager",))]
    store.create(cases)
    assert "refused" in try_out(store, cases)[0]
    run(store, cases, fresh=False, device=helpers.CUDA_DEVICE)
    for row in stored(store)["cases"]["attention/1x1x280"]["rows"].values():
        assert row["status"] == "refused" and "280 tokens > 272" in row["reason"]
    assert not report.failed(stored(store))


def test_a_wrong_new_kernel_costs_its_row(store, kernels, monkeypatch):
    wrong = spoilt(cuda._apply, lambda out: out * 1.1)
    monkeypatch.setattr(cuda, "_apply", wrong)
    cases = [Case("apply", (1, 2, 21), {"dense reference": (), "dense cuda/sm_80": ()}, ("eager",))]
    store.create(cases)
    try_out(store, cases)
    run(store, cases, fresh=False, device=helpers.CUDA_DEVICE)
    found = stored(store)["cases"]["apply/1x2x21"]
    assert found["rows"]["dense cuda/sm_80"]["status"] == "FAILED correctness"
    assert found["rows"]["dense reference"]["status"] == "measured"
    assert set(found["contenders"]) == {"dense reference", "eager"}


#: Two shapes of the same kernels, and another kernel.
THREE = tuple(
    Case(kind, (1, 2, n), {"dense reference": (), "dense cuda/sm_80": ()}, ("eager",))
    for kind, n in (("apply", 5), ("apply", 9), ("attention", 5))
)


def test_a_new_kernel_that_takes_the_device_along_costs_its_own_rows(store, kernels, monkeypatch):
    host = Lost()
    monkeypatch.setattr(cuda, "_apply", lambda *args: setattr(host, "broken", True))
    starts = 0

    def start() -> Ended:
        nonlocal starts
        starts, host.broken = starts + 1, False
        store.load()
        try:
            try_out(store, THREE, host)
        except session.DeviceLostError:
            return Ended(3)
        return Ended(0)

    store.create(THREE)
    command.supervise(store, start, time.time() + 1e6)
    run(store, THREE, fresh=False, device=helpers.CUDA_DEVICE)
    found = [stored(store)["cases"][case.name]["rows"] for case in THREE]
    assert starts == 2
    assert [rows["dense cuda/sm_80"]["status"] for rows in found] == ["error", "error", "measured"]
    assert "not tried, as in apply/1x2x5 it took" in found[1]["dense cuda/sm_80"]["reason"]
    assert {rows["dense reference"]["status"] for rows in found} == {"measured"}


@pytest.mark.parametrize("code", [None, -11])
def test_a_new_kernel_that_ends_its_process_or_never_ends_costs_its_own_rows(store, code):
    first = True

    def start() -> Ended:
        nonlocal first
        if not first:
            return Ended(0)
        first = False
        store.load()
        record = store.case("apply/1x2x5")
        record.update(status="running", began=time.time() - 10, trying="dense cuda/sm_80")
        store.save()
        return Ended(code)

    store.create(THREE)
    command.supervise(store, start, time.time() + 1e6, stuck=5, nap=0)
    found = [stored(store)["cases"][case.name] for case in THREE]
    why = "was not done after 5 s" if code is None else "ended its process with -11"
    assert found[0]["rows"]["dense cuda/sm_80"] == {"status": "error", "reason": why}
    assert found[1]["rows"]["dense cuda/sm_80"]["reason"].endswith(why)
    assert found[2]["rows"]["dense cuda/sm_80"]["status"] == "not measured"
    assert {record["status"] for record in found} == {"not measured"}
    assert {record["rows"]["dense reference"]["status"] for record in found} == {"not measured"}


# --- whole networks -----------------------------------------------------------------------------


@pytest.fixture
def small_network(monkeypatch):
    """One that is made in no time, and not compiled."""
    timm = pytest.importorskip("timm")

    def make(name: str, side: int) -> torch.nn.Module:
        options = {"depth": 4, "num_heads": 2, "embed_dim": 32, "num_classes": 10}
        return timm.create_model(name, img_size=side, **options).eval()

    monkeypatch.setattr(network, "_host", make)
    monkeypatch.setattr(network, "compiled", lambda function: function)


def network_case(*served: str, schedule: str = "AS|AS", bars: tuple[Bar, ...] = ()) -> Case:
    rows = {f"{schedule} {name}": bars for name in served}
    return Case("model-vit_tiny_patch16_224", (2, 64, 64), rows, ("unconverted/math",))


def test_a_network_beside_the_unconverted_one(store, kernels, small_network):
    bars = (Bar("flops", 0.97, "unconverted"),)
    case = network_case("reference", "cuda/sm_90a", bars=bars)
    store.create([case])
    try_out(store, [case])
    run(store, [case], fresh=False, device=helpers.CUDA_DEVICE)
    record = stored(store)["cases"][case.name]
    assert states(store) == {"measured"}, record["rows"]
    row = record["rows"]["AS|AS cuda/sm_90a"]
    assert row["flops"] > 0 and row["bytes"] is None and row["flops_ratio"] > 1
    line = report.lines(stored(store) | {"rates": RATES}, [case])[1]
    speedup = record["ratios"][line.name]["unconverted/math"]["median"]
    (verdict,) = line.verdicts
    assert line.rival == "unconverted/math"
    assert verdict.value == pytest.approx(speedup / row["flops_ratio"])
    assert line.share_of_copy is None and report.fields(line)


def test_a_network_with_a_call_that_its_provider_refuses_says_so(store, kernels, small_network):
    wide = network_case("cuda/sm_90a", "reference")
    wide = Case(wide.kind, (1, 288, 288), wide.rows, wide.baselines)  # 325 tokens
    store.create([wide])
    try_out(store, [wide])
    run(store, [wide], fresh=False, device=helpers.CUDA_DEVICE)
    found = stored(store)["cases"][wide.name]["rows"]
    assert found["AS|AS cuda/sm_90a"]["status"] == "refused"
    assert "325 tokens > 272" in found["AS|AS cuda/sm_90a"]["reason"]
    assert found["AS|AS reference"]["status"] == "measured"


def test_the_pinned_backend_is_compiled_into_the_unconverted_network(small_network, monkeypatch):
    """With ``torch.compile`` itself, but without a compiler behind it."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    backend = aot_autograd(fw_compiler=record)
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    monkeypatch.setattr(network, "compiled", compiled)
    host = network._host("vit_tiny_patch16_224", 32)
    with torch.no_grad():
        for name in ("unconverted/math", "unconverted/flash"):
            network._pinned(host, name)(torch.randn(1, 3, 32, 32))
    math_graph, flash_graph = graphs
    assert any("flash_attention" in target for target in flash_graph)
    assert not any("flash_attention" in target for target in math_graph)


# --- the sanitizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", sanitize.KERNELS)
def test_small_cases_run(kernels, kernel):
    sanitize.run(kernel, helpers.CUDA_DEVICE)


TOOL = """#!{python}
import sys, time
kernel, tool = sys.argv[-1], sys.argv[2]
assert sys.argv[1] == "--tool" and sys.argv[-3:-1] == ["-m", "bench.gpu.sanitize"]
print("looked at", kernel)
time.sleep(60 if kernel == "slow" else 0)
sys.exit({{"apply": int(sys.argv[4]) * (tool == "racecheck"), "refused": 1}}.get(kernel, 0))
"""


def test_what_the_sanitizer_says_is_told(monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "SECONDS", 2.0)
    found = sanitize.examine(str(tool), ("pool", "apply", "refused", "slow"))
    assert {
        kernel: [each["status"] for each in tools.values()] for kernel, tools in found.items()
    } == {
        "pool": ["clean", "clean"],
        "apply": ["clean", "errors found"],
        "refused": ["did not run", "did not run"],
        "slow": ["did not end", "did not end"],
    }
    assert found["apply"]["racecheck"]["report"] == "looked at apply\n"


def test_where_there_is_no_sanitizer_the_file_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr(sanitize.machine, "describe", lambda: {"commit": "abc"})
    assert command.main(["--sanitize", "--out", str(tmp_path / "new")]) == 2
    assert "not available" in capsys.readouterr().out
    data = json.loads((tmp_path / "new" / sanitize.FILE).read_text())
    assert data["available"] is False and data["kernels"] == {} and data["commit"] == "abc"


# --- the command ----------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "new")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_no_such_case(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--cases", "nothing"]) == 2
    assert "no case matches" in capsys.readouterr().err


def test_from_a_checkout(tmp_path):
    words = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "new")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("status", "code"), [("measured", 0), ("FAILED correctness", 1)])
def test_exit_code(monkeypatch, tmp_path, status, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "show", lambda data, console: None)

    def supervise(store, start, deadline, stuck=0.0) -> None:
        for record in store.data["cases"].values():
            for row in record["rows"].values():
                row["status"] = status

    monkeypatch.setattr(command, "supervise", supervise)
    assert command.main(["--out", str(tmp_path), "--cases", "pool"]) == code


@pytest.mark.parametrize(("cases", "processes"), [("pool", ["trial", "work"]), ("group", ["work"])])
def test_new_kernels_are_tried_before_anything_is_measured(monkeypatch, tmp_path, cases, processes):
    """Each process as the command starts it, but in this one."""
    began = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "show", lambda data, console: None)
    monkeypatch.setattr(command, "try_out", lambda store, cases: began.append("trial") or 0)
    monkeypatch.setattr(command, "work", lambda store, cases, over: began.append("work") or 0)

    def start(words: list[str], cwd: Path) -> Ended:
        assert words[:3] == [sys.executable, "-m", "bench.gpu"] and cwd == ROOT
        return Ended(command.main(words[3:]))

    monkeypatch.setattr(command.subprocess, "Popen", start)
    assert command.main(["--out", str(tmp_path), "--cases", cases]) == 0
    assert began == processes


def test_the_machine_is_described(monkeypatch):
    from bench.gpu import machine

    torch.use_deterministic_algorithms(False)
    rates = machine.rates(HostClock(), "cpu", copied=2**20, size=64)
    assert rates["copy_bytes_per_s"] > 0 and rates["exp_per_s"] > 0
    assert set(rates["matrix_flops_per_s"]) == {"bfloat16", "float16"}
    assert {"torch", "triton", "cuda", "python"} <= set(machine.versions())
    monkeypatch.setattr(machine.host, "commit", lambda: None)
    monkeypatch.delenv("PSVIT_COMMIT", raising=False)
    assert machine.commit().startswith("sources-") and machine.commit() == machine.commit()
    monkeypatch.setenv("PSVIT_COMMIT", "abc-dirty")
    assert machine.commit() == "abc-dirty"


# --- what the results say ---------------------------------------------------------------------


def made_up() -> tuple[dict, Case]:
    """Times that make the sums easy."""
    bars = (Bar("copy", 0.5), Bar("speed-up", 2.0), Bar("map", 2.5), Bar("launches", 1.0))
    case = Case(
        "attention", (1, 1, 10), {"dense triton": bars}, ("sdpa/flash", "sdpa/math"), "float32"
    )
    record = session.blank(case)
    record["rows"]["dense triton"] |= {
        "status": "measured", "error": {"psvit": 1e-3, "eager": 2e-3},
        "flops": 1e4, "bytes": 1e3, "map_bytes": 400,
    }  # fmt: skip

    def timed(us: float, launches: int) -> dict:
        quantiles = {"median": us, "p20": us * 0.9, "p80": us * 1.1, "samples": 50}
        entry = {"captured": quantiles, "wall": quantiles, "reason": None}
        return entry | {"peak_bytes": 2_000_000, "launches": ["kernel"] * launches}

    record["contenders"] = {"dense triton": timed(2.0, 2), "sdpa/flash": timed(4.2, 1)}
    record["contenders"]["sdpa/math"] = timed(9.0, 5)
    record["ratios"] = {
        "dense triton": {
            "sdpa/flash": {"median": 2.1, "p20": 2.0, "p80": 2.2},
            "sdpa/math": {"median": 4.5, "p20": 4.4, "p80": 4.6},
        }
    }
    return {"cases": {case.name: record}, "rates": RATES, "kind": session.KIND}, case


def test_bars():
    data, case = made_up()
    (line,) = report.lines(data, [case])
    assert line.rival == "sdpa/flash"
    values = [verdict.value for verdict in line.verdicts]
    assert values == pytest.approx([0.5, 2.1, 2.1 + 0.2, 0.5])
    assert [verdict.reached for verdict in line.verdicts] == [True, True, False, False]
    assert line.share_of_matrix == pytest.approx(0.5)
    printed = shown(data, [case])
    assert "bars: 2 reached, 2 missed, of 4" in printed
    assert "sdpa + writing the map: 2.30, MISS" in printed
    del data["cases"][case.name]["contenders"]["sdpa/flash"]["launches"]
    assert report.lines(data, [case])[0].verdicts[3].value is None


def test_markdown_without_results_holds_no_figure():
    tables = [table.splitlines() for table in report.markdown(None).split("\n\n")]
    assert [len(table) for table in tables] == [
        2 + sum(len(case.rows) for case in cases) for cases in (rows.OPERATIONS, rows.MODELS)
    ]
    for row in (row for table in tables for row in table[2:]):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
        assert cells[2] == "not measured" and not any(cells[3:10]), row
        assert cells[10] and not cells[11] and len(cells) == 12


def test_markdown_of_some_rows(monkeypatch):
    data, case = made_up()
    other = Case("apply", (1, 1, 10), {"dense triton": ()}, ())
    monkeypatch.setattr(report, "OPERATIONS", [case, other])
    text = report.markdown(data)
    start = (
        "| attention/1x1x10 dense | triton | 2.0 (1.8 to 2.2) | sdpa/flash | 2.10 (2.00 to 2.20)"
    )
    assert start in text
    assert "| yes; yes; no; no |" in text
    assert "| apply/1x1x10 dense | triton | not measured |" in text and "model-" not in text


def test_pictures(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bench import plot

    data, case = made_up()
    other = Case("apply", (1, 1, 10), {"dense triton": (Bar("speed-up", 1.0),)}, ())
    pool = Case("pool-max", (1, 3, 8), {"fused triton": ()}, ())
    real = report.lines
    monkeypatch.setattr(report, "lines", lambda data: real(data, [case, other, pool]))
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    plot.main([str(tmp_path)])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gpu.json", "roofline.png", "speedup.png"
    ]  # fmt: skip
    for draw in (plot.roofline, plot.speedups):
        under = draw(report.lines(data)).get_supxlabel()
        assert under == "not measured: apply/1x1x10 dense triton, pool-max/1x3x8 fused triton"
    data["cases"] = {}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path)])
    assert "holds no measured row" in capsys.readouterr().err


def test_the_pictures_of_the_cpu_are_drawn_still(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from bench import plot

    (file,) = (ROOT / "bench" / "results").glob("cpu-*.json")
    plot.main([str(file), "--output", str(tmp_path / "cpu.png")])
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    plot.main(["--markdown"])
    assert "not measured" in capsys.readouterr().out


# --- on a GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_clock_of_a_device():
    device = clock.CudaClock()
    x = torch.randn(2**20, device="cuda")
    calls = [partial(torch.add, x, 1.0)] * 4
    device.warm_up(calls)
    for sampler in (device.captured(calls), device.wall(calls)):
        assert 0 < sampler() < 1e6
    assert device.peak_bytes(calls[0]) == x.nbytes
    assert len(device.launches(calls[0])) == 1
    with pytest.raises(RuntimeError):
        device.captured([lambda: x.sum().item()])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with nullcontext():
        device.release()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_session_on_a_device(store):
    cases = [Case("pool-max", (2, 5, 16), {"fused reference": ()}, rows.POOL)]
    store.create(cases)
    options = {"device": "cuda", "deadline": time.time() + 1e6}
    session.run(store, cases, clock.CudaClock(), **options, rounds=(3, 3))
    assert stored(store)["cases"][cases[0].name]["rows"]["fused reference"]["status"] == "measured"
