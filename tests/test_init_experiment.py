"""The experiment on structured initialisation, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surroundings import silent

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from psvit import cli
from psvit.experiments import init as experiment
from psvit.experiments.init import ARMS, Settings, check, run

TINY = Settings(
    seeds=2, images=20, epochs=2, batch=10, every=1, early=1, width=16, depth=1, heads=1,
    processes=1,
)  # fmt: skip


def test_every_arm_and_control_runs_and_the_parts_add_up(tmp_path: Path) -> None:
    results = run(TINY, tmp_path / "out", silent)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert [row["name"] for row in results["rows"]] == list(ARMS)
    default = results["rows"][0]
    for row in results["rows"]:
        assert [len(seed) for seed in results["accuracy"][row["name"]]] == [2, 2]
        for when in ("early", "end"):
            parts = {name: value["mean"] for name, value in row[when].items()}
            whole = default[when]["accuracy"]["mean"] + parts["scale"] + parts["rest"]
            assert parts["accuracy"] == pytest.approx(whole)
            assert row["scaled"] or parts["scale"] == 0
    control = next(row for row in results["rows"] if row["name"] == "default + scale")
    assert control["end"]["rest"]["mean"] == pytest.approx(0)


def test_arms_of_a_seed_share_their_default_weights_and_what_they_differ_in() -> None:
    models = {name: experiment._model(TINY, arm, seed=3) for name, arm in ARMS.items()}
    plain = models["timm default"].state_dict()
    for name, model in models.items():
        state = model.state_dict()
        assert torch.equal(state["head.weight"], plain["head.weight"])
        assert torch.equal(state["patch_embed.proj.weight"], plain["patch_embed.proj.weight"])
        if name != "norms of impulse":
            factor = experiment.SCALE if ARMS[name].scaled else 1
            assert torch.equal(state["pos_embed"], plain["pos_embed"] * factor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(epochs=61), "epochs: got 61, expected a multiple of 5 up to 61"),
        (Settings(early=65), "early: got 65, expected a multiple of 5 up to 60"),
        (Settings(images=2000), "images: got 2000, expected 1 to 1347"),
    ],
)
def test_settings_that_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(settings, Path("none"))
    assert str(caught.value) == message


def test_the_command_prints_a_table_with_the_scale_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment, "_learn", lambda *_: {"accuracy": [0.5] * 3})
    arguments = ["experiment", "init", "--epochs", "3", "--processes", "1"]
    arguments += ["--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "default + scale" in shown and "50.0 ± 0.0" in shown and "curves.png" in shown
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["early"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "4"), "--epochs: got 4, expected a multiple of 3"),
        (("--images", "1348"), "images: got 1348, expected 1 to 1347"),
    ],
)
def test_bad_input_of_the_command(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["experiment", "init", *options]) == 2
    assert capsys.readouterr().err == f"psvit experiment: error: {message}\n"
