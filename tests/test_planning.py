"""Plans that do not merge: what they choose, that they are saved whole, and refuse other models."""

from __future__ import annotations

import copy
import functools
import json

import hosts
import numpy as np
import pytest
import torch
from surroundings import silent, threads

import psvit
from psvit import latency_cache
from psvit.planning import run
from psvit.planning.budget import Budget
from psvit.planning.costs import Conversion, LayerCosts, flops, latency
from psvit.planning.front import Losses, Scored, front
from psvit.planning.plan import Plan

pytest.importorskip("timm")
pytest.importorskip("safetensors")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]


plan = functools.partial(run.plan, merge=False)


@pytest.fixture(scope="module")
def made(model, images) -> Plan:
    with threads(1):
        return plan(model, images, "flops<=0.8", progress=silent)


# --- budgets ------------------------------------------------------------------------------------


BUDGETS = {
    "flops<=0.7": Budget("flops", 0.7),
    "latency <= .5": Budget("latency", 0.5),
    "top1_agreement>=0.98": Budget("top1_agreement", 0.98),
    "flops<=1": Budget("flops", 1.0),
}


@pytest.mark.parametrize("text", BUDGETS)
def test_a_budget_is_what_it_prints(text):
    assert Budget.parse(text) == BUDGETS[text] == Budget.parse(str(BUDGETS[text]))


@pytest.mark.parametrize(
    "text", ["flops", "flops>=0.7", "top1_agreement<=0.9", "flops<=0", "flops<=1.1", "x<=1", 0.7]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match=r"^budget: got .*, expected for example flops<=0.7"):
        Budget.parse(text)


# --- costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["AAAA", "ASAS", "A|AAA", "AS|AS", "A|A|AS", "ASSS", "AA|A|A"])
@pytest.mark.parametrize(
    "make", [hosts.timm_vit, hosts.torchvision_vit], ids=["timm", "torchvision"]
)
def test_flops_of_layers_sum_to_those_of_the_model(make, schedule):
    network, how = make(), Conversion()
    schedule = psvit.Schedule(schedule)
    whole = schedule.flops(network, pool=how.pool)
    plain = psvit.Schedule("AAAA").flops(network)
    # Exact but for the pool's own products.
    assert flops(network, how, 4, pools=2).of(schedule) == pytest.approx(whole / plain, rel=2e-3)


def test_layer_costs_come_from_differences_of_whole_models():
    true = {"A": [4.0, 2.0, 1.0], "S": [3.0, 1.5, 0.5]}

    def total(schedule):
        layers = [
            (k, s) for s, ls in enumerate(schedule.stages) for k in (schedule.kinds[i] for i in ls)
        ]
        return 6.0 + sum(true[kind][stage] for kind, stage in layers)

    asked: list[psvit.Schedule] = []
    costs = LayerCosts.from_totals(6, 2, lambda schedule: asked.append(schedule) or total(schedule))
    assert len(asked) == len(set(asked)) == 6
    for text in ("AAAAAA", "ASSAAS", "AS|ASA|A", "A|AAAAS"):
        schedule = psvit.Schedule(text)
        want = total(schedule) / total(psvit.Schedule("AAAAAA"))
        assert costs.of(schedule) == pytest.approx(want)


# --- plans --------------------------------------------------------------------------------------


def front_of(made: Plan) -> list[Scored]:
    """The front that the plan was chosen from, dearest first."""
    groups = {(first, length): kl for first, length, kl in made.found["groups"]}
    losses = Losses(groups, dict(made.found["pools"]))
    return front(4, losses, LayerCosts(**made.found["costs"]), pools=1)


def test_the_schedules_that_are_tried_are_those_that_should_lose_least(made):
    fitting = [one for one in front_of(made) if one.cost <= 0.8]
    best = sorted(fitting, key=lambda one: one.loss)[: run.TRIES]
    assert len(fitting) > len(best)
    assert [one["schedule"] for one in made.found["tried"]] == [one.schedule.text for one in best]


def test_of_those_that_are_tried_the_one_that_loses_least_is_chosen(made, model, images):
    planner = run.Planner(model, images, Conversion(), silent)
    found = front_of(made)
    candidates = [found[-1], found[1]]  # of many changes, and of the least
    chosen = planner.best(candidates)
    losses = [one["error"] for one in planner.tried]
    assert chosen.predicted == candidates[1] and losses[1] < losses[0], losses


def test_a_plan_keeps_its_budget_and_says_what_it_found(made, model):
    assert made.found["cost"] <= 0.8
    ratio = made.schedule.flops(model, pool="conv") / psvit.Schedule("AAAA").flops(model)
    assert made.found["cost"] == pytest.approx(ratio, rel=2e-3)
    assert made.found["held_out_images"] == 15 and made.found["images"] == 45
    best = min(made.found["tried"], key=lambda one: one["error"])
    assert best["schedule"] == made.schedule.text
    assert made.found["measured"] == {name: best[name] for name in ("error", "agreement", "kl")}


def test_a_plan_goes_through_files_into_a_fresh_model(made, model, images, tmp_path):
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.found == json.loads(json.dumps(made.found)) and again.schedule == made.schedule
    torch.manual_seed(0)
    fresh = hosts.timm_vit()
    want, got = (p.apply(m)(images) for p, m in ((made, model), (again, fresh)))
    assert torch.equal(got, want), f"largest difference {(got - want).abs().max()}"
    assert not torch.equal(got, psvit.accelerate(fresh, made.schedule, pool="conv")(images))


