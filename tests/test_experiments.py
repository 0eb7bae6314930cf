"""Experiments: runs that are kept and resumed, data on the device, shapes of equal FLOPs."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dice
import numpy as np
import pytest
import torch
from surroundings import silent
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from psvits import plain

from psvit import cli
from psvit.experiments import runs, shapes
from psvit.experiments.data import digits, packed, shifted
from psvit.experiments.runs import about, all_runs, check_folder
from psvit.experiments.shapes import INITIALISATIONS, Settings, run, settings_for
from psvit.experiments.tasks import DEIT, TASKS, Shape, Task, costs, model_of
from psvit.experiments.training import Recipe, accuracy, trained

# --- runs -----------------------------------------------------------------------------------


def some_runs(tmp_path: Path, processes: int = 1, out: str = "out", **settings: Any) -> Any:
    common = about("dice", settings)
    learn = partial(dice.throw, tmp_path / "log")
    return all_runs(learn, ["a", "b + c"], 2, tmp_path / out, common, processes, silent)


def made(tmp_path: Path) -> Counter[str]:
    return Counter((tmp_path / "log").read_text().splitlines())


def test_every_arm_runs_with_every_seed_in_one_thread(tmp_path: Path) -> None:
    found = some_runs(tmp_path)
    assert {arm: len(kept) for arm, kept in found.items()} == {"a": 2, "b + c": 2}
    assert made(tmp_path) == {"a 0": 1, "a 1": 1, "b + c 0": 1, "b + c 1": 1}
    assert all(run["threads"] == 1 and run["arm"] == arm for arm in found for run in found[arm])
    assert found["a"][0]["accuracy"] == found["b + c"][0]["accuracy"] != found["a"][1]["accuracy"]


def test_runs_have_the_threads_that_are_asked_for(tmp_path: Path) -> None:
    learn = partial(dice.throw, tmp_path / "log")
    before = torch.get_num_threads()
    found = all_runs(learn, ["a"], 1, tmp_path, about("dice", {}), 1, silent, threads=before + 1)
    assert found["a"][0]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_processes_change_nothing(tmp_path: Path) -> None:
    assert some_runs(tmp_path, 1, "one") == some_runs(tmp_path, 2, "two")


def test_a_second_call_makes_only_the_runs_that_are_missing(tmp_path: Path) -> None:
    first = some_runs(tmp_path, rate=0.1)
    assert some_runs(tmp_path, rate=0.1) == first
    (tmp_path / "out" / "runs" / "b-c-1.json").unlink()
    assert some_runs(tmp_path, rate=0.1) == first
    assert made(tmp_path) == {"a 0": 1, "a 1": 1, "b + c 0": 1, "b + c 1": 2}


def test_what_was_finished_before_an_error_is_kept(tmp_path: Path) -> None:
    def fails_at_last(arm: str, seed: int) -> dict[str, Any]:
        if (arm, seed) == ("b + c", 1):
            raise KeyboardInterrupt
        return dice.throw(tmp_path / "log", arm, seed)

    with pytest.raises(KeyboardInterrupt):
        all_runs(fails_at_last, ["a", "b + c"], 2, tmp_path / "out", about("dice", {}), 1, silent)
    some_runs(tmp_path)
    assert made(tmp_path) == {"a 0": 1, "a 1": 1, "b + c 0": 1, "b + c 1": 1}


def test_a_process_begins_no_other_run_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_interrupted", threading.Event())

    def interrupted(arm: str, seed: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs._run_in_process(runs.Job(interrupted, "a", 0, tmp_path / "a.json"))
    waiting = runs.Job(partial(dice.throw, tmp_path / "log"), "b", 0, tmp_path / "b.json")
    with pytest.raises(KeyboardInterrupt):
        runs._run_in_process(waiting)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_other_settings_are_refused_by_name_and_stay(tmp_path: Path) -> None:
    some_runs(tmp_path, rate=0.1, epochs=3)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")}
    with pytest.raises(ValueError) as caught:
        some_runs(tmp_path, rate=0.2, epochs=3, smoothing=0.5)
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: has runs made otherwise (settings.rate: 0.1 there, 0.2 here; "
        "settings.smoothing: None there, 0.5 here), expected an empty folder or the same"
    )
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")} == before


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": '])
def test_a_damaged_settings_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        check_folder(tmp_path, about("dice", {}))
    assert str(caught.value) == f"{file}: not the settings of an experiment"


# --- data and training ----------------------------------------------------------------------


def write_npz(file: Path, train: int = 40, test: int = 20, side: int = 32) -> Path:
    rng = np.random.default_rng()
    arrays = {}
    for name, count in (("train", train), ("test", test)):
        arrays[f"x_{name}"] = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"y_{name}"] = np.arange(count) % 4
    np.savez(file, **arrays)
    return file


def test_few_images_have_each_class_equally_often() -> None:
    few = digits().few(50, seed=1)
    assert few.labels.bincount(minlength=10).tolist() == [5] * 10
    assert len(few.test_images) == 450
    assert not torch.equal(few.images, digits().few(50, seed=2).images)


def test_packed_images_are_kept_as_bytes_and_normalised_by_batch(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "some.npz")
    data = packed(str(file))
    with np.load(file) as arrays:
        assert torch.equal(data.images[7], torch.tensor(arrays["x_train"][7]).permute(2, 0, 1))
        assert data.labels.tolist() == arrays["y_train"].tolist() and data.classes == 4
        assert data.test_labels.tolist() == arrays["y_test"].tolist()
    assert (data.images.dtype, data.test_images.shape) == (torch.uint8, (20, 3, 32, 32))
    ready = data.ready(data.images)
    mean, deviation = ready.mean((0, 2, 3)), ready.std((0, 2, 3))
    assert mean.abs().max() < 1e-4 and (deviation - 1).abs().max() < 1e-2, (mean, deviation)


def test_data_without_arrays_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"expected digits, an \.npz file or a folder with CIFAR"):
        packed(str(tmp_path))


@pytest.mark.parametrize("mirror", [False, True])
def test_images_are_moved_each_on_its_own_and_mirrored_if_asked(mirror: bool) -> None:
    image = torch.randint(1, 256, (3, 6, 5), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    windows = {
        (y, x, m): window.flip(2) if m else window
        for y in range(5)
        for x in range(5)
        for m in range(1 + mirror)
        for window in [padded[:, y : y + 6, x : x + 5]]
    }
    seen: Counter[tuple[int, int, int]] = Counter()
    for one in shifted(image.repeat(2000, 1, 1, 1), 2, mirror=mirror):
        [place] = [place for place, window in windows.items() if torch.equal(one, window)]
        seen[place] += 1
    assert set(seen) == set(windows), f"never seen: {set(windows) - set(seen)}"
    expected = 2000 / len(windows)
    assert max(seen.values()) < expected + 6 * expected**0.5, seen


def test_training_learns_and_measures_at_its_epochs(tmp_path: Path) -> None:
    data = digits().few(100, seed=0)
    data = replace(data, test_images=data.images, test_labels=data.labels)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    found, seconds = trained(model, data, Recipe(epochs=8, batch=10, rate=1e-2, every=4))
    assert len(found) == 2 and found[-1] == accuracy(model, data) > 0.9
    assert len(seconds) == 8 and min(seconds) > 0
    assert accuracy(model, data, batch=7) == found[-1]


# --- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", TASKS, ids=lambda place: f"{place[0]}-{place[1]}")
def test_shapes_cost_the_same_by_our_counter_and_by_pytorchs(place: tuple[str, int]) -> None:
    task = TASKS[place]
    found = costs(task, classes=10)
    for name, shape in task.shapes.items():
        with torch.device("meta"):
            model, image = model_of(task, shape, classes=10), torch.empty(1, *task.image)
        with FlopCounterMode(display=False) as counter:
            plain(model, image)
        assert found[name]["flops"] == counter.get_total_flops(), name
        assert abs(found[name]["flops"] / found[DEIT]["flops"] - 1) <= 0.02, name


def test_shapes_of_other_flops_are_refused() -> None:
    task = TASKS["digits", 1]
    more = task._replace(shapes={**task.shapes, "PSViT-2D": Shape("AAS|ASA|AS", (96, 128, 160), 2)})
    with pytest.raises(ValueError, match=r"shapes: PSViT-2D has 1\.\d+ of DeiT's FLOPs"):
        costs(more, classes=10)


def test_deits_shape_is_timms_model() -> None:
    from timm.models.vision_transformer import VisionTransformer

    task = TASKS["digits", 1]
    ours = model_of(task, task.shapes[DEIT], classes=10)
    theirs = VisionTransformer(
        img_size=8,
        patch_size=1,
        in_chans=1,
        embed_dim=96,
        depth=4,
        num_heads=3,
        mlp_ratio=2,
        num_classes=10,
    )
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        difference = (ours.eval()(images) - theirs.eval()(images)).abs().max()
    assert difference < 1e-4, difference


SMALL = Task(
    {
        DEIT: Shape("A", (16,), 1),
        "PSViT-1D": Shape("A", (16,), 1),
        "PSViT-2D": Shape("A", (16,), 2),
    },
    (3, 32, 32),
    patch=4,
    head_dim=16,
    mlp_ratio=1,
)


def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **others: Any) -> Settings:
    monkeypatch.setitem(TASKS, ("packed", 4), SMALL)  # type: ignore[arg-type]
    file = write_npz(tmp_path / "some.npz")
    return settings_for(str(file), epochs=2, seeds=2, processes=1, **others)


def test_each_shape_is_trained_from_each_initialisation_on_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    kept = shapes.trained

    def watched(model: Any, data: Any, recipe: Recipe) -> Any:
        before = torch.get_rng_state()
        seen.setdefault(len(data.images), []).append(torch.randperm(len(data.images)))
        torch.set_rng_state(before)
        return kept(model, data, recipe)

    monkeypatch.setattr(shapes, "trained", watched)
    settings = small(tmp_path, monkeypatch, images=20)
    results = run(settings, tmp_path / "out", silent)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0
    [orders] = seen.values()
    for seed in range(2):
        assert all(torch.equal(order, orders[9 * seed]) for order in orders[9 * seed :][:9])
    assert not torch.equal(orders[0], orders[9])
    assert [(r["initialisation"], r["shape"]) for r in results["rows"]] == [
        (init, shape) for init in INITIALISATIONS for shape in SMALL.shapes
    ]
    assert str(tmp_path) not in json.dumps(results), "the place of the data is in the results"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_peak_memory_is_that_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(small(tmp_path, monkeypatch, device="cuda"), tmp_path / "out", silent)
    assert results["gpu"] == torch.cuda.get_device_name()
    assert all(row["peak_bytes"] > 0 for row in results["rows"])


def test_rows_are_differences_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(settings: Settings, arm: str, seed: int) -> dict[str, Any]:
        high = 0.2 * arm.startswith("PSViT-2D") + 0.1 * arm.endswith("impulse")
        slow = 1 + arm.startswith("PSViT-1D")
        return {
            "accuracy": [0.0, 0.3 + high + 0.1 * seed],
            "epoch_seconds": [90.0, 4.0 * slow, 4.0 * slow],
            "peak_bytes": 10 * slow + seed,
        }

    monkeypatch.setattr(shapes, "_learn", learned)
    results = run(small(tmp_path, monkeypatch), tmp_path / "out", silent)
    rows = {(row["shape"], row["initialisation"]): row for row in results["rows"]}
    best = rows["PSViT-2D", "impulse"]
    assert best["accuracy"]["mean"] == pytest.approx(0.65)
    assert best["accuracy"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert best["over_deit"] == pytest.approx({"mean": 0.2, "deviation": 0.0})
    assert best["over_default"] == pytest.approx({"mean": 0.1, "deviation": 0.0})
    slow = rows["PSViT-1D", "default"]
    assert (slow["time"], slow["peak_bytes"]) == (2.0, 21)
    assert slow["images_per_second"] == 40 / 8


def test_the_recipe_measures_the_last_epoch_whatever_their_number() -> None:
    for data in ("digits", "some.npz"):
        for epochs in (None, 1, 7, 12, 97, 100):
            recipe = settings_for(data, epochs=epochs).recipe
            assert recipe.measured[-1] == recipe.epochs == (epochs or recipe.epochs)


def test_the_command_prints_shapes_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"accuracy": [0.5], "epoch_seconds": [2.0], "peak_bytes": 3_000_000}
    monkeypatch.setattr(shapes, "_learn", lambda *_: found)
    arguments = ["experiment", "shapes", "--epochs", "1", "--processes", "1"]
    arguments += ["--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("AAS|AS|AS", "64, 16, 4", "50.0 ± 0.0", "1.00x", "1347 training images"):
        assert text in shown, shown
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1347


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch", "2"), "patch: got 2, expected 1 for this data"),
        (("--images", "1348"), "images: got 1348, expected 1 to 1347"),
        (("--data", "no.npz"), "no.npz"),
        (("--device", "cuda"), "device: got cuda, but PyTorch sees no CUDA device here"),
    ],
)
def test_bad_input_of_the_command(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    output = tmp_path / "out"
    assert cli.main(["experiment", "shapes", *options, "--output", str(output)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("psvit experiment: error: ") and message in shown
    assert shown.count("\n") == 1 and not output.exists()


def test_images_of_another_size_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_npz(tmp_path / "large.npz", side=40)
    assert cli.main(["experiment", "shapes", "--data", str(file)]) == 2
    assert "(channels, height, width) (3, 40, 40), expected (3, 32, 32)" in capsys.readouterr().err


def test_ctrl_c_says_that_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_learn", interrupted)
    output = tmp_path / "out"
    arguments = ["experiment", "shapes", "--processes", "1", "--output", str(output)]
    assert cli.main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
