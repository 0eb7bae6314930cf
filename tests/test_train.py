"""Training runs: what they write and refuse, and that their parts take part."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from surroundings import threads

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

from training_runs import SMALL, assert_same, four_classes, make, run, started, weights

import psvit
from psvit import checkpoint, train
from psvit.train import loop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return four_classes(tmp_path_factory.mktemp("data"))


# --- what a run is ------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_says(data, tmp_path):
    config = make(data, tmp_path, epochs=12, lr=3e-3, mixup=0, cutmix=0, random_erasing=0)
    history = run(config)
    assert history[-1]["loss"] < history[0]["loss"] - 0.2, history
    assert history[-1]["accuracy"] > 0.6, history
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == history and [row["epoch"] for row in history] == list(range(1, 13))
    assert {p.name for p in tmp_path.iterdir()} == {
        "last.pt",
        "model.safetensors",
        "metrics.jsonl",
        "curves.png",
        "config.yaml",
    }
    assert train.Config.of(train.config.read_yaml(tmp_path / "config.yaml")) == config


def test_the_weights_load_into_the_model_they_are_of(data, tmp_path):
    run(make(data, tmp_path, epochs=1))
    model = psvit.PSViT("AS|A", [16, 32], num_classes=4, img_size=8, **SMALL["model_args"])
    model.load_state_dict(weights(tmp_path))


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(make(data, tmp_path / name, epochs=1, seed=seed, drop_path=0.3))
    assert_same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", tmp_path / "c")


def test_accumulated_parts_make_the_step_of_the_whole_batch(data, tmp_path):
    changes = {"epochs": 1, "drop_path": 0.0, "mixup": 0, "cutmix": 0}
    whole = run(make(data, tmp_path / "a", **changes))
    parts = run(make(data, tmp_path / "b", accumulate=4, **changes))
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_tensorboard_events_are_written_where_it_is_installed(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run(make(data, tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "accuracy", "step/loss", "step/lr"} <= set(events.Tags()["scalars"])
    found = [event.value for event in events.Scalars("accuracy")]
    assert found == pytest.approx([row["accuracy"] for row in history])


# --- the recipe's parts take part ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"mixup": 0.8, "cutmix": 0.0},
        {"cutmix": 1.0, "mixup": 0.0},
        {"label_smoothing": 0.3},
        {"random_erasing": 1.0},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"drop_path": 0.5},
        {"clip_grad": 0.01},
        {"weight_decay": 0.5},
        {"lr": 1e-4},
        {"warmup_epochs": 1, "epochs": 2},
        {"init": "impulse"},
        {"init": "mimetic", "init_args": {"pos_scale": 18}},
        {"amp": "bfloat16"},
        {"amp": "float16"},
        {"img_size": 12},
    ],
    ids=lambda change: "-".join(change),
)
def test_each_part_of_the_recipe_changes_the_weights(data, tmp_path, change, plain):
    run(make(data, tmp_path, **{**PLAIN, **change}))
    found = weights(tmp_path)
    assert all(value.isfinite().all() for value in found.values())
    assert any(
        value.shape != plain[name].shape or not torch.equal(value, plain[name])
        for name, value in found.items()
    )


def test_weight_decay_leaves_norms_biases_and_embeddings_alone(data, tmp_path):
    with loop.prepared(make(data, tmp_path)) as trainer:
        groups = trainer.run.optimizer.param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        names = [n for n, p in trainer.run.model.named_parameters() if id(p) in decayed]
        assert all(n.endswith(".weight") and "norm" not in n for n in names)
        assert {"patch_embed.proj.weight", "blocks.1.mlp.fc1.weight", "head.weight"} <= set(names)


PLAIN = {
    "epochs": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "random_erasing": 0.0,
    "drop_path": 0.0,
}


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    with threads(1):
        run(make(data, folder, **PLAIN))
    return weights(folder)


def test_checkpointing_activations_changes_nothing_but_memory(data, tmp_path, plain):
    run(make(data, tmp_path, checkpointing=True, **PLAIN))
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-5)


def test_the_saved_weights_are_the_averaged_ones(data, tmp_path):
    run(make(data, tmp_path, epochs=1))
    state = checkpoint.load(tmp_path, "training run")
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, state["ema"][name])
        assert not torch.equal(value, state["learner"][f"model.{name}"]) or not value.any()


# --- distillation -------------------------------------------------------------------------------


def test_a_student_learns_from_a_teachers_scores_and_features_alone(data, tmp_path):
    """Labels have no part in the loss: what the student knows, the teacher knew."""
    hints = {"mixup": 0, "cutmix": 0, "random_erasing": 0, "lr": 3e-3, "ema": 0, "epochs": 12}
    run(make(data, tmp_path / "teacher", **hints))
    shape = {"schedule": "AS|A", "widths": [16, 32], "img_size": 8, **SMALL["model_args"]}
    config = make(
        data,
        tmp_path / "student",
        **{**hints, "widths": [16, 16]},
        teacher="psvit",
        teacher_weights=str(tmp_path / "teacher" / "model.safetensors"),
        teacher_args=shape,
        distill=1.0,
        distill_features=0.5,
        seed=1,
    )
    history = run(config)
    assert history[-1]["accuracy"] > 0.6, history
    state = checkpoint.load(tmp_path / "student", "training run")
    assert state["learner"]["projection.weight"].shape == (32, 16)
    assert "projection.weight" not in weights(tmp_path / "student")


def test_the_distillation_loss_is_deits(data):
    """Against the formula, written out in float64."""
    from psvit.train.model import Learner

    config = make(
        data, Path("unused"), teacher="x", distill=0.3, temperature=2.0, distill_features=0.7
    )
    torch.manual_seed(0)
    student, teacher = (
        psvit.PSViT("A|A", [16, width], num_classes=4, img_size=8, **SMALL["model_args"])
        for width in (16, 32)
    )
    learner = Learner(student, teacher.eval(), config).double().eval()
    teacher.double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = student(x), teacher(x)
    smooth = torch.full((6, 4), 0.1 / 4, dtype=torch.float64)
    smooth[range(6), y] += 0.9
    hard = -(smooth * p.log_softmax(1)).sum(1).mean()
    wanted = (q / 2).softmax(1)
    soft = 4 * (wanted * (wanted.log() - (p / 2).log_softmax(1))).sum(1).mean()
    f, g = (m.forward_head(m.forward_features(x), pre_logits=True) for m in (student, teacher))
    features = (learner.projection(f) - g).square().mean()
    want = 0.7 * hard + 0.3 * soft + 0.7 * features
    torch.testing.assert_close(learner(x, y).double(), want, rtol=1e-5, atol=1e-6)


# --- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_see_the_loss_of_one(data, tmp_path, fsdp):
    import yaml

    changes = {
        "batch": 8,
        "drop_path": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "random_erasing": 0.5,
        "accumulate": 2,
        "save_every": 2,
    }
    one = run(make(data, tmp_path / "one", **changes))
    config = make(data, tmp_path / "two", fsdp=fsdp, **changes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "psvit", "train"]
    command.append(str(tmp_path / "config.yaml"))
    done = started(command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = [json.loads(row) for row in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    for alone, together in zip(one, two, strict=True):
        for key in ("loss", "lr", "accuracy", "ema_accuracy"):
            assert together[key] == pytest.approx(alone[key], rel=2e-5), (key, alone, together)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "num_classes: got 3, expected at least 4 as in .*four.npz"),
        ({"data": "nowhere"}, "data: no such folder: nowhere; expected digits, .*"),
        ({"batch": 64}, "batch: got 64, expected at most 40, the training images of .*"),
        ({"batch": 7}, "batch: got 7, 7 images in each process; expected an even .*"),
        (
            {"img_size": 7, "model_args": {**SMALL["model_args"], "patch_size": 2}},
            "img_size: got 7 x 7, expected multiples of 2, .*; next to it: 6 x 6 or 8 x 8",
        ),
        ({"model_args": {"patchsize": 2}}, "model_args: .*patchsize.*"),
        ({"init": "impulse", "init_args": {"gian": 2}}, "init_args: .*gian.*"),
        ({"init_args": {"gain": 2}}, "init_args: got {'gain': 2}, expected none .*"),
        (
            {"model": "vit_tinny_patch16_224", "schedule": None, "widths": None},
            'model: timm has no "vit_tinny_patch16_224"; did you mean vit_tiny_patch16_224 .*',
        ),
        ({"weights": "nowhere.pt"}, "nowhere.pt: no such file"),
        ({"fsdp": True}, "fsdp: got true in one process, expected several, started by torchrun"),
        ({"auto_augment": "randy"}, 'auto_augment: got "randy", expected a policy of timm .*'),
        ({"img_size": 0}, "img_size: got 0, expected a whole number or nothing from 1"),
        ({"warmup_epochs": 2}, "warmup_epochs: got 2, expected fewer than the 2 epochs"),
        ({"accumulate": 3}, "accumulate: got 3, expected .*"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_run_that_can_not_be_is_refused_before_anything_is_written(
    data, tmp_path, change, message
):
    with pytest.raises((ValueError, TypeError), match=f"^{message}$"):
        run(make(data, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_is_refused_where_there_is_none(data, tmp_path):
    with pytest.raises(ValueError, match=r'^device: got "cuda", but PyTorch sees no CUDA device'):
        run(make(data, tmp_path / "run", device="cuda"))
