"""``psvit experiment convert`` and ``merge`` in miniature: another model, few images."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import hosts
import pytest
import torch
from image_sources import write_images
from surroundings import threads

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

import timm
from safetensors.torch import save_file

import psvit
from psvit import cli
from psvit.experiments import convert, merge


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder as the experiment expects it, with timm's smallest ViT in it."""
    monkeypatch.setattr(convert, "NAME", "test_vit")
    monkeypatch.setattr(convert, "DEPTH", 6)
    monkeypatch.setattr(convert, "SHARED", (1, 2))
    monkeypatch.setattr(convert, "POOLED", (3,))
    monkeypatch.setattr(convert, "BUDGETS", ("flops<=0.8",))
    monkeypatch.setattr(convert, "DISTILLED", ("2 share",))
    monkeypatch.setattr(convert, "FIT", slice(0, 64))
    monkeypatch.setattr(convert, "REPORT", slice(64, 72))
    monkeypatch.setattr(convert, "LONGEST", 2)
    monkeypatch.setattr(convert, "SIDE", 160)
    monkeypatch.setattr(convert, "THREADS", 1)
    monkeypatch.setattr(convert, "SECONDS", 0.1)
    convert.loaded.cache_clear()
    folder = tmp_path / "data"
    write_images(folder / "imagenet_val", 72, side=160)
    (folder / "test_vit").mkdir()
    save_file(timm.create_model("test_vit").state_dict(), folder / "test_vit/model.safetensors")
    with open(folder / "imagenet_val/labels.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "label"))
        for i in range(72):
            rows.writerow((f"{i}.png", i))
    return folder


def run(data: Path, output: Path, *arguments: str) -> int:
    options = ["--data", str(data), "--output", str(output), "--images", "64", "--seeds", "1"]
    with threads(1):
        return cli.main(["experiment", "convert", *options, *arguments])


def test_the_experiment_has_a_row_for_each_model_and_keeps_finished_runs(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--steps", "2") == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    expected = ["original"]
    for name in ("1 share", "2 share", "pooled before 3", "flops<=0.8"):
        expected += [name, f"{name}, naive"]
    expected.insert(expected.index("2 share, naive") + 1, "2 share, distilled")
    assert names == expected
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["original"]["agreement"]["mean"] == 1 and rows["original"]["flops"]["mean"] == 1
    assert rows["2 share"]["schedules"][0].count("S") == 2
    assert rows["2 share"]["schedules"] == rows["2 share, naive"]["schedules"]
    assert rows["pooled before 3"]["schedules"] == ["AAA|AAA"]
    assert rows["flops<=0.8"]["flops"]["mean"] <= 0.8
    assert rows["2 share"]["latency"]["8"]["mean"] > 0 and rows["2 share"]["seconds"]["mean"] > 0
    assert all(word in shown for word in ("2 share", "distilled", "naive", "batch 8"))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/runs").iterdir()}
    assert run(data, tmp_path / "out", "--steps", "2") == 0
    assert kept == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/runs").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "10"), "images: got 10, expected 64 to 64"),
        (("--steps", "-1"), "steps: got -1, expected 0 or more"),
        (("--data", "nowhere"), "data: nowhere has no test_vit/model.safetensors"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, arguments, message):
    assert run(data, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- merge ----------------------------------------------------------------------------------


def test_merging_has_all_its_parts(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(merge.constant, "COUNTS", (2, 5))
    monkeypatch.setattr(merge.planned, "BUDGETS", ("flops<=0.8",))
    monkeypatch.setattr(merge.planned, "STEPS", 2)
    monkeypatch.setattr(merge.planned, "plan", partial(psvit.plan, longest=1, pools=0))
    sizes = {"197 tokens": (160, 64, (0, 1)), "577 tokens": (192, 48, (0, 1))}
    sizes = {name: merge.front.Size(*size) for name, size in sizes.items()}
    monkeypatch.setattr(merge.front, "SIZES", sizes)
    monkeypatch.setattr(merge.front, "MERGED", (0.04, 0.08))
    monkeypatch.setattr(merge.speed, "MODELS", {"test_vit": 9})
    monkeypatch.setattr(merge.speed, "SECONDS", 0.1)
    folder = ["--data", str(data), "--output", str(tmp_path / "out")]
    with threads(1):
        assert cli.main(["experiment", "merge", *folder]) == 0
        shown = capsys.readouterr().out
        assert cli.main(["experiment", "merge", *folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    parts = found["parts"]
    rows = parts["constant"]["rows"]
    assert [row["merge"] for row in rows] == [2, 5] and 1 > rows[0]["flops"] > rows[1]["flops"]
    for row in rows:
        assert row["same"] == 1 and row["accuracy"] == row["plain_accuracy"]
    rows = parts["planned"]["rows"]
    assert [row["name"] for row in rows] == ["flops<=0.8", "flops<=0.8, distilled"]
    for row in rows:
        assert row["flops"] <= 0.8 and len(row["merge"]) == 6
    for tokens, counts in (("197 tokens", [4, 8]), ("577 tokens", [6, 12])):
        rows = parts[f"sharing, {tokens}"]["rows"]
        assert [row["merge"] for row in rows] == 2 * counts
        assert [row["schedule"].count("S") for row in rows] == [0, 0, 1, 1]
        assert rows[0]["flops"] > rows[2]["flops"] and any(row["on_front"] for row in rows)
    (row,) = parts["speed"]["rows"]
    assert set(row["latency"]["8"]) == {"psvit", "plain"} and row["model"] in shown
    assert "EViT" in shown


def test_what_another_row_beats_in_both_is_not_on_the_front():
    row = {"accuracy": 0.8, "flops": 0.5}
    for accuracy, flops, beats in ((0.8, 0.5, False), (0.9, 0.5, True), (0.8, 0.4, True),
                                   (0.9, 0.6, False), (0.7, 0.4, False)):  # fmt: skip
        assert merge.front._beats({"accuracy": accuracy, "flops": flops}, row) is beats


def test_merging_in_plain_pytorch_is_what_psvit_computes():
    model = hosts.timm_vit().double()
    x = hosts.images().double()
    with torch.no_grad():
        fast = psvit.accelerate(model, "AAAA", merge=9)
        torch.testing.assert_close(merge.Plain(model, 9)(x), fast(x), rtol=1e-9, atol=1e-9)
