"""Plans that merge tokens: how merging is spread, what it costs, every kind of budget."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import hosts
import pytest
import torch
from surroundings import silent, threads

import psvit
from psvit import Schedule
from psvit.calibrate.lockstep import Lockstep
from psvit.planning import run
from psvit.planning.costs import Conversion, LayerCosts
from psvit.planning.front import Scored
from psvit.planning.merged_costs import MergedFLOPs, MergedLatency, merged_latency
from psvit.planning.merging import PROTECT, MergeSearch, Merging, combined, moves, scaled
from psvit.planning.plan import Plan
from psvit.planning.score import Held
from psvit.stack import find_stack, record_merges

pytest.importorskip("timm")
pytest.importorskip("safetensors")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

PLAIN = Schedule("AAAA")
HOW = Conversion()


@pytest.fixture(scope="module")
def made(model, images) -> Plan:
    with threads(1):
        return psvit.plan(model, images, "flops<=0.7", progress=silent)


# --- how merging is spread ------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.95, 0.8, 0.7])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 2, 1, 0.1), (0.1, 1, 1, 5)])
def test_no_fewer_pairs_would_do(model, shape, bound):
    cost = MergedFLOPs(model, HOW)
    counts = scaled(PLAIN, shape, cost, bound)
    assert cost(PLAIN, counts) <= bound
    totals = [sum(scaled(PLAIN, shape, cost, looser)) for looser in (bound + 0.02, bound)]
    assert totals[0] < totals[1], totals
    fewer = [(*counts[:i], r - 1, *counts[i + 1 :]) for i, r in enumerate(counts) if r]
    assert any(cost(PLAIN, other) > bound for other in fewer), (counts, fewer)


def test_pairs_follow_the_shape_to_one(model):
    cost, shape = MergedFLOPs(model, HOW), (1, 3, 2, 1)
    counts = scaled(PLAIN, shape, cost, 0.8)
    for count, weight in zip(counts, shape, strict=True):
        assert abs(count - sum(counts) * weight / 7) <= 1, counts


def test_at_most_half_of_the_patches_are_merged_and_none_before_a_pool(model):
    cost = MergedFLOPs(model, HOW)
    assert scaled(PLAIN, (1,) * 4, cost, 0.01) == (32, 16, 8, 4)
    assert scaled(Schedule("AA|AA"), (1,) * 4, cost, 0.01) == (0, 0, 8, 4)


def test_a_schedule_that_meets_the_bound_merges_nothing(model):
    assert not any(scaled(Schedule("A|AAA"), (1,) * 4, MergedFLOPs(model, HOW), 0.9))


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 13])
def test_every_layer_is_tried_alone_and_with_its_neighbours(depth):
    found = moves(depth)
    alone = {layers[0] for layers, _ in found if len(layers) == 1}
    assert alone == set(range(depth))
    for (layers, more), (same, fewer) in zip(found[::2], found[1::2], strict=True):
        assert layers == same and more > 1 and more * fewer == pytest.approx(1)


def test_the_search_finds_a_shape_that_loses_less_than_an_even_one(model, images):
    held, cost, asked = Held(model, images), MergedFLOPs(model, HOW), []
    search = MergeSearch(model, HOW, held, cost)
    merging = search.run(0.7, asked.append)
    assert len(asked) == search.trials

    def error(shape):
        counts = scaled(PLAIN, shape, cost, 0.7)
        how = replace(HOW, protect=merging.protect)
        return held.score(how.apply(model, PLAIN, counts)).error

    best = error(merging.shape)
    assert best < error((1,) * 4)
    assert merging.protect in (0.0, *PROTECT)
    at = cost(PLAIN, scaled(PLAIN, merging.shape, cost, 0.7))
    assert merging.error(at) == pytest.approx(best, rel=1e-5) and merging.error(1.0) == 0


def test_errors_are_interpolated():
    merging = Merging((1.0,), 0.0, (0.5, 0.7, 1.0), (0.4, 0.3, 0.0))
    assert merging.error(0.6) == pytest.approx(0.35) and merging.error(0.85) == pytest.approx(0.15)


def test_schedules_merge_as_much_as_brings_them_to_the_bound(model):
    cost = MergedFLOPs(model, HOW)
    merging = Merging((1.0,) * 4, 0.0, (0.5, 1.0), (0.5, 0.0))
    texts = {"AAAA": 0.0, "AASA": 0.001, "ASAA": 0.9, "A|AAA": 0.0}
    found = [Scored(loss, cost(Schedule(t), ()), Schedule(t)) for t, loss in texts.items()]
    best = combined(found, merging, cost, 0.8, 2)
    assert {one.schedule.text for one in best} == {"AAAA", "AASA"}  # A|AAA costs less already
    for one in best:
        assert one.cost == cost(one.schedule, one.merge) <= 0.8
        part = 0.8 / cost(one.schedule, ())
        assert one.loss == pytest.approx(texts[one.schedule.text] + 1 - part)
    fewer = {one.schedule.text: sum(one.merge) for one in best}
    assert fewer["AASA"] < fewer["AAAA"]


# --- what it costs ---------------------------------------------------------------------------


def test_flops_are_those_of_the_converted_model(model):
    cost = MergedFLOPs(model, HOW)
    schedule, merge = Schedule("AAS|A"), (0, 0, 0, 5)
    want = schedule.flops(model, pool="conv", merge=merge) / PLAIN.flops(model)
    assert cost(schedule, merge) == pytest.approx(want)
    assert cost.patches(schedule) == 16 and cost.tokens(PLAIN, (5, 0, 3, 0)) == [65, 60, 60, 57]


def test_latency_is_interpolated_between_what_was_measured(model):
    """A layer with t tokens costs t of them, and 0.01 more if it merges."""
    layers = LayerCosts((0.25, 0.1), (0.2, 0.08))

    def total(*tokens):
        merges = [a != b for a, b in itertools.pairwise(tokens)]
        return sum(sum(p) / 2 for p in itertools.pairwise(tokens)) / 65 / 4 + 0.01 * sum(merges)

    halved = [total(65, 33, 33, 33, 33), total(65, 33, 17, 17, 17)]
    cost = MergedLatency(model, HOW, layers, halved, each=1.04)
    assert cost(PLAIN, ()) == pytest.approx(1)
    assert cost(PLAIN, (32, 0, 0, 0)) == pytest.approx(halved[0])
    assert cost(PLAIN, (10, 0, 10, 0)) == pytest.approx(total(65, 55, 55, 45, 45))
    sharing = Schedule("ASAA")
    assert cost(sharing, (0, 0, 10, 0)) == pytest.approx(0.95 - 0.25 * 15 / 65 + 0.01)


def test_latency_of_merging_is_measured(model, images, cache_folder):
    layers = LayerCosts((0.25,), (0.2,))
    cost = merged_latency(model, HOW, layers, images[:1], seconds=0.2)
    assert cost(PLAIN, ()) == pytest.approx(1) and 0 < cost(PLAIN, (32, 16, 0, 0)) < float("inf")


# --- plans --------------------------------------------------------------------------------------


def test_a_plan_that_merges_keeps_its_budget(made, model):
    assert any(made.merge)
    part = made.schedule.flops(model, pool=made.pool, merge=made.merge) / PLAIN.flops(model)
    assert made.found["cost"] == pytest.approx(part, rel=2e-3) and part <= 0.7
    best = min(made.found["tried"], key=lambda one: one["error"])
    assert (best["schedule"], tuple(best["merge"])) == (made.schedule.text, made.merge)
    text = " ".join(str(made).split())
    assert f"layers merge {', '.join(map(str, made.merge))} pairs of tokens" in text
    assert text.count("chosen") == 1


def test_a_plan_that_merges_goes_through_files(made, model, images, tmp_path):
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    fast = again.apply(model)
    assert again.merge == made.merge == find_stack(fast).merge
    want, got = made.apply(model)(images), fast(images)
    assert torch.equal(got, want), f"largest difference {(got - want).abs().max()}"


@pytest.mark.parametrize("merge", [[1, 2], [-1, 0, 0, 0], "x", None])
def test_counts_that_do_not_fit_are_no_whole_plan(made, tmp_path, merge):
    made.save(tmp_path / "plan.json")
    path = tmp_path / "plan.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "merge": merge}))
    with pytest.raises(ValueError, match=r"plan\.json: not a whole plan of psvit"):
        Plan.load(path)


def test_what_does_best_on_images_held_out_wins(model, images):
    planner = run.Planner(model, images, HOW, silent)
    cost = MergedFLOPs(model, HOW)
    merges = [(10, 0, 0, 0), (1, 0, 0, 0)]
    found = [Scored(0.0, cost(PLAIN, merge), PLAIN, merge) for merge in merges]
    chosen = planner.best(found)
    errors = [one["error"] for one in planner.tried]
    assert chosen.predicted.merge == merges[1] and errors[1] < errors[0]


def test_agreement_as_budget_may_merge(model, images):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias -= model(images).mean(0)  # so that not all images are of one class
    found = psvit.plan(model, images, "top1_agreement>=0.6", progress=silent)
    assert found.found["measured"]["agreement"] >= 0.6
    assert any(any(one["merge"]) for one in found.found["tried"])
    costs = [one["cost"] for one in found.found["front"]]
    assert costs == sorted(costs, reverse=True) and costs[0] == pytest.approx(1)


def test_latency_as_budget_may_merge(model, images, monkeypatch):
    layers = LayerCosts((0.25, 0.25), (0.24, 0.24))  # no pool or sharing would do
    merged = MergedLatency(model, HOW, layers, [0.6, 0.4, 0.3], 1.0)
    monkeypatch.setattr(run, "latency", lambda *args, **options: layers)
    monkeypatch.setattr(run, "merged_latency", lambda *args, **options: merged)
    found = psvit.plan(model, images, "latency<=0.7", progress=silent)
    assert found.found["cost"] == merged(found.schedule, found.merge) <= 0.7
    assert any(found.merge)


@pytest.mark.parametrize("options", [{"merge": False}, {}])
def test_a_model_that_needs_every_token_and_a_plan_that_may_not_do_not_merge(images, options):
    model = hosts.timm_vit(patch_drop_rate=0.0 if options else 0.5)
    made = psvit.plan(model, images, "flops<=0.95", progress=silent, **options)
    assert not any(made.merge) and made.found["merging"] is None


def test_a_budget_that_even_merging_does_not_meet_names_the_nearest(model, images):
    with pytest.raises(ValueError, match=r"cheapest schedule found, A\S+ merging .* has 0\.\d+"):
        psvit.plan(model, images, "flops<=0.01", progress=silent)


def test_a_plan_that_merges_is_distilled(made, model, images):
    how = psvit.Distillation(steps=4, batch=8)
    tuned = psvit.distill(model, made, images, how, progress=silent)
    assert tuned.merge == made.merge
    about = tuned.found["distillation"]
    assert about["rehearsed"] != about["before"]
    assert find_stack(tuned.apply(model)).merge == made.merge


# --- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", hosts.EVERY)
def test_sharing_layers_are_corrected_in_a_model_that_merges(host):
    model, x = host(), torch.randn(30, 3, 32, 32)
    fast, report = psvit.calibrate(model, "ASAS", x, merge=[2, 1, 3, 1], progress=silent)
    assert find_stack(fast).merge == (2, 1, 3, 1)
    assert [fit.layer for fit in report.fits] == [1, 1, 3, 3]
    for fit in report.fits:
        assert fit.after < fit.before, fit


def test_layers_that_only_merge_stay_as_they_are(model, images):
    fast, report = psvit.calibrate(model, "AAAA", images, merge=5, progress=silent)
    assert not report.fits
    want = psvit.accelerate(model, "AAAA", merge=5)(images)
    assert torch.equal(fast(images), want)


def test_merging_that_cannot_be_is_refused_by_name(model, images):
    for merge, message in (([1, 2], "got 2 numbers"), (-1, "got -1 in layer 1")):
        with pytest.raises(ValueError, match=f"^merge: {message}"):
            psvit.calibrate(model, "AASA", images, merge=merge, progress=silent)


@pytest.mark.parametrize(
    ("schedule", "merge"), [("AASS", (3, 2, 4, 1)), ("AA|AS", (0, 0, 3, 2)), ("AAAA", (0, 5, 0, 5))]
)
def test_goals_are_means_of_the_tokens_that_became_one(model, images, schedule, merge):
    x, layer = images[:4], 3
    fast = psvit.accelerate(model, schedule, pool="stride", size_bias=True, merge=merge).eval()
    original = psvit.accelerate(model, "AAAA").eval()
    seen = Lockstep(original, fast).run(x, layer)
    stack, tokens = find_stack(fast), model._pos_embed(model.patch_embed(x))
    layouts = stack.layouts(tokens.shape[1])
    with torch.no_grad(), record_merges(fast) as merges:
        fast(x)
        for block in model.blocks:
            before, tokens = tokens, block(tokens)
        middle = before + model.blocks[layer].attn(model.blocks[layer].norm1(before))
        for goal, wanted, merged in (
            (seen.middle_target, middle, merges[layer - 1]),
            (seen.after_target, tokens, merges[layer]),
        ):
            if "|" in schedule:
                wanted, _ = stack.pool(0).reduce(wanted, layouts[0])
            sizes = layouts[-1].counted(wanted)
            for image, into in enumerate(merged.into):
                for one in range(goal.shape[1]):
                    part = into == one
                    weights = sizes[image, part, None]
                    mean = (wanted[image, part] * weights).sum(0) / weights.sum()
                    torch.testing.assert_close(goal[image, one], mean, rtol=1e-4, atol=1e-5)


def test_a_pass_that_goes_on_from_kept_tokens_is_the_same(model, images):
    fast = psvit.accelerate(model, "ASAA", merge=(3, 2, 4, 1)).eval()
    original = psvit.accelerate(model, "AAAA").eval()
    kept = Lockstep(original, fast)
    for layer in range(4):
        seen = kept.run(images[:4], layer, place=0)
        fresh = Lockstep(original, fast).run(images[:4], layer)
        for name in ("tokens", "after", "middle_target", "after_target", "map"):
            torch.testing.assert_close(getattr(seen, name), getattr(fresh, name))
    torch.testing.assert_close(seen.after, kept.converted(kept.embed(images[:4])))


def test_a_plan_protects_as_its_file_says(model, images, tmp_path):
    counts = (3, 3, 3, 3)
    converted = psvit.accelerate(model, PLAIN, merge=counts, protect=0.2)
    options = {"schedule": PLAIN, "pool": "max", "dims": 2, "size_bias": True}
    plan = Plan.of(model, converted, merge=counts, protect=0.2, **options)
    plan.save(tmp_path / "plan.json")
    applied = Plan.load(tmp_path / "plan.json").apply(model)
    assert find_stack(applied).protect == 0.2
    x = images[:4]
    assert torch.equal(applied(x), converted(x))
    assert not torch.equal(applied(x), psvit.accelerate(model, PLAIN, merge=counts)(x))
