"""``psvit plan``, ``calibrate`` and ``distill``: files that ``psvit accelerate --plan`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_sources import write_images

pytest.importorskip("timm")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

import timm
from safetensors.torch import save_file

from psvit import cli
from psvit.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

#: timm's smallest ViT, with few tokens.
MODEL = "test_vit"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photos and weights."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    write_images(folder / "photos", 40, side=160)
    save_file(timm.create_model(MODEL).state_dict(), folder / "vit.safetensors")
    return folder


def run(capsys, place: Path, command: str, *arguments: str) -> tuple[int, str, str]:
    options = ["--weights", str(place / "vit.safetensors"), "--images", str(place / "photos")]
    code = cli.main([command, MODEL, *options, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_calibrate_distill_and_accelerate_hand_a_plan_on(place, tmp_path, capsys):
    plan, tuned = (str(tmp_path / name) for name in ("plan.json", "tuned.json"))
    arguments = ("--schedule", "AASAAA", "--merge", "3,0,2,0,0,1", "--output", plan)
    code, out, err = run(capsys, place, "calibrate", *arguments)
    assert code == 0, err
    assert "AASAAA" in out and "Written to" in out
    assert Plan.load(plan).merge == (3, 0, 2, 0, 0, 1)
    code, out, err = run(
        capsys, place, "distill", "--plan", plan, "--steps", "2", "--batch", "4", "--output", tuned
    )
    assert code == 0, err
    assert "agreement" in out and "Written to" in out
    arguments = ("--plan", tuned, "--seconds", "0.1", "--select", ":8", "--json")
    code, out, err = run(capsys, place, "accelerate", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["schedule"] == "AASAAA" and found["tuned"]
    fresh = timm.create_model(MODEL)
    assert set(Plan.load(plan).corrections) <= set(fresh.state_dict())


def test_plan_keeps_a_budget(place, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    arguments = ("--budget", "flops<=0.95", "--pools", "0", "--no-merge")
    arguments += ("--output", str(plan), "--json")
    code, out, err = run(capsys, place, "plan", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["cost"] <= 0.95 and "S" in found["schedule"] and "|" not in found["schedule"]
    kept = Plan.load(plan)
    assert kept.schedule.text == found["schedule"] and not any(kept.merge)
    shown = str(kept)
    assert "for flops<=0.95" in shown and "chosen" in shown
    assert all(row["schedule"] in shown for row in found["tried"])
    assert plan.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_plan_merges(place, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    arguments = ("--budget", "flops<=0.8", "--pools", "0", "--output", str(plan))
    code, out, err = run(capsys, place, "plan", *arguments)
    assert code == 0, err
    merge = Plan.load(plan).merge
    assert any(merge) and f"layers merge {', '.join(map(str, merge))}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("plan", ("--budget", "cheap"), "budget: got 'cheap', expected for example flops<=0.7"),
        ("plan", ("--budget", "flops<=0.9", "--output", "p.txt"), "--output: got p.txt, expected"),
        ("calibrate", ("--schedule", "AAS"), 'schedule "AAS": has 3 layers, expected 6'),
        ("calibrate", ("--schedule", "SAAAAA"), "layer 1 shares, but none attends before it"),
        ("calibrate", ("--schedule", "AAAAAA", "--merge", "1,2"), "merge: got 2 numbers, expected"),
        ("distill", ("--plan", "nowhere.json"), "nowhere.json: No such file"),
        ("distill", ("--plan", "p.json", "--resume"), "--resume: expected --state too"),
        ("accelerate", ("--plan", "nowhere.json"), "nowhere.json: No such file"),
    ],
)
def test_bad_input_is_one_line(place, capsys, command, arguments, message):
    code, out, err = run(capsys, place, command, *arguments)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "calibrate"])
def test_images_must_be_named(capsys, command):
    option = {"plan": ("--budget", "flops<=0.9"), "calibrate": ("--schedule", "AASAAA")}[command]
    assert cli.main([command, MODEL, *option]) == 2
    assert "--images: missing" in capsys.readouterr().err
