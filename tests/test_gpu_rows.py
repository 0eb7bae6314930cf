"""The rows of the GPU runner, and what tables and pictures say of them."""

from __future__ import annotations

import json
import re

import pytest
from gpu_sessions import RATES, ROOT, shown

from bench.gpu import (
    report,
    rows,
    session,
)
from bench.gpu.rows import Bar, Case


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
    assert bars["merge/256x6x197 fused triton"] == ["4.86x eager", "moonshot: 8.5x eager"]
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


def test_every_network_that_merges_is_there():
    bars = reach()
    for name, pairs in (("deit_small", 13), ("vit_base", 13), ("vit_large", 8)):
        for batch in (1, 32, 256):
            title = f"merging-{name}_patch16_224/{batch}x224x224 merge={pairs} triton"
            assert bars.pop(title) == [
                "0.9x the FLOPs of unconverted", "moonshot: 1x the FLOPs of unconverted"
            ]  # fmt: skip
    assert not [title for title in bars if title.startswith("merging")]
    for case in rows.MERGING:
        (row,) = case.rows
        pairs = row.split()[0].removeprefix("merge=")
        assert case.baselines == (*rows.UNCONVERTED, f"plain/{pairs}")


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
    merge = Case("merge", (256, 6, 197), {"fused triton": ()}, ())
    moved = 256 * 384 * (2 * 197 + 197 - 13)
    assert rows.counts(merge, "fused triton") == (256 * 2 * 98 * 98 * 64, 2 * moved)
    follow = Case("follow", (64, 6, 197), {"fused triton": ()}, ())
    assert rows.counts(follow, "fused triton") == (0, 2 * 64 * 6 * (197**2 + 184**2))


def test_select():
    assert [case.name for case in rows.select("group")] == ["group/64x12x197", "group/64x12x577"]
    assert rows.select(None) == list(rows.CASES)
    assert [case.name for case in rows.select("pool-m*")] == ["pool-max/256x14x768"]
    assert rows.select("merging") == list(rows.MERGING)
    groups = [rows.select(name) for name in ("operations", "networks", "merging")]
    assert [case for group in groups for case in group] == list(rows.CASES)
    with pytest.raises(ValueError, match=r'--cases: got "nothing", .* groups are operations, net'):
        rows.select("nothing")


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
        2 + sum(len(case.rows) for case in cases) for cases in rows.GROUPS.values()
    ]
    for row in (row for table in tables for row in table[2:]):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
        assert cells[2] == "not measured" and not any(cells[3:10]), row
        assert cells[10] and not cells[11] and len(cells) == 12


def test_markdown_of_some_rows(monkeypatch):
    data, case = made_up()
    other = Case("apply", (1, 1, 10), {"dense triton": ()}, ())
    monkeypatch.setitem(report.GROUPS, "operations", (case, other))
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
