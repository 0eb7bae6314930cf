"""Distillation: the loss, what it gains, that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses

import hosts
import pytest
import torch
from surroundings import interrupted, silent

import psvit
from psvit.calibrate import calibrate
from psvit.calibrate.lockstep import Lockstep
from psvit.distill import Distillation, distill, run
from psvit.distill.augment import augmented
from psvit.distill.run import Student, token_error
from psvit.planning.plan import Plan

pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

HOW = Distillation(steps=20, batch=8, lr=1e-3)


def planned(model, schedule="AS|AS", **options) -> Plan:
    converted = psvit.accelerate(model, schedule, pool="avg", size_bias=True)
    return Plan.of(
        model,
        converted,
        schedule=psvit.Schedule(schedule),
        pool="avg",
        dims=2,
        size_bias=True,
        **options,
    )


def test_a_converted_model_comes_nearer_to_its_original(model, images):
    found = distill(model, planned(model), images, HOW, progress=silent).found
    history = found["distillation"]["history"]
    assert found["measured"]["kl"] < 0.8 * history[0]["kl"], history
    assert found["measured"]["kl"] == min(row["kl"] for row in history)
    assert [row["layer"] for row in history] == [0, 2, 4]


def test_the_plan_that_comes_back_has_the_best_weights(model, images):
    plan = distill(model, planned(model), images, HOW, progress=silent)
    student = Student(model, planned(model), images, HOW)
    score = student.held.score(plan.apply(model))
    assert score.kl == pytest.approx(plan.found["measured"]["kl"], rel=1e-6)
    assert "distilled, 20 steps a part" in str(plan)


def test_a_part_that_gains_nothing_is_put_back(model, images):
    """With a learning rate that destroys it."""
    calibrated, _ = calibrate(model, "ASAA", images, progress=silent)
    plan = planned(model, "ASAA").with_weights(model, calibrated, {})
    found = distill(model, plan, images, dataclasses.replace(HOW, lr=10.0), progress=silent)
    for name, value in found.corrections.items():
        assert torch.equal(value, plan.corrections[name]), name
    history = found.found["distillation"]["history"]
    assert [row["kept"] for row in history] == [True, False, False, False]
    assert found.found["measured"]["kl"] == history[0]["kl"]


def test_layers_before_the_first_change_stay_as_they_are(model, images):
    found = distill(model, planned(model, "AAAS"), images, HOW, progress=silent)
    changed = {name for name in found.corrections if name.startswith("blocks.")}
    assert changed and all(name.startswith(("blocks.2.", "blocks.3.")) for name in changed)


def test_norms_and_biases_alone_can_learn(model, images):
    plan = planned(model, "ASAA")
    found = distill(model, plan, images, dataclasses.replace(HOW, tune="norms"), progress=silent)
    names = set(found.corrections) - set(plan.corrections)
    assert names and all(
        name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight")) for name in names
    )


def test_the_loss_of_equal_models_is_zero(model, images):
    equal = (psvit.accelerate(model, "AAAA").eval() for _ in range(2))
    lockstep = Lockstep(*equal)
    seen = lockstep.group(images[:4], (1,))
    (found,) = seen.outputs(lockstep.converted, (1,))
    assert token_error(found, seen.goals[0], 1).item() < 1e-10


def test_the_loss_is_relative_and_a_prefix_token_counts_for_ten():
    found, wanted = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    weights = torch.tensor([10.0, 10, 1, 1, 1])[:, None]
    want = ((found - wanted) ** 2 * weights).sum() / (wanted**2 * weights).sum()
    torch.testing.assert_close(token_error(found, wanted, 2), want)


def test_goals_are_the_tokens_of_the_original_put_through_the_pools(model, images):
    x, converted = images[:4], psvit.accelerate(model, "AA|AS", pool="avg").eval()
    lockstep = Lockstep(psvit.accelerate(model, "AAAA").eval(), converted)
    seen = lockstep.group(x, (2, 3))
    y = z = model._pos_embed(model.patch_embed(x))
    steps = list(converted.blocks.steps())
    for layer in range(2):
        y, z = model.blocks[layer](y), steps[layer](z)
    torch.testing.assert_close(seen.tokens, z)
    outputs = seen.outputs(lockstep.converted, (2, 3))
    for layer, (goal, output) in zip((2, 3), zip(seen.goals, outputs, strict=True), strict=True):
        y, z = model.blocks[layer](y), steps[layer](z)
        grid = y[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        pool = torch.nn.functional.avg_pool2d(grid, 3, 2, 1, count_include_pad=False)
        torch.testing.assert_close(goal, torch.cat([y[:, :1], pool.flatten(2).mT], 1))
        torch.testing.assert_close(output, z)
        assert output.requires_grad


def test_changed_images_are_those_of_the_generator(images):
    a, b, c = (augmented(images[:8], torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == images[:8].shape and a.isfinite().all()
    assert float(a.abs().max()) <= float(images[:8].abs().max()) + 1e-5


def test_changed_images_are_cut_mirrored_and_mixed():
    """On images of x, y and their own number, so that each pixel says where it comes from."""
    n, side = 64, 16
    axis = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.stack([torch.stack([x, y, torch.full_like(x, i)]) for i in range(n)])
    changed = augmented(images, torch.Generator().manual_seed(0))
    number = changed[:, 2].mean((1, 2))
    alone = (number - torch.arange(n)).abs() < 1e-4
    assert n / 4 < alone.sum() < 3 * n / 4, f"{alone.sum()} of {n} aren't mixed"
    inner = changed[alone, :2, 2:-2, 2:-2] * side  # where no edge is mirrored
    across, down = inner[:, 0].diff(dim=-1), inner[:, 1].diff(dim=-2)
    for steps in (across, down):  # of a pixel: how much of the image is kept
        assert (steps - steps[:, :1, :1]).abs().max() < 1e-3
        assert 0.6 - 1e-3 < steps.abs().min() < 0.7 < 0.9 < steps.abs().max() < 1 + 1e-3
    mirrored = int((across[:, 0, 0] < 0).sum())
    assert 0 < mirrored < len(across) and down.min() > 0, f"{mirrored} of {len(across)}"


def test_a_stopped_distillation_ends_with_the_same_bits(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "BATCHES", 2)  # eight steps between two checkpoints
    whole = distill(model, planned(model), images, HOW, progress=silent)
    for after in (10, 22):  # in the first part, and in the second
        folder = tmp_path / str(after)
        with interrupted(Student, "_update", after=after), pytest.raises(KeyboardInterrupt):
            distill(model, planned(model), images, HOW, output=folder, progress=silent)
        again = distill(
            model, planned(model), images, HOW, output=folder, resume=True, progress=silent
        )
        for name, value in whole.corrections.items():
            assert torch.equal(again.corrections[name], value), name
        histories = (plan.found["distillation"]["history"] for plan in (whole, again))
        assert next(histories) == next(histories)


def test_bad_input_is_named(model, images, tmp_path):
    plan = planned(model)
    with pytest.raises(ValueError, match=r"^steps: got 0"):
        Distillation(steps=0)
    with pytest.raises(ValueError, match=r'^tune: got "lora", expected "all" or "norms"$'):
        Distillation(tune="lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^images: got 3, expected at least 4$"):
        distill(model, plan, images[:3], HOW, progress=silent)
    with pytest.raises(ValueError, match=r"no such checkpoint to go on from$"):
        distill(model, plan, images, HOW, output=tmp_path, resume=True, progress=silent)
    distill(
        model,
        plan,
        images,
        dataclasses.replace(HOW, steps=2),
        output=tmp_path,
        progress=silent,
    )
    with pytest.raises(
        ValueError, match=r"^resume: the run was made otherwise: steps was 2, is 20$"
    ):
        distill(model, plan, images, HOW, output=tmp_path, resume=True, progress=silent)
    with pytest.raises(ValueError, match=r"^model: the plan was made for another one"):
        distill(hosts.timm_vit(num_classes=7), plan, images, HOW, progress=silent)


def test_a_loss_that_is_no_number_stops_it(model, images):
    spoilt = images.clone()
    spoilt[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^loss: is nan in step \d+ of layers 1 to 2$"):
        how = dataclasses.replace(HOW, batch=30)
        distill(model, planned(model), spoilt, how, progress=silent)
