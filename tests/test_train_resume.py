"""Training runs that stop: by a signal, an error or a full disk, and that they go on."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from surroundings import interrupted, threads

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

from training_runs import assert_same, four_classes, make, run, started

from psvit import checkpoint, train
from psvit.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")

RESUMED = {"save_every": 2, "drop_path": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return four_classes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with threads(1):
        run(make(data, folder, **RESUMED))
    return folder


@pytest.mark.parametrize("steps", [2, 5, 8, 9])
def test_a_resumed_run_ends_with_the_same_bits(data, tmp_path, steps, whole):
    """Five steps an epoch, a checkpoint every two: in an epoch, at its end, in the next."""
    config = make(data, tmp_path, **RESUMED)
    with interrupted(loop.Run, "update", after=steps), pytest.raises(KeyboardInterrupt):
        run(config)
    run(config, resume=True)
    assert_same(tmp_path, whole)


def test_resuming_a_finished_run_changes_nothing(data, tmp_path, whole):
    config = make(data, tmp_path, **RESUMED)
    run(config)
    (tmp_path / "metrics.jsonl").unlink()  # as if it was killed before it wrote that
    assert len(run(config, resume=True)) == 2
    assert_same(tmp_path, whole)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


#: A process that kills itself, as `kill -9` does, at a place that the test names.
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from psvit import train
from psvit import checkpoint
from psvit.train import loop

where, count = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)

def killing(function):
    def called(*args, **options):
        global count
        count -= 1
        if count == 0 and where == "writing":  # half of the file is on the disk
            function(*args, **options)
            path = args[1].name
            os.truncate(path, os.path.getsize(path) // 2)
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return called

if where == "epoch":
    loop.Run.update = killing(loop.Run.update)
else:
    torch.save = killing(torch.save)
config = train.Config.of(train.config.read_yaml(Path(sys.argv[1])))
train.train(config)
"""


@pytest.mark.parametrize(("where", "count"), [("epoch", 8), ("writing", 3)])
def test_a_run_killed_with_signal_9_goes_on_to_the_same_bits(data, tmp_path, where, count, whole):
    """In the middle of the second epoch, and in the middle of its first checkpoint."""
    import yaml

    config = make(data, tmp_path / "run", **RESUMED)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), where, str(count)]
    done = started(command, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.load(tmp_path / "run", "training run")["epoch"] == (
        1 if where == "epoch" else 0
    )
    left = list((tmp_path / "run").glob(".unfinished-*"))
    assert bool(left) == (where == "writing")
    run(config, resume=True)
    assert_same(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".unfinished-*"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    data, tmp_path, monkeypatch
):
    config = make(data, tmp_path, **RESUMED)
    update = loop.Run.update

    def spoilt(self, images, targets):
        if (self.epoch, self.step) == (1, 3):
            images = images * float("nan")
        return update(self, images, targets)

    monkeypatch.setattr(loop.Run, "update", spoilt)
    message = r"^loss is nan in epoch 2, step 4, a batch of 8 images: train image \d+ of .*four.npz"
    with pytest.raises(train.LossError, match=message):
        run(config)
    state = checkpoint.load(tmp_path, "training run")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in state["learner"].values())


def test_a_full_disk_is_an_error_that_loses_nothing_older(data, tmp_path):
    config = make(data, tmp_path, **RESUMED)
    run(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state = checkpoint.load(tmp_path, "training run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pt"]) // 2, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path, "training run", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_with_a_run_is_not_overwritten(data, tmp_path):
    config = make(data, tmp_path, epochs=1)
    run(config)
    with pytest.raises(ValueError, match=f"^output: {re.escape(str(tmp_path))} holds a checkpoint"):
        run(config)


def test_resuming_with_another_config_lists_the_differences(data, tmp_path):
    config = make(data, tmp_path, epochs=1)
    run(config)
    other = dataclasses.replace(config, epochs=3, lr=0.1, workers=1)
    with pytest.raises(ValueError, match=r"config: epochs was 1, is 3; lr was None, is 0.1$"):
        run(other, resume=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "no such checkpoint to go on from"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "not a whole checkpoint"),
        (lambda path: path.write_bytes(b""), "not a whole checkpoint"),
        (lambda path: torch.save({"a": 1}, path), "not a checkpoint of psvit, or"),
    ],
    ids=["missing", "truncated", "empty", "foreign"],
)
def test_a_checkpoint_that_is_none_is_named(data, tmp_path, spoil, message, whole):
    path = tmp_path / "last.pt"
    path.write_bytes((whole / "last.pt").read_bytes())
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        run(make(data, tmp_path, **RESUMED), resume=True)
    assert str(path) in str(error.value)
