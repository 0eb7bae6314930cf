"""A whole search: what it writes, that it goes on where it stopped, and the command."""

from __future__ import annotations

import json
import random
import shlex
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from surroundings import silent

from psvit import Schedule, cli, latency_cache, timing

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from psvit.search.data import held_out_data
from psvit.search.pareto import Score, front
from psvit.search.run import Search, Settings
from psvit.search.space import Candidate, SearchSpace
from psvit.search.training import Data
from psvit.train.data import Loading
from psvit.train.packed import Packed
from psvit.train.sources import Source

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = SearchSpace(
    depths=((1, 2), (1, 2)),
    widths=((8, 16), (8, 16, 24)),
    head_dim=8,
    img_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=3,
    mlp_ratio=1.0,
)
SETTINGS = Settings(epochs=2, population=4, generations=3, control=True, limit="flops<=0.8")
#: Steps of a whole search: batches of two epochs, candidates of two searches.
STEPS = 2 * 3 + 2 * 12


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def learnable(seed: int = 0) -> Data:
    """Three classes that differ in brightness."""

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        labels = torch.randint(3, (16,), generator=generator)
        noise = torch.randn(16, 1, 8, 8, generator=generator)
        return noise + labels[:, None, None, None], labels

    held_out = [batch(900 + i) for i in range(3)]
    return Data(lambda epoch: (batch(3 * epoch + i) for i in range(3)), 3, held_out)


