"""Training slimmed models: Evo-ViT's schedule and heads, SiT's recalibration, whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from surroundings import interrupted

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("yaml")

import hosts
import timm
from training_runs import assert_same, four_classes, run, weights

import psvit
from psvit import checkpoint, train
from psvit.slimming import (
    Recalibration,
    SecondHead,
    begin_epoch,
    evit,
    evo_vit,
    select_patches,
    sit,
    slow_fast,
)
from psvit.stack import find_stack
from psvit.train import loop
from psvit.train.model import Learner

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:sit. .* pools with random weights"),
]

NAME = "vit_tiny_patch16_224"
SHAPE = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 1}
SMALL = {
    "model": NAME, "model_args": SHAPE, "epochs": 3, "batch": 8, "warmup_epochs": 0, "workers": 0,
    "tensorboard": False, "ema": 0.9, "auto_augment": None, "mixup": 0, "cutmix": 0,
    "random_erasing": 0, "lr": 3e-3, "drop_path": 0.0,
}  # fmt: skip
#: Of a model of 3 layers on a grid of 4 x 4.
SLIM = {
    "evit": {"slim_args": {"keep": 0.6}},
    "evo_vit": {"model_args": {**SHAPE, "global_pool": "avg"}},
    "sit": {"slim_args": {"tokens": [7, 3], "layers": [2, 3]}},
}
every_method = pytest.mark.parametrize("slim", SLIM)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return four_classes(tmp_path_factory.mktemp("data"))


def made(npz: Path, folder: Path, slim: str = "none", **changes) -> train.Config:
    slimmed = {"slim": slim, **SLIM.get(slim, {})}
    return train.Config(**{**SMALL, **slimmed, "data": str(npz), "output": str(folder), **changes})


@every_method
def test_a_run_trains_and_a_resumed_one_ends_with_the_same_bits(data, tmp_path, slim):
    changes = {"save_every": 2, "drop_path": 0.3, "mixup": 0.5}
    run(made(data, tmp_path / "whole", slim, **changes))
    config = made(data, tmp_path / "stopped", slim, **changes)
    with interrupted(loop.Run, "update", after=7), pytest.raises(KeyboardInterrupt):
        run(config)
    run(config, resume=True)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@every_method
def test_a_run_learns_and_its_weights_load_into_a_converted_model(data, tmp_path, slim):
    config = made(data, tmp_path, slim, epochs=5)
    history = run(config)
    assert history[-1]["loss"] < history[0]["loss"] - 0.2, history
    model = timm.create_model(NAME, num_classes=4, img_size=8, **config.model_args)
    convert = {"evit": evit, "evo_vit": evo_vit, "sit": sit}[slim]
    convert(model, **config.slim_args).load_state_dict(weights(tmp_path))


def test_sit_learns_from_a_teachers_patches_alone(data, tmp_path):
    """Labels have no part in the loss, nor have scores: the patches of each layer are all."""
    run(made(data, tmp_path / "teacher", epochs=1))
    teacher = {
        "teacher": NAME, "teacher_args": {**SHAPE, "img_size": 8}, "distill": 1.0, "epochs": 6,
        "teacher_weights": str(tmp_path / "teacher" / "model.safetensors"), "temperature": 1e3,
    }  # fmt: skip
    history = run(made(data, tmp_path / "sit", "sit", distill_tokens=3.0, **teacher))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"], history
    state = checkpoint.load(tmp_path / "sit", "training run")["learner"]
    assert {name.split(".")[1] for name in state if name.startswith("recal")} == {"recoveries"}
    assert not any("recoveries" in name for name in weights(tmp_path / "sit"))


def test_evo_vit_goes_from_layers_to_stages_after_two_thirds(monkeypatch):
    model, selected = evo_vit(hosts.timm_vit(depth=6), layers=(2, 4)), []

    def counting(scores, keep, prefix):
        selected.append(keep)
        return select_patches(scores, keep, prefix)

    monkeypatch.setattr(slow_fast, "select_patches", counting)
    wrapped, x, found = torch.nn.ModuleList([model]), hosts.images(), []
    for epoch in (0, 199, 200, 299):
        begin_epoch(wrapped, epoch, 300)
        selected.clear()
        model(x)
        found.append(len(selected))
    assert found == [5, 5, 2, 2]
    begin_epoch(hosts.timm_vit(), 0, 300)  # where there is nothing to do


def test_a_run_puts_both_its_models_into_the_form_of_the_epoch(data, tmp_path, monkeypatch):
    seen = []
    learn = loop.Trainer._learn

    def watched(self, events):
        both = (self.run.model, self.run.ema.module)
        seen.append([find_stack(model).slimming.layer_wise for model in both])
        learn(self, events)

    monkeypatch.setattr(loop.Trainer, "_learn", watched)
    run(made(data, tmp_path, "evo_vit"))
    assert seen == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_half_the_loss_is_of_a_head_on_what_the_model_leaves_out(data, pool):
    shape = {**SHAPE, "global_pool": pool, "img_size": 8, "num_classes": 4}
    model = evo_vit(timm.create_model(NAME, **shape))
    config = made(data, Path("unused"), "evo_vit", label_smoothing=0.0)
    learner = Learner(model, None, config).double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    tokens, head = model.forward_features(x), learner.second_head
    seen = tokens[:, 0] if pool == "avg" else tokens[:, 1:].mean(1)
    second = head.head(F.layer_norm(seen, (16,)))
    want = 0.5 * F.cross_entropy(model(x), y) + 0.5 * F.cross_entropy(second, y)
    torch.testing.assert_close(learner(x, y).double(), want, rtol=1e-6, atol=1e-6)
    assert isinstance(head, SecondHead) and len(learner.aids()) == 4


def test_recalibration_compares_what_each_next_layer_gets(data):
    shape = {**SHAPE, "img_size": 8, "num_classes": 4}
    teacher = timm.create_model(NAME, **shape).double().eval()
    model = sit(teacher, (7,), (2,))
    aid = Recalibration(model, teacher).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with aid.watching() as (mine, wanted):
        model(x)
        teacher(x)
    assert [t.shape[1] for t in mine] == [7, 7, 7] and [t.shape[1] for t in wanted] == [16] * 3
    with torch.no_grad():
        y = teacher._pos_embed(teacher.patch_embed(x))
        slim, theirs = y, y
        for i, block in enumerate(teacher.blocks):
            theirs = block(theirs)
            torch.testing.assert_close(wanted[i], theirs[:, 1:])
        slim = teacher.blocks[0](slim)
        slim, _ = find_stack(model).pool(0).reduce(slim, psvit.Layout(1, (4, 4)))
        torch.testing.assert_close(mine[0], slim[:, 1:])
        errors = [
            (recover(own) - want).square().mean()
            for recover, own, want in zip(aid.recoveries, mine, wanted, strict=True)
        ]
    torch.testing.assert_close(aid(mine, wanted).double(), sum(errors) / 3, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_teachers_of_another_size_are_refused():
    model, teacher = sit(hosts.timm_vit(), (7,), (2,)), hosts.timm_vit(depth=5)
    message = r"^teacher: got \(5, 64, 24\) layers, patches and channels, expected \(4, 64, 24\)"
    with pytest.raises(ValueError, match=message):
        Recalibration(model, teacher)


BAD = [
    ({"slim": "tome"}, 'slim: got \'tome\', expected "none" or "evit" or "evo_vit" or "sit"'),
    ({"slim_args": {"keep": 0.5}}, r"slim_args: got .*, expected none with slim: none"),
    ({"slim": "evit", "teacher": "x", "distill_tokens": 1.0},
     "distill_tokens: got 1.0, expected 0 without slim: sit and a teacher"),
    ({"slim": "sit", "distill_tokens": 1.0}, "distill_tokens: got 1.0, expected 0 without slim"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_configs_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train.Config(data="digits", **values)


def test_bad_arguments_of_a_method_are_refused(data, tmp_path):
    with pytest.raises(TypeError, match=r"^slim_args: .*unexpected keyword argument 'keeps'"):
        run(made(data, tmp_path, "evit", slim_args={"keeps": 0.5}))
    with pytest.raises(ValueError, match=r"^keep: got 2, expected a part of the patches"):
        run(made(data, tmp_path, "evit", slim_args={"keep": 2}))
    with pytest.raises(ValueError, match=r"^model: got PSViT, which was made for its schedule"):
        run(made(data, tmp_path, "evit", model="psvit_2d_tiny", model_args={"patch_size": 1}))
    assert not any(tmp_path.iterdir())