def test_a_plan_for_another_model_names_what_differs(made):
    with pytest.raises(
        ValueError, match=r"^model: the plan was made for another one: .*head.weight"
    ):
        made.apply(hosts.timm_vit(num_classes=7))
    with pytest.raises(ValueError, match=r"it lacks blocks\.3\.norm1\.weight.* and \d+ more$"):
        made.apply(hosts.timm_vit(depth=3))


def test_a_budget_that_no_schedule_meets_names_the_nearest(model, images):
    message = r"^budget: got flops<=0.01, but the cheapest schedule found, A\|A.*, has 0\.\d+ of"
    with pytest.raises(ValueError, match=message):
        plan(model, images, "flops<=0.01", progress=silent)


def test_agreement_as_budget_gives_a_plan_that_agrees(model, images):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)  # so that not all images are of one class
    found = plan(model, images, "top1_agreement>=0.85", progress=silent)
    assert found.found["measured"]["agreement"] >= 0.85
    agreements = {one["schedule"]: one["agreement"] for one in found.found["tried"]}
    assert found.found["cost"] < 1 and agreements[found.schedule.text] >= 0.85
    ordered = [one.schedule for one in front_of(found)]
    cheaper = ordered[ordered.index(found.schedule) + 1]
    assert agreements[cheaper.text] < 0.85


@pytest.mark.parametrize("budget", ["flops<=0.99", "latency<=1"])
def test_a_model_that_cannot_be_pooled_is_planned_without_pools(images, budget, cache_folder):
    made = plan(hosts.timm_vit(patch_drop_rate=0.5), images, budget, progress=silent)
    assert made.found["pools"] == [] and len(made.found["costs"]["attends"]) == 1


def test_a_model_without_classes_is_refused(images):
    with pytest.raises(ValueError, match="got a VisionTransformer without classes, expected some"):
        plan(hosts.timm_vit(num_classes=0), images, "flops<=0.9", progress=silent)


def test_a_plan_names_what_could_not_be_corrected(images):
    model = hosts.timm_vit()
    for block in model.blocks:
        block.mlp.fc2 = torch.nn.Sequential(block.mlp.fc2, torch.nn.Tanh())
    made = plan(model, images, "flops<=0.95", pools=0, progress=silent)
    first = made.schedule.kinds.index("S") + 1
    assert f"layer {first} left alone: last linear of the MLP" in str(made)


def test_a_latency_budget_is_kept(model, images, monkeypatch):
    measured = LayerCosts((0.25, 0.2, 0.1), (0.15, 0.1, 0.05))
    monkeypatch.setattr(run, "latency", lambda *args, **options: measured)
    found = plan(model, images, "latency<=0.8", progress=silent)
    assert found.found["cost"] == measured.of(found.schedule) <= 0.8
    assert found.found["budget"] == "latency<=0.8"


def test_latency_is_measured_for_each_kind_of_layer_in_each_stage(model, images, cache_folder):
    found = latency(model, Conversion(), 4, images[:1], pools=2, seconds=0.2)
    assert found.of(psvit.Schedule("AAAA")) == pytest.approx(1)
    assert len(found.attends) == len(found.shares) == 3
    assert all(np.isfinite((*found.attends, *found.shares)))


@pytest.mark.parametrize("change", ["nothing", "weights", "heads", "batch", "pool", "dtype"])
def test_latency_is_measured_again_where_it_may_be_another(
    model, images, change, cache_folder, monkeypatch
):
    before = latency(model, Conversion(), 4, images[:1], pools=1, seconds=0)
    monkeypatch.setattr(latency_cache, "interleaved", lambda *args, **options: pytest.fail("again"))
    other = {
        "weights": hosts.timm_vit,
        "heads": lambda: hosts.timm_vit(num_heads=2),
        "dtype": lambda: hosts.timm_vit().double(),
    }.get(change, lambda: model)()
    same = images[: 2 if change == "batch" else 1].to(next(other.parameters()).dtype)
    how = Conversion("avg" if change == "pool" else "conv")
    if change in ("nothing", "weights"):
        assert latency(other, how, 4, same, pools=1) == before
    else:
        with pytest.raises(pytest.fail.Exception, match="again"):
            latency(other, how, 4, same, pools=1)


@pytest.mark.parametrize("budget", ["flops<=0.8", "latency<=0.8"])
def test_too_few_images_are_refused_before_anything_is_measured(model, images, budget, monkeypatch):
    monkeypatch.setattr(run, "latency", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"^images: got 3, expected at least"):
        plan(model, images[:3], budget, progress=silent)


@pytest.mark.parametrize("pools", [1, 2])
def test_the_least_number_of_images_is_told_right(model, images, pools):
    options = dict(budget="flops<=1", pools=pools, longest=2, progress=silent)
    with pytest.raises(
        ValueError, match=r"^images: got 4, expected at least \d+, so that"
    ) as error:
        plan(model, images[:4], **options)
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ValueError, match=f"got {least - 1}, expected at least {least}, so that"):
        plan(model, images[: least - 1], **options)
    plan(model, images[:least], **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "plan.json").unlink(), "plan.json: No such file"),
        (lambda f: (f / "plan.json").write_text("{"), "plan.json: not a plan"),
        (lambda f: (f / "plan.json").write_text("{}"), "plan.json: not a plan of psvit"),
        (lambda f: (f / "plan.json").write_text('{"form": 3}'), "plan.json: not a whole plan"),
        (lambda f: (f / "plan.safetensors").unlink(), "plan.safetensors: not the weights"),
        (lambda f: (f / "plan.safetensors").write_bytes(b"x"), "plan.safetensors: not the weights"),
    ],
    ids=["missing", "cut", "foreign", "fields missing", "no weights", "damaged weights"],
)
def test_a_damaged_plan_is_refused_by_the_name_of_its_file(made, tmp_path, spoil, message):
    made.save(tmp_path / "plan.json")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")
