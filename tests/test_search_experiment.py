"""psvit experiment search, in miniature."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from surroundings import threads

from psvit import cli

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def quick(monkeypatch):
    from psvit.experiments import search
    from psvit.experiments.training import Recipe

    small = search.Settings(
        seeds=2, epochs=1, population=3, generations=2, recipe=Recipe(1, 60, 1e-3, 1), processes=1
    )
    few = search.digits().few(60, seed=0)
    few = replace(few, test_images=few.test_images[:50], test_labels=few.test_labels[:50])
    monkeypatch.setattr(search, "digits", lambda: few)
    with threads(1):
        yield small


def test_the_search_experiment(quick, tmp_path, capsys, monkeypatch):
    from psvit.experiments import search

    results = search.run(quick, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    by_hand = {run["trained"]["by hand"]["flops"] for run in results["searches"]}
    assert len(by_hand) == 1
    for run in results["searches"]:
        for row in run["trained"].values():
            assert row["flops"] <= max(by_hand) and len(row["times"]) == 3
            assert row["accuracy"] == pytest.approx(sum(row["times"]) / 3)
        for curve in run["best"].values():
            assert len(curve) == len(results["costs"]) and sorted(curve) == curve
    gains = [run["reach"]["evolution"] - run["reach"]["random"] for run in results["searches"]]
    assert results["gain"]["mean"] == pytest.approx(sum(gains) / 2, abs=1e-6)

    again = search.run(quick, tmp_path)  # nothing is left to do
    assert again["searches"] == results["searches"]

    monkeypatch.setattr(search, "Settings", lambda **chosen: quick)
    assert cli.main(["experiment", "search", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "6 of 5,292" in out and "by hand" in out and "seed 1" in out


def test_a_folder_with_other_searches_stays(quick, tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"experiment": "init"}')
    assert cli.main(["experiment", "search", "--output", str(tmp_path)]) == 2
    assert "experiment: init there, search here" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]
