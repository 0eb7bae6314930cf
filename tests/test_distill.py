"""Distillation: the loss, what it gains, that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import functools

import hosts
import pytest
import torch
from surroundings import interrupted, silent

import psvit
from psvit.calibrate import calibrate
from psvit.calibrate.lockstep import Lockstep, entered
from psvit.distill import Distillation, augment, distill, run, student
from psvit.distill.augment import augmented
from psvit.distill.student import Student
from psvit.outputs import logits_of, relative_errors
from psvit.planning.plan import Plan
from psvit.planning.score import Held, split
from psvit.stack import find_stack

pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

HOW = Distillation(steps=20, batch=8)


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


@pytest.fixture
def uncorrected(monkeypatch):
    """The rehearsal starts from the plan as it is: then there is something to gain."""
    monkeypatch.setattr(
        run.Course,
        "_corrected",
        lambda self, images, progress: self.source.apply(self.model).eval(),
    )


@pytest.mark.usefixtures("uncorrected")
def test_a_converted_model_comes_nearer_to_its_original(model, images):
    plan, held = planned(model), Held(model, images)
    learnt = distill(model, plan, images, HOW, progress=silent)
    before, after = (held.score(p.apply(model)).error for p in (plan, learnt))
    assert after < 0.8 * before, (before, after)
    assert learnt.found["distillation"]["gained"]
    assert "distilled, 20 steps" in " ".join(str(learnt).split())


def test_what_is_measured_is_what_the_rehearsal_gave(model, images):
    """Which starts with a fresh correction, and is looked at on images it doesn't learn from."""
    plan = planned(model)
    found = distill(model, plan, images, HOW, progress=silent).found
    about = found["distillation"]
    fitted, held_out = split(images)
    start, _ = calibrate(model, plan.schedule, fitted, pool="avg", progress=silent)
    want = Held(model, held_out).score(start)
    assert about["before"] == pytest.approx(dataclasses.asdict(want), rel=1e-6)
    assert found["measured"] == about["rehearsed" if about["gained"] else "before"]
    assert about["rehearsed"] != about["before"]


def test_a_gain_is_more_than_its_standard_error():
    reference = torch.zeros(4, 2).double()
    reference[:, 1] = 1

    def shifted(*by: float) -> torch.Tensor:
        return torch.stack([torch.tensor(by).double(), torch.ones(4).double()], 1)

    before = shifted(1, 1, 1, 1)
    assert run.is_gain(before, shifted(0.9, 0.8, 0.9, 0.8), reference)
    # On the mean a gain, but of one image alone.
    once = shifted(0.2, 1.02, 1.02, 1.02)
    assert relative_errors(once, reference).mean() < relative_errors(before, reference).mean()
    assert not run.is_gain(before, once, reference)
    assert not run.is_gain(before, before, reference)
    assert not run.is_gain(before, shifted(1.1, 1.2, 1.1, 1.2), reference)
    assert not run.is_gain(before[:1], once[:1], reference[:1])


@pytest.mark.parametrize("gain", [True, False])
def test_only_after_a_gain_the_plan_learns_from_all_images(model, images, monkeypatch, gain):
    plan, seen = planned(model, "ASAA"), []
    monkeypatch.setattr(run, "is_gain", lambda *scores: gain)
    begin = Student.__init__

    def noted(self, original, model, images, *rest):
        seen.append(len(images))
        begin(self, original, model, images, *rest)

    monkeypatch.setattr(Student, "__init__", noted)
    found = distill(model, plan, images, HOW, progress=silent)
    few = len(split(images)[0])
    assert seen == ([few, len(images)] if gain else [few])
    same = {
        name: name in plan.corrections and torch.equal(value, plan.corrections[name])
        for name, value in found.corrections.items()
    }
    assert all(same.values()) != gain, same
    assert found.found["distillation"]["gained"] == gain


@pytest.mark.usefixtures("uncorrected")
def test_layers_before_the_first_that_is_changed_do_not_learn(model, images):
    found = distill(model, planned(model, "AASA"), images, HOW, progress=silent)
    changed = {name.split(".")[1] for name in found.corrections if name.startswith("blocks.")}
    assert changed == {"1", "2", "3"}
    plain = distill(model, planned(model, "AAAA"), images, HOW, progress=silent)
    assert not plain.corrections and not plain.found["distillation"]["gained"]


@pytest.mark.usefixtures("uncorrected")
def test_norms_and_biases_alone_can_learn(model, images):
    plan = planned(model, "ASAA")
    found = distill(model, plan, images, dataclasses.replace(HOW, tune="norms"), progress=silent)
    names = set(found.corrections) - set(plan.corrections)
    assert names and all(
        name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight")) for name in names
    )


def _averaging():
    """Without a class token: its head has the mean of the tokens."""
    return hosts.timm_vit(class_token=False, global_pool="avg")


def learner(model, schedule, images) -> Student:
    original = psvit.accelerate(model, "AAAA").eval()
    converted = planned(model, schedule).apply(model).eval()
    return Student(original, converted, images, HOW, seed=0)


