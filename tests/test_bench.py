"""The machinery of ``psvit bench``: what it reports and what it refuses; never how fast it was."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from forced_providers import skip_unless_available

from psvit.bench import add_arguments, cases, command, cores, main, measure, model, noise
from psvit_kernels.registry import PROVIDERS

TINY = (1, 2, 5, 8)
POOLED = (1, 10, 8)
FLOAT = torch.float32


def tiny_cases() -> list[cases.Case]:
    return [
        cores.apply_case(TINY, FLOAT),
        cores.attention_case(TINY, FLOAT),
        cores.factored_case(TINY, FLOAT),
        cores.head_index_case(TINY, FLOAT),
        cores.correction_case(TINY, FLOAT),
        cores.pool_case("max", FLOAT, POOLED),
        cores.pool_case("avg", FLOAT, POOLED),
        cores.group_case(TINY, FLOAT),
        cores.group_case(TINY, FLOAT, form="factored"),
        cores.apply_case(TINY, torch.bfloat16),
    ]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def tiny(monkeypatch):
    """``psvit bench`` with tiny cases, on a machine measured in passing."""
    monkeypatch.setattr(cases, "all_cases", tiny_cases)
    monkeypatch.setattr(command, "run_cases", partial(command.run_cases, matrix_size=64))


def wrong(case: cases.Case, spoil) -> cases.Case:
    """The case with psvit's results spoilt."""

    def build() -> cases.Work:
        work = case.build()
        return replace(work, psvit=lambda: spoil(work.psvit()))

    return replace(case, build=build)


# --- the table ------------------------------------------------------------------------------


def test_one_case_from_end_to_end(tiny, capsys):
    assert main(arguments("--cases", "apply/1x2x5x8/float32", "--rounds", "2")) == 0
    printed = capsys.readouterr().out
    for expected in ("apply/1x2x5x8/float32", "eager A @ v", "SDPA", "provider", "bars reached"):
        assert expected in printed


def test_json_holds_the_whole_row(tiny, capsys, tmp_path):
    target = tmp_path / "bench.json"
    case = "apply/1x2x5x8/float32"
    words = ("--cases", case, "--rounds", "3", "--json", "--output", str(target))
    before = torch.get_num_threads()
    assert main(arguments(*words, "--threads", "1")) == 0
    assert torch.get_num_threads() == before
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads(target.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]
    assert data["schema"] == 1 and data["threads"] == 1
    assert data["provider"] in PROVIDERS and data["sdpa_backend"] in ("flash", "math")
    assert set(data["machine"]) == {"system", "architecture", "cpu", "cpu_capability", "cores"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["ceilings"]["matrix_gflops"]["float32"] > 0
    assert data["ceilings"]["copy_gbytes_per_s"] > 0
    row = data["rows"][0]
    assert row["case"] == "apply/1x2x5x8/float32" and row["status"] == "measured"
    assert row["error"]["ok"] and row["error"]["error"] <= row["error"]["limit"]
    assert row["flops"] == 2 * 2 * 5 * 5 * 8
    assert row["bytes"] == 4 * (2 * 5 * 5 + 2 * 2 * 5 * 8)
    assert row["microseconds"]["psvit"]["rounds"] == 3
    assert row["percent_of_matrix_rate"] > 0 and row["percent_of_copy"] > 0
    assert set(row["microseconds"]) == {"psvit", *(c["baseline"] for c in row["against"])}
    for comparison in row["against"]:
        assert comparison["p20"] <= comparison["speedup"] <= comparison["p80"]
        assert comparison["reached"] == (comparison["value"] >= comparison["must"])


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name)
def test_every_kind_of_case_agrees_with_its_reference(case):
    row = measure.measure(case, "reference", rounds=1)
    assert row.status == "measured", row.reason
    assert tuple(row.timings) == case.contenders
    assert [c.baseline for c in row.comparisons] == list(case.bars)
    assert all(
        peak is None or peak > 0 for name, peak in row.peak_bytes.items() if name != cores.COPY
    )


def test_only_float32_has_targets():
    for case in cases.all_cases():
        if case.dtype != torch.float32:
            assert all(bar == cases.Bar() for bar in case.bars.values())


def test_names_are_unique_and_selectable():
    names = [case.name for case in cases.all_cases()]
    assert len(set(names)) == len(names)
    assert {c.name for c in cases.select("pool")} == {n for n in names if "pool" in n}
    assert [c.name for c in cases.select(names[3])] == [names[3]]
    assert cases.select("deit*batch8")[0].name.startswith("deit_small")