class Stopping:
    """A progress bar during which somebody presses Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def __call__(self, title: str, total: float):
        yield self.step

    def step(self, count: float = 1) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def search(output: Path, settings: Settings = SETTINGS, progress=silent, **options) -> Search:
    return Search(SPACE, learnable(), settings, output, progress=progress, **options)


def kept(output: Path) -> dict:
    """What ``front.json`` says, but for the time."""
    results = json.loads((output / "front.json").read_text())
    assert results.pop("seconds") > 0
    return results


# --- the run --------------------------------------------------------------------------------


def test_what_a_search_writes(tmp_path):
    results = search(tmp_path / "a", about={"data": "made"}).run()
    written = json.loads((tmp_path / "a" / "front.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "front.json",
        "front.png",
        "last.pt",
    ]
    assert written["search"]["data"] == "made" and written["search"]["seed"] == 0
    assert SearchSpace.from_dict(written["search"]["space"]) == SPACE
    assert {"machine", "versions", "commit", "seconds"} <= written.keys()
    assert written["candidates"] == SPACE.size() and written["held_out_images"] == 48
    rows = written["evaluated"]["evolution"]
    assert len(rows) == len(written["evaluated"]["random"]) == 12
    assert max(row["flops"] for row in rows) <= written["limit"] == 0.8 * written["largest"]
    best = front([Score(row["accuracy"], row["flops"]) for row in rows])
    assert written["front"] == [rows[i] for i in best]


def test_the_supernet_learns(tmp_path):
    settings = replace(SETTINGS, epochs=20, lr=1e-2, control=False)
    results = search(tmp_path, settings).run()
    assert results["front"][-1]["accuracy"] > 0.8, results["front"]  # chance is 0.33


def test_epochs_draw_other_candidates(tmp_path, monkeypatch):
    found = search(tmp_path)
    drawn = []
    forward = found.supernet.forward
    monkeypatch.setattr(
        found.supernet, "forward", lambda x, c: drawn.append(c) or forward(x, c), raising=False
    )
    for _ in range(2):
        found.training.epoch()
    assert len(drawn) == 6 and drawn[:3] != drawn[3:]


def test_the_same_seed_gives_the_same_front(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(random.randrange(1000))  # nobody else's numbers matter
        search(tmp_path / folder, replace(SETTINGS, seed=seed)).run()
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    assert kept(tmp_path / "a")["evaluated"] != kept(tmp_path / "c")["evaluated"]


def test_a_search_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    search(tmp_path).run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("after", [1, 5, 9, 14, 18, STEPS])
def test_a_stopped_search_ends_in_the_same_front(tmp_path, after):
    search(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "stopped", progress=Stopping(after)).run()
    assert not (tmp_path / "stopped" / "front.json").exists()
    counting = Stopping(1000)
    search(tmp_path / "stopped", progress=counting, resume=True).run()
    assert 1000 - counting.left < STEPS or after < 4, "all was done again"
    assert kept(tmp_path / "stopped") == kept(tmp_path / "whole")


def test_a_finished_search_does_nothing_again(tmp_path):
    search(tmp_path).run()
    before = kept(tmp_path)
    search(tmp_path, progress=Stopping(1), resume=True).run()
    assert kept(tmp_path) == before


def test_latency_as_the_limit(tmp_path, monkeypatch):
    measured = []

    def quick(functions, **options):
        measured.extend(functions)
        return timing.interleaved(functions, seconds=0)

    monkeypatch.setattr(latency_cache, "interleaved", quick)
    settings = replace(SETTINGS, limit="latency<=1", control=False)
    first = search(tmp_path / "a", settings)
    results = first.run()
    assert len(measured) == len(first.table.entries)
    rows = results["evaluated"]["evolution"]
    assert max(row["latency_ms"] for row in rows) <= results["limit"]
    before = kept(tmp_path / "a")
    (tmp_path / "cache" / "psvit" / "latencies.json").unlink()
    search(tmp_path / "a", settings, resume=True).run()
    assert kept(tmp_path / "a") == before and len(measured) == len(first.table.entries)


# --- bad input ------------------------------------------------------------------------------


def test_another_search_in_the_folder_stays(tmp_path):
    search(tmp_path).run()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a checkpoint already; resume it, or"):
        search(tmp_path)
    other = replace(SETTINGS, seed=5, limit="flops<=0.7")
    message = r"made otherwise: limit was flops<=0.8, is flops<=0.7; seed was 0, is 5$"
    with pytest.raises(ValueError, match=message):
        search(tmp_path, other, resume=True)
    space = replace(SPACE, mlp_ratio=2.0)
    with pytest.raises(ValueError, match=r"made otherwise: mlp_ratio was 1.0, is 2.0$"):
        Search(space, learnable(), SETTINGS, tmp_path, resume=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_truncated_state_is_named_and_kept(tmp_path):
    search(tmp_path).run()
    file = tmp_path / "last.pt"
    short = file.read_bytes()[:1000]
    file.write_bytes(short)
    with pytest.raises(ValueError, match=r"last.pt: not a whole checkpoint"):
        search(tmp_path, resume=True)
    assert file.read_bytes() == short


def test_nothing_to_go_on_from(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        search(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_limit_that_no_candidate_meets_is_known_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"smallest candidate \(A\|A 8,8\) costs .* k and the"):
        search(tmp_path / "a", replace(SETTINGS, limit="flops<=0.01"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, expected a whole number from 1 up"),
        ({"population": 0}, "population: got 0"),
        ({"seed": -1}, "seed: got -1, expected a whole number from 0 up"),
        ({"lr": float("nan")}, "lr: got nan, expected more than 0"),
        ({"device": "tpu"}, 'device: got "tpu", expected "cpu" or "cuda"'),
        ({"limit": "none"}, 'limit: got "none", expected for example'),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_a_loss_that_is_no_number_keeps_the_state_before(tmp_path):
    broken = search(tmp_path, replace(SETTINGS, lr=1e30))
    with pytest.raises(FloatingPointError, match="after epoch 1; try a learning rate below 1e"):
        broken.run()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["training"]["done"] == 0
    assert all(weight.isfinite().all() for weight in state["supernet"].values())


# --- data -----------------------------------------------------------------------------------


def test_held_out_images_are_training_images_that_no_epoch_has():
    count = 60
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    labels = np.arange(count) % 3

    class Untouched(Packed):
        def __getitem__(self, index):
            pytest.fail("a test image was read")

    source = Source(
        "made", Packed(images, labels), Untouched(images, labels), 3, 1, (0.5,), (0.5,), flip=False
    )

    def numbers(batches):
        """Of the images: the centre is never moved out."""
        return [round(float(x[0, 4, 4] * 0.5 + 0.5) * 255) for b, _ in batches for x in b]

    loading = Loading((8, 8), batch=8, seed=4)
    data = held_out_data(source, loading)
    held_out = numbers(data.held_out)
    trained = [numbers(data.epoch(epoch)) for epoch in range(3)]
    assert len(held_out) == len(set(held_out)) == 12
    assert all(len(epoch) == len(set(epoch)) == 8 * data.steps == 48 for epoch in trained)
    assert not set(held_out) & set().union(*trained)
    classes = torch.cat([y for _, y in data.held_out]).bincount()
    assert classes.tolist() == [4, 4, 4]
    assert numbers(held_out_data(source, loading).held_out) == held_out
    other = held_out_data(source, replace(loading, seed=5))
    assert set(numbers(other.held_out)) != set(held_out)


# --- command --------------------------------------------------------------------------------

QUICK = ("--epochs", "1", "--population", "3", "--generations", "2", "--batch", "512")


@pytest.fixture
def space_file(tmp_path):
    file = tmp_path / "space.json"
    digits = replace(SPACE, num_classes=10, patch_size=4)
    file.write_text(json.dumps(digits.to_dict()))
    return file


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["search", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(tmp_path, space_file, capsys):
    found = tmp_path / "found"
    code, out, err = run(capsys, "--space", space_file, "--output", found, "--control", *QUICK)
    assert code == 0, err
    assert "54 candidates" in err
    assert "The front of 6 of 54 candidates" in out and "270 held-out training images" in out
    train = shlex.split(out.strip().splitlines()[-1])
    best = json.loads((found / "front.json").read_text())["front"][-1]
    assert train[train.index("--schedule") + 1] == best["schedule"]
    code, again, _ = run(capsys, "--resume", "--output", found, "--json")
    assert code == 0 and json.loads(again)["front"][-1] == best


def test_the_printed_command_trains_the_candidate(tmp_path, space_file, capsys):
    from safetensors.torch import load_file

    found = tmp_path / "found"
    _, out, _ = run(capsys, "--space", space_file, "--output", found, *QUICK)
    _, *train = shlex.split(out.strip().splitlines()[-1])
    quick = ("--batch", "512", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0")
    assert cli.main([*train, *quick, "--output", str(tmp_path / "trained")]) == 0
    best = json.loads((found / "front.json").read_text())["front"][-1]
    model = replace(SPACE, num_classes=10, patch_size=4).model(
        Candidate(Schedule(best["schedule"]), tuple(best["widths"]))
    )
    model.load_state_dict(load_file(tmp_path / "trained" / "model.safetensors"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "nowhere"), "data: no such folder: nowhere"),
        (("--limit", "flops<=2"), "expected a part of the largest candidate up to 1"),
        (("--space", "{}/missing.json"), "missing.json: No such file"),
        (("--space", "{}/list.json"), "list.json: expected a JSON object"),
        (("--space", "{}/cut.json"), "cut.json: not JSON"),
        (("--img-size", "2"), "img_size: got 2 x 2, expected"),
        (("--img-size", "16", "--space", "{}/space.json"), "got img_size 8, expected 16"),
        (("--resume",), "last.pt: no such checkpoint to go on from"),
        (("--batch", "2000"), "batch: got 2000, expected at most 1077"),
        (("--lr", "-1"), "lr: got -1.0, expected more than 0"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, space_file, capsys):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"depths": [[1]')
    output = tmp_path / "found"
    code, out, err = run(capsys, *(a.format(tmp_path) for a in argv), "--output", output)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1, err
    assert not output.exists()


def test_data_of_another_kind_than_the_space(tmp_path, capsys):
    file = tmp_path / "space.json"
    file.write_text(json.dumps(SPACE.to_dict()))
    code, _, err = run(capsys, "--space", file, "--output", tmp_path / "found")
    assert code == 2 and "got num_classes 3, expected 10" in err


def test_interrupted_it_says_how_to_go_on(tmp_path, space_file, capsys, monkeypatch):
    monkeypatch.setattr(Search, "run", _interrupted)
    code, _, err = run(capsys, "--space", space_file, "--output", tmp_path / "found", *QUICK)
    assert code == 130 and f"psvit search --resume --output {tmp_path / 'found'} goes on" in err


def _interrupted(search: Search):
    raise KeyboardInterrupt