@pytest.mark.parametrize(
    "make",
    [hosts.timm_vit, hosts.torchvision_vit, _averaging],
    ids=["timm", "torchvision", "average"],
)
def test_outputs_and_prefix_tokens_are_learnt(make, images):
    model = make()
    learning = learner(model, "AA|AA", images)
    seen = learning._pass(torch.Generator().manual_seed(0))
    x, stack = seen.images, learning.stack
    outputs = [logits_of(m(x)).double() for m in (learning.model, model)]
    want = ((outputs[0] - outputs[1]) ** 2).sum() / (outputs[1] ** 2).sum()
    taps: dict = {}
    for name, one in (("found", stack), ("wanted", find_stack(learning.original))):
        for layer in (2, 3):
            hook = functools.partial(taps.__setitem__, (name, layer))
            one.block(layer).register_forward_hook(lambda m, a, out, hook=hook: hook(out))
    learning.model(x), learning.original(x)
    prefix = stack.prefix
    if prefix:
        pairs = [(taps["found", i][:, :prefix], taps["wanted", i][:, :prefix]) for i in (2, 3)]
        errors = [((a - b) ** 2).sum() / (b**2).sum() for a, b in pairs]
        want = want + 10 * sum(errors) / 2
    assert learning._loss(seen).item() == pytest.approx(float(want.detach()), rel=1e-4)


def test_layers_that_are_skipped_run_again_afterwards(model, images):
    x, converted = images[:4], psvit.accelerate(model, "AA|AS", pool="avg").eval()
    stack, want = find_stack(converted), converted(x)
    seen: list[torch.Tensor] = []
    hook = stack.block(3).register_forward_hook(lambda block, args, out: seen.append(out))
    converted(x)
    hook.remove()
    with entered(stack, 4, seen[0]):
        torch.testing.assert_close(converted(torch.zeros_like(x)), want)
    with pytest.raises(ZeroDivisionError), entered(stack, 2, seen[0]):
        raise ZeroDivisionError
    assert torch.equal(converted(x), want)


def test_the_loss_of_equal_models_is_zero(model, images):
    learning = learner(model, "AAAA", images)
    learning.layers = range(1, 4)
    seen = learning._pass(torch.Generator().manual_seed(0))
    assert learning._loss(seen).item() < 1e-9


def test_errors_are_relative_to_the_mean_square_of_what_is_wanted():
    found, wanted = torch.randn(2, 6, 4).double()
    want = (found - wanted).square().sum(1) / (wanted.square().sum() / 6)
    torch.testing.assert_close(relative_errors(found, wanted), want)
    assert relative_errors(0 * wanted, wanted).mean() == pytest.approx(1)


def test_goals_are_the_prefix_tokens_of_the_original(model, images):
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
        torch.testing.assert_close(goal, y[:, :1])
        torch.testing.assert_close(output, z)
        assert output.requires_grad


def test_changed_images_are_those_of_the_generator(images):
    a, b, c = (augmented(images[:8], torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == images[:8].shape and a.isfinite().all()


def test_changed_images_are_cut_and_mirrored(monkeypatch):
    """On images of x and y, so that each pixel says where it comes from."""
    monkeypatch.setattr(augment, "MOST", 0.0)
    n, side = 64, 16
    axis = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    changed = augmented(torch.stack([x, y]).expand(n, 2, side, side), torch.Generator())
    inner = changed[:, :, 2:-2, 2:-2] * side  # where no edge is mirrored
    across, down = inner[:, 0].diff(dim=-1), inner[:, 1].diff(dim=-2)
    for steps in (across, down):  # of a pixel: how much of the image is kept
        assert (steps - steps[:, :1, :1]).abs().max() < 1e-3
        assert 0.8 - 1e-3 < steps.abs().min() < 0.85 < 0.95 < steps.abs().max() < 1 + 1e-3
    mirrored = int((across[:, 0, 0] < 0).sum())
    assert n / 4 < mirrored < 3 * n / 4 and down.min() > 0, f"{mirrored} of {n}"


def test_changed_images_have_other_contrast_and_colour(monkeypatch):
    monkeypatch.setattr(augment, "LEAST", 1.0)
    images = torch.randn(64, 3, 8, 8) + 5
    changed = augmented(images, torch.Generator().manual_seed(0))
    before, after = (x.flatten(2).std(2) for x in (images, changed))
    contrast = after / before
    assert 0.69 < contrast.min() < 0.8 < 1.2 < contrast.max() < 1.31
    torch.testing.assert_close(contrast, contrast[:, :1].expand(-1, 3))
    shift = (changed.mean((2, 3)) - images.mean((2, 3))) / images.std((1, 2, 3))[:, None]
    assert 0.3 < shift.abs().max() < 0.7 and shift.std(1).min() > 0


@pytest.mark.usefixtures("uncorrected")
def test_a_stopped_distillation_ends_with_the_same_bits(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "BATCHES", 2)  # eight steps between two checkpoints
    whole = distill(model, planned(model), images, HOW, progress=silent)
    assert whole.found["distillation"]["gained"]
    for after in (10, 22, 35):  # in the rehearsal, twice in what follows
        folder = tmp_path / str(after)
        with interrupted(Student, "_update", after=after), pytest.raises(KeyboardInterrupt):
            distill(model, planned(model), images, HOW, output=folder, progress=silent)
        again = distill(
            model, planned(model), images, HOW, output=folder, resume=True, progress=silent
        )
        for name, value in whole.corrections.items():
            assert torch.equal(again.corrections[name], value), name
        for name in ("before", "rehearsed"):
            assert again.found["distillation"][name] == whole.found["distillation"][name]


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
    learning = learner(model, "ASAA", spoilt)
    with pytest.raises(FloatingPointError, match=r"^loss: is nan in step \d+$"):
        list(learning.round())
    with pytest.raises(ValueError, match=r"^images: layer 2 gives tokens that are no finite"):
        distill(model, planned(model), spoilt, HOW, progress=silent)
