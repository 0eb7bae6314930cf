"""The GPU runner and kernels nobody has tried: the CUDA ones, emulated; networks; sanitizer."""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import pytest
import torch
from forced_providers import CUDA_DEVICE, skip_unless_available
from gpu_sessions import RATES, Ended, HostClock, Lost, run, spoilt, states, stored

from bench.gpu import (
    command,
    network,
    providers,
    report,
    rows,
    sanitize,
    session,
    trial,
)
from bench.gpu.rows import Bar, Case
from psvit import Schedule
from psvit_kernels import cpu, cuda, registry


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


def try_out(store, cases, host=None) -> list[str]:
    said: list[str] = []
    clock = host or HostClock()
    trial.run(store, cases, clock, device=CUDA_DEVICE, say=said.append)
    return said


def test_new_kernels_are_tried_then_measured_beside_the_others(store, kernels):
    store.create(NEW)
    said = try_out(store, NEW)
    assert len(said) == 14 and said[0] == "tried apply/1x2x21 dense cuda/sm_90a: right"
    assert states(store) == {"not measured"}
    run(store, NEW, fresh=False, device=CUDA_DEVICE)
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
    place = torch.device(CUDA_DEVICE)
    before = registry.forced()
    for name in ("sm_90a", "sm_80"):
        with providers.serving(f"cuda/{name}"):
            assert cuda.family(place) == name and registry.forced() == "cuda"
    assert registry.forced() == before and cuda.family(place) == "sm_90a"


def test_what_the_kernels_refuse_is_no_failure(store, kernels):
    cases = [Case("attention", (1, 1, 280), both_families("dense"), ("eager",))]
    store.create(cases)
    assert "refused" in try_out(store, cases)[0]
    run(store, cases, fresh=False, device=CUDA_DEVICE)
    for row in stored(store)["cases"]["attention/1x1x280"]["rows"].values():
        assert row["status"] == "refused" and "280 tokens > 272" in row["reason"]
    assert not report.failed(stored(store))


def test_a_wrong_new_kernel_costs_its_row(store, kernels, monkeypatch):
    wrong = spoilt(cuda._apply, lambda out: out * 1.1)
    monkeypatch.setattr(cuda, "_apply", wrong)
    cases = [Case("apply", (1, 2, 21), {"dense reference": (), "dense cuda/sm_80": ()}, ("eager",))]
    store.create(cases)
    try_out(store, cases)
    run(store, cases, fresh=False, device=CUDA_DEVICE)
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
    run(store, THREE, fresh=False, device=CUDA_DEVICE)
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
    run(store, [case], fresh=False, device=CUDA_DEVICE)
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


def test_a_network_that_merges_beside_the_unconverted_one_and_plain_pytorch(
    store, kernels, small_network
):
    """In float32, where no two scores are a rounding apart: else another pair is as right."""
    row, baselines = {"merge=3 reference": rows._of_flops(0.9)}, ("unconverted/math", "plain/3")
    case = Case("merging-vit_tiny_patch16_224", (2, 64, 64), row, baselines, "float32")
    run(store, [case])
    (line,) = report.lines(stored(store) | {"rates": RATES}, [case])
    assert line.measured, line.row
    host = network._host("vit_tiny_patch16_224", 64)
    fewer = Schedule("AAAA").flops(host, merge=3)
    assert line.row["flops"] == 2 * fewer
    assert line.row["flops_ratio"] == pytest.approx(Schedule("AAAA").flops(host) / fewer)
    speedups = {name: line.speedup(name)["median"] for name in baselines}
    assert speedups["plain/3"] > 0 and line.rival == "unconverted/math"
    values = [verdict.value for verdict in line.verdicts]
    assert values == [pytest.approx(speedups["unconverted/math"] / line.row["flops_ratio"])] * 2


def test_a_network_that_merges_wrongly_has_no_speed(store, kernels, small_network, monkeypatch):
    """What merges is spoilt for the row alone, not for its oracle."""
    skip_unless_available("cpu")
    case = Case("merging-vit_tiny_patch16_224", (2, 64, 64), {"merge=3 cpu": ()}, ("plain/3",))

    def spoil(*inputs):
        tokens, *rest = real(*inputs)
        return tokens * 1.5, *rest

    real = cpu.merge_tokens
    monkeypatch.setattr(cpu, "merge_tokens", spoil)
    run(store, [case])
    assert states(store) == {"FAILED correctness"}, stored(store)["cases"]


def test_a_network_with_a_call_that_its_provider_refuses_says_so(store, kernels, small_network):
    wide = network_case("cuda/sm_90a", "reference")
    wide = Case(wide.kind, (1, 288, 288), wide.rows, wide.baselines)  # 325 tokens
    store.create([wide])
    try_out(store, [wide])
    run(store, [wide], fresh=False, device=CUDA_DEVICE)
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
            network._baseline(host, name)(torch.randn(1, 3, 32, 32))
    math_graph, flash_graph = graphs
    assert any("flash_attention" in target for target in flash_graph)
    assert not any("flash_attention" in target for target in math_graph)


# --- the sanitizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", sanitize.KERNELS)
def test_small_cases_run(kernels, kernel):
    sanitize.run(kernel, CUDA_DEVICE)


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
