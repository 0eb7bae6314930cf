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
from psvit.distill import Distillation, distill, run, student
from psvit.distill.augment import augmented
from psvit.distill.student import Part, Student, token_error
from psvit.outputs import kl_divergence, logits_of
from psvit.planning.plan import Plan
from psvit.planning.score import Held, split
from psvit.stack import find_stack

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
    before, after = (held.score(p.apply(model)).kl for p in (plan, learnt))
    assert after < 0.8 * before, (before, after)
    assert "distilled, 20 steps a part" in " ".join(str(learnt).split())


def test_what_is_measured_is_what_the_rehearsal_kept(model, images):
    """Which starts with a fresh correction, and is looked at on images it doesn't learn from."""
    plan = planned(model)
    found = distill(model, plan, images, HOW, progress=silent).found
    history = found["distillation"]["history"]
    assert [row["part"] for row in history[1:]] == [
        "layers 1 to 2, tokens",
        "layers 3 to 4, tokens",
        "layers 3 to 4, outputs",
    ]
    fitted, held_out = split(images)
    start, _ = calibrate(model, plan.schedule, fitted, pool="avg", progress=silent)
    assert history[0]["kl"] == pytest.approx(Held(model, held_out).score(start).kl, rel=1e-6)
    kept = [row for row in history if row["kept"]][-1]
    assert found["measured"] == {name: kept[name] for name in ("agreement", "kl")}


def test_a_gain_is_more_than_its_standard_error():
    reference = torch.zeros(4, 2).double()

    def shifted(*by: float) -> torch.Tensor:
        return torch.stack([torch.tensor(by).double(), torch.zeros(4).double()], 1)

    before = shifted(1, 1, 1, 1)
    assert run.is_gain(before, shifted(0.9, 0.8, 0.9, 0.8), reference)
    # On the mean a gain, but of one image alone.
    once = shifted(0.2, 1.02, 1.02, 1.02)
    assert kl_divergence(once, reference) < kl_divergence(before, reference)
    assert not run.is_gain(before, once, reference)
    assert not run.is_gain(before, before, reference)
    assert not run.is_gain(before, shifted(1.1, 1.2, 1.1, 1.2), reference)
    assert not run.is_gain(before[:1], once[:1], reference[:1])


def test_only_what_was_a_gain_learns_from_all_images(model, images, monkeypatch):
    plan = planned(model, "ASAS")
    course = run.Course(model, plan, images, HOW, silent)
    verdicts = iter((True, False))
    monkeypatch.setattr(run, "is_gain", lambda *scores: next(verdicts))
    before = {name: p.clone() for name, p in course.result.state_dict().items()}
    while course.left:
        for _ in course.round():
            pass
    assert [row["kept"] for row in course.history] == [True, True, False]
    assert len(course.student.images) == len(images)
    changed = {n for n, p in course.result.state_dict().items() if not torch.equal(p, before[n])}
    assert changed and all(name.startswith(("blocks.0.", "blocks.1.")) for name in changed)


def test_a_plan_that_gains_nothing_stays(model, images):
    """With a learning rate that destroys it."""
    plan = planned(model, "ASAA")
    found = distill(model, plan, images, dataclasses.replace(HOW, lr=10.0), progress=silent)
    assert set(found.corrections) == set(plan.corrections)
    for name, value in found.corrections.items():
        assert torch.equal(value, plan.corrections[name]), name
    history = found.found["distillation"]["history"]
    assert [row["kept"] for row in history] == [True, False]
    assert found.found["measured"]["kl"] == history[0]["kl"]


@pytest.mark.usefixtures("uncorrected")
def test_what_no_schedule_changed_does_not_learn(model, images):
    found = distill(model, planned(model, "AAAS"), images, HOW, progress=silent)
    changed = {name for name in found.corrections if name.startswith("blocks.")}
    assert changed and all(name.startswith(("blocks.2.", "blocks.3.")) for name in changed)
    plain = distill(model, planned(model, "AAAA"), images, HOW, progress=silent)
    assert not plain.corrections and len(plain.found["distillation"]["history"]) == 1


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


def learner(model, schedule, part, images) -> Student:
    original = psvit.accelerate(model, "AAAA").eval()
    converted = planned(model, schedule).apply(model).eval()
    return Student(original, converted, [part], images, HOW, seed=0)


@pytest.mark.parametrize(
    "make",
    [hosts.timm_vit, hosts.torchvision_vit, _averaging],
    ids=["timm", "torchvision", "average"],
)
def test_outputs_and_prefix_tokens_are_learnt_after_a_pool(make, images):
    model = make()
    learning = learner(model, "AA|AA", Part((2, 3), True), images)
    seen = learning._pass(torch.Generator().manual_seed(0))
    x, stack = seen.images, learning.stack
    outputs = [logits_of(m(x)).double() for m in (learning.model, model)]
    want = kl_divergence(*outputs)
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
    assert float(learning._loss(seen)) == pytest.approx(float(want), rel=1e-4)


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


@pytest.mark.usefixtures("uncorrected")
def test_a_stopped_distillation_ends_with_the_same_bits(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "BATCHES", 2)  # eight steps between two checkpoints
    whole = distill(model, planned(model), images, HOW, progress=silent)
    kept = [row["kept"] for row in whole.found["distillation"]["history"][1:]]
    assert any(kept)
    for after in (10, 22, 59, 70):  # in the first part, the second, the last; in what is learnt
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
    learning = learner(model, "ASAA", Part((0, 1), False), spoilt)
    message = r"^loss: is nan in step \d+ of layers 1 to 2, tokens$"
    with pytest.raises(FloatingPointError, match=message):
        list(learning.round())
    with pytest.raises(ValueError, match=r"^images: layer 2 gives tokens that are no finite"):
        distill(model, planned(model), spoilt, HOW, progress=silent)
