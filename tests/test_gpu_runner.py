"""The GPU runner, without a GPU: whole sessions on tiny shapes, on the clock of the host."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from gpu_sessions import (
    BESIDE,
    ROOT,
    TINY,
    Ended,
    HostClock,
    Lost,
    run,
    shown,
    spoilt,
    states,
    stored,
)

from bench.gpu import (
    clock,
    command,
    gate,
    report,
    rows,
    session,
    work,
)
from bench.gpu.rows import Bar, Case

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
    monkeypatch.setitem(report.GROUPS, "operations", (wrong,))
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
    assert "13 not measured" in shown(stored(store), TINY)


# --- a device that is lost, a process that ends ------------------------------------------------


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
    device.release()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_session_on_a_device(store):
    cases = [Case("pool-max", (2, 5, 16), {"fused reference": ()}, rows.POOL)]
    store.create(cases)
    options = {"device": "cuda", "deadline": time.time() + 1e6}
    session.run(store, cases, clock.CudaClock(), **options, rounds=(3, 3))
    assert stored(store)["cases"][cases[0].name]["rows"]["fused reference"]["status"] == "measured"
