"""The demo in miniature, what it writes, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from surroundings import silent

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from psvit import demo
from psvit.digits import Digits, Training, accuracy, jittered, small_vit
from psvit.files import whole_file, whole_folder
from psvit.schedule import Schedule
from psvit.timing import Latency, interleaved, unsteady

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = demo.Settings(
    epochs=1, tune_epochs=1, width=32, depth=4, heads=2, shared=1, batch=4, seconds=0, analysed=8
)
FILES = ["accuracy-latency.png", "attention-maps.png", "attention-similarity.png", "results.json"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Digits:
    """A few of the digits, so that an epoch takes no time."""
    digits = Digits(*(part[:24] for part in Digits.load()))
    monkeypatch.setattr(Digits, "load", classmethod(lambda cls: digits))
    return digits


def test_writes_a_consistent_table_and_the_pictures(few: Digits, tmp_path: Path) -> None:
    results = demo.run(TINY, tmp_path / "out", silent)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    for name in FILES[:3]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    original, converted, tuned = results["rows"]
    schedule = Schedule.parse(results["schedule"], depth=4)
    assert schedule.shared == 1 and schedule.pools == (2,)
    assert original["schedule"] == "AAAA" and original["speed_up"] == 1
    assert converted["schedule"] == tuned["schedule"] == str(schedule)
    assert converted["flops"] == tuned["flops"] < original["flops"]
    assert converted["params"] < original["params"]
    assert {"PyTorch eager", "PyTorch SDPA", "psvit reference"} <= original["latency"].keys()
    for row in results["rows"]:
        assert 0 <= row["accuracy"] <= 1
        if results["providers"]["cpu"] == "ready":
            assert row["largest_difference"] < 1e-4
            assert row["latency"]["psvit cpu"]["calls"] >= 5
        else:
            assert row["largest_difference"] is None and "psvit cpu" not in row["latency"]


def test_a_seed_fixes_the_result(few: Digits, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, second = (demo.run(TINY, tmp_path / name, silent) for name in "ab")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers moved"
    assert [r["accuracy"] for r in first["rows"]] == [r["accuracy"] for r in second["rows"]]
    assert first["analysis"] == second["analysis"]


@pytest.mark.parametrize("at", ["training", "fine-tuning", "latency"])
def test_ctrl_c_leaves_nothing(few: Digits, tmp_path: Path, at: str) -> None:
    @contextmanager
    def interrupted(title: str, total: float) -> Iterator:
        def step(count: float = 1) -> None:
            if title.startswith(at):
                raise KeyboardInterrupt

        yield step

    with pytest.raises(KeyboardInterrupt):
        demo.run(TINY, tmp_path / "out", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_drawing_keeps_what_was_there(
    few: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "results.json").write_text("earlier")
    monkeypatch.setattr(demo, "draw_attention", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(TINY, tmp_path, silent)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_digits_are_split_evenly_and_without_overlap() -> None:
    digits = Digits.load()
    assert len(digits.images) == 1347 and len(digits.test_images) == 450
    assert digits.images.shape[1:] == (1, 8, 8)
    assert digits.images.min() == -1 and digits.images.max() == 1
    counts = torch.bincount(digits.test_labels, minlength=10)
    assert counts.min() >= 43 and counts.max() <= 46


def test_jitter_keeps_the_image_in_place() -> None:
    images = Digits.load().images[:200]
    moved = jittered(images)
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1 + 1e-6
    assert (moved.mean(0) - images.mean(0)).abs().mean() < 0.15
    assert not torch.equal(moved, images)


def test_training_learns_and_distils(few: Digits) -> None:
    torch.manual_seed(0)
    model, student = small_vit(32, 2, 2), small_vit(32, 2, 2)
    Training(25, rate=3e-3, batch=8).run(model, few, lambda: None)
    seen = Digits(few.images, few.labels, few.images, few.labels)
    assert accuracy(model, seen) > 0.7 and not model.training
    before = (student(few.images).log_softmax(1) - model(few.images).log_softmax(1)).abs().mean()
    Training(5, rate=3e-3, batch=8).run(student, few, lambda: None, teacher=model)
    after = (student(few.images).log_softmax(1) - model(few.images).log_softmax(1)).abs().mean()
    assert after < before


# --- files and timing -----------------------------------------------------------------------


def test_whole_folder_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with whole_folder(tmp_path) as work:
        (work / "new.txt").write_text("new")
        assert not (tmp_path / "new.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "new.txt"]


def test_whole_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), whole_file(target) as work:
        work.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with whole_file(target) as work:
        work.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "whole"


def test_interleaved_calls_in_turn() -> None:
    calls: list[str] = []
    parts: list[float] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = interleaved(functions, seconds=0, rounds=(3, 10), step=parts.append)
    assert "".join(calls) == "aabb" + "ab" * 3  # two calls each to warm up
    assert sum(parts) == pytest.approx(1)
    assert found["a"].calls == 3
    assert found["a"].p20 <= found["a"].median <= found["a"].p80


def test_a_busy_machine_is_remarked_on() -> None:
    steady, shaken = Latency(1.0, 0.9, 1.1, 9).to_dict(), Latency(1.0, 0.9, 1.8, 9).to_dict()
    assert unsteady([steady, steady]) is None
    assert "varied by 2.0x" in str(unsteady([steady, shaken]))