def test_a_speed_up_is_the_median_of_the_ratios_of_rounds():
    case = cores.apply_case(TINY, FLOAT)
    times = {"psvit": np.array([1.0, 2.0, 4.0]), cores.EAGER_APPLY: np.array([3.0, 2.0, 20.0])}
    result = measure._compare(cores.EAGER_APPLY, case, replace(case.build(), per=2.0), times)
    assert result.speedup == 3.0  # of 3, 1 and 5; the ratio of medians would be 1.5
    assert (result.value, result.must, result.moonshot) == (1.5, 1.4, 2.0)
    assert result.reached is True and result.moonshot_reached is False


def test_rounds_fill_the_time_but_are_never_too_few():
    assert measure._share(11, 1.0) >= 1 and measure._share(10, 1.5) < 1
    assert measure._share(100, 0.9) < 1 <= measure._share(200, 0.1)
    assert measure._share(4, 9.0) < 1 <= measure._share(5, 4.0)


def test_what_others_used_is_a_share_or_unknown(monkeypatch):
    others = noise.Others()
    assert others() is None
    monkeypatch.setattr(noise.Others, "SHORTEST", 0.0)
    cores, own = others._cores, others._own
    monkeypatch.setattr(noise, "_cores", lambda: (cores[0] + 3.0, cores[1] + 4.0))
    monkeypatch.setattr(noise, "_own", lambda: own + 2.0)
    assert others() == pytest.approx(0.25)
    monkeypatch.setattr(noise, "_cores", lambda: cores)
    assert others() is None


def test_contenders_take_turns_and_short_calls_are_timed_together():
    order: list[str] = []
    times, inner = measure.interleave({n: partial(order.append, n) for n in "ab"}, rounds=3)
    assert set(times) == {"a", "b"} and len(times["a"]) == 3
    assert inner["a"] > 1
    turns = [n for i, n in enumerate(order) if i == 0 or n != order[i - 1]]
    assert turns == list("ab") * 4  # one turn each to estimate, three to measure


# --- what it refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out + 1e-3, lambda out: out * float("nan"), lambda out: out.roll(1, 0).roll(1, 1)],
    ids=["off", "nan", "permuted"],
)
def test_no_speed_up_for_a_wrong_kernel(tiny, monkeypatch, capsys, spoil):
    case = wrong(cores.apply_case(TINY, FLOAT), spoil)
    monkeypatch.setattr(cases, "all_cases", lambda: [case])
    assert main(arguments("--rounds", "2")) == 1
    printed = capsys.readouterr().out
    assert "refused" in printed and "eager A @ v" not in printed
    assert main(arguments("--rounds", "2", "--json")) == 1
    data = json.loads(capsys.readouterr().out)
    row = data["rows"][0]
    assert row["status"] == "refused" and "over its limit" in row["reason"]
    assert not row["error"]["ok"]
    assert row["microseconds"] == {} and row["against"] == [] and row["gflops"] is None
    assert data["summary"]["refused"] == 1


def test_one_wrong_output_of_many_is_enough():
    def spoil(outputs):
        return (*outputs[:-1], outputs[-1] + 1)

    row = measure.measure(wrong(cores.group_case(TINY, FLOAT), spoil), "reference", rounds=1)
    assert row.status == "refused" and not row.timings


def test_the_compiled_provider_of_the_cpu_is_the_one_that_is_measured():
    skip_unless_available("cpu")
    assert measure.best_provider() == ("cpu", None)


def test_a_provider_that_cannot_serve_is_said_not_replaced(monkeypatch):
    name = "cpu"
    monkeypatch.setattr(PROVIDERS[name], "supports", lambda op, args: "not today")
    row = measure.measure(cores.apply_case(TINY, FLOAT), name, rounds=1)
    assert row.status == "unavailable" and "not today" in (row.reason or "")
    assert not row.timings


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--cases", "nothing"), '--cases: got "nothing", which no case matches'),
        (("--device", "toaster"), '--device: got "toaster", expected cpu'),
        (("--threads", "0"), "--threads: got 0, expected 1 or more"),
        (("--rounds", "-3"), "--rounds: got -3, expected 1 or more"),
        (("--provider", "magic"), '--provider: got "magic", expected one of'),
        (("--output", "no/such/folder/x.json"), "--output: no/such/folder/x.json: No such file"),
        (("--output", "."), "--output: .: is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny, capsys, words, expected):
    assert main(arguments(*words)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert expected in told.err and told.err.count("\n") == 1


def test_list_runs_nothing(capsys):
    assert main(arguments("--list", "--cases", "group")) == 0
    assert capsys.readouterr().out.split()[0] == "group/8x6x197x64/float32"


# --- a whole model --------------------------------------------------------------------------


def test_a_whole_model_is_held_to_its_flops():
    pytest.importorskip("timm")
    case = model.model_case(
        "AS|AS", 2, img_size=64, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    row = measure.measure(case, "reference", rounds=1)
    assert row.status == "measured", row.reason
    assert row.comparisons[0].per > 1 and row.flops
