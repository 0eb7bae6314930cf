"""``psvit train``: flags and YAML, resuming, one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from surroundings import interrupted

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

import numpy as np
import timm
import yaml
from PIL import Image
from safetensors.torch import load_file

from psvit import checkpoint, cli
from psvit.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = (
    *("--model", "psvit", "--schedule", "AS|A", "--widths", "16,32"),
    *("--model-args", "{patch_size: 4, head_dim: 16, mlp_ratio: 1}"),
    *("--epochs", "1", "--warmup-epochs", "0", "--batch", "8", "--lr", "1e-3"),
    *("--workers", "0", "--tensorboard", "false", "--auto-augment", "null"),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty pictures of two classes, in files, to train on and to test on."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("dark", "light"):
            place = tmp_path / "data" / part / label
            place.mkdir(parents=True)
            for i in range(10):
                pixels = rng.integers(0, 100, (16, 16, 3)) + 150 * (label == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path


def run(capsys, folder: Path, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["train", "--output", str(folder / "out"), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(folder: Path, *flags: str) -> tuple[str, ...]:
    return ("--data", str(folder / "data"), "--img-size", "16", *FLAGS, *flags)


def test_flags_make_a_run_and_json_is_what_its_metrics_say(folder, capsys):
    code, out, err = run(capsys, folder, *start(folder, "--json"))
    assert code == 0, err
    lines = (folder / "out/metrics.jsonl").read_text().splitlines()
    assert json.loads(out) == [json.loads(line) for line in lines]
    assert "epoch 1/1: loss" in err and "Written to" in err


def test_flags_win_over_the_file(folder, capsys):
    (folder / "c.yaml").write_text("epochs: 7\nseed: 5\n")
    code, _, err = run(capsys, folder, str(folder / "c.yaml"), *start(folder))
    assert code == 0, err
    written = yaml.safe_load((folder / "out/config.yaml").read_text())
    assert (written["epochs"], written["seed"], written["lr"]) == (1, 5, 1e-3)


def test_resume_needs_no_more_than_the_folder(folder, capsys):
    with interrupted(loop.Run, "update", after=3):
        code, _, err = run(capsys, folder, *start(folder, "--epochs", "3"))
    assert code == 130
    assert f"last.pt is whole: psvit train --resume --output {folder / 'out'}" in " ".join(
        err.split()
    )
    code, _, err = run(capsys, folder, "--resume")
    assert code == 0 and "epoch 2/3" in err and "epoch 1/3" not in err
    assert checkpoint.load(folder / "out", "training run")["epoch"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "data: no such folder: nowhere; expected"),
        ((), "data: missing; expected digits"),
        (("--epochs", "many"), "epochs: got 'many', expected a whole number from 1"),
        (("--model-args", "{a: ["), "model_args: got {a: [, which is not YAML"),
        (("missing.yaml",), "missing.yaml: No such file or directory"),
        (("--resume",), "no such checkpoint to go on from"),
        (("--data", "digits", "--model", "vit_tinny"), 'model: timm has no "vit_tinny"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, arguments, message):
    code, out, err = run(capsys, folder, *arguments)
    assert code == 2 and not out
    assert err.startswith("psvit train: error: ") and message in err and err.count("\n") == 1
    assert not (folder / "out").exists()


def test_an_unknown_key_of_the_file_is_named_with_the_nearest(folder, capsys):
    (folder / "c.yaml").write_text("data: digits\nwarm_up_epochs: 3\n")
    code, _, err = run(capsys, folder, str(folder / "c.yaml"))
    assert code == 2 and 'unknown key "warm_up_epochs"; did you mean warmup_epochs?' in err


def test_a_corrupt_image_stops_the_run_by_its_name_and_is_skipped_if_asked(folder, capsys):
    damaged = folder / "data/train/dark/3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    code, _, err = run(capsys, folder, *start(folder))
    assert code == 1 and f"{damaged}: not an image that can be read" in err.replace("\n", "")
    with pytest.warns(UserWarning, match="3.png: .*; skipped"):
        code, _, err = run(
            capsys, folder, *start(folder, "--skip-corrupt", "true", "--batch", "20")
        )
    assert code == 0, err


def test_ctrl_c_ends_a_run_in_one_line(folder):
    """Sent when the first epoch is done: the process is then in the midst of the others."""
    flags = start(folder, "--epochs", "100000")
    command = [sys.executable, "-m", "psvit", "train", "--output", str(folder / "out"), *flags]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        assert process.stderr is not None
        assert "epoch 1/100000" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; " in err and "Traceback" not in err, err


def test_a_model_of_timm_trains_and_its_weights_load_into_it(folder, capsys):
    code, _, err = run(
        capsys,
        folder,
        *("--data", str(folder / "data"), "--model", "test_vit", "--epochs", "1", "--batch", "8"),
        *("--warmup-epochs", "0", "--workers", "0", "--img-size", "160", "--tensorboard", "false"),
    )
    assert code == 0, err
    weights = load_file(folder / "out/model.safetensors")
    timm.create_model("test_vit", num_classes=2).load_state_dict(weights)
