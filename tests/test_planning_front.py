"""The schedules that lose least at each cost, against all of them."""

from __future__ import annotations

import random

import pytest

from psvit import Schedule
from psvit.planning.front import Losses, front

COSTS = {"A": 1.0, "S": 0.7}


def cost(kind: str, stage: int) -> float:
    return COSTS[kind] * 0.3**stage


def score(schedule: Schedule, losses: Losses) -> tuple[float, float] | None:
    """(loss, cost) by its definition; None if a part of it isn't allowed."""
    loss = total = 0.0
    for group in schedule.groups:
        if len(group) > 1:
            if (group[0], len(group)) not in losses.groups:
                return None
            loss += losses.groups[group[0], len(group)]
    for layer in schedule.pools:
        if layer not in losses.pools:
            return None
        loss += losses.pools[layer]
    for stage, layers in enumerate(schedule.stages):
        total += sum(cost(schedule.kinds[layer], stage) for layer in layers)
    return loss, total


@pytest.mark.parametrize("pools", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_that_of_all_schedules(pools, seed):
    rng = random.Random(seed)
    depth = 7
    losses = Losses(
        groups={
            (a, k): rng.random() * (k - 1)
            for a in range(depth)
            for k in (2, 3)
            if a + k <= depth and rng.random() < 0.9
        },
        pools={p: rng.random() for p in range(1, depth) if rng.random() < 0.8},
    )
    found = front(depth, losses, cost, pools=pools)
    scores = {}
    for count in range(pools + 1):
        for schedule in Schedule.enumerate(depth, pools=count):
            if (scored := score(schedule, losses)) is not None:
                scores[schedule] = scored
    for loss, total, schedule, _ in found:
        assert scores[schedule] == pytest.approx((loss, total))
        beats = [
            s
            for s, (a, b) in scores.items()
            if a <= loss + 1e-9 and b <= total + 1e-9 and (a < loss - 1e-9 or b < total - 1e-9)
        ]
        assert not beats, f"{schedule} is beaten by {beats[0]}"
    for schedule, (loss, total) in scores.items():
        assert any(f.loss <= loss + 1e-9 and f.cost <= total + 1e-9 for f in found), schedule
    assert [f.cost for f in found] == sorted((f.cost for f in found), reverse=True)
    assert found[0].schedule.is_plain


def test_nothing_allowed_leaves_the_model_as_it_is():
    (only,) = front(5, Losses({}, {}), cost)
    assert only.schedule == Schedule("AAAAA") and only.loss == 0


def test_a_deep_model_takes_no_time_to_speak_of():
    depth = 48
    rng = random.Random(0)
    groups = {(a, k): k * rng.random() for a in range(depth) for k in (2, 3, 4)}
    found = front(depth, Losses(groups, {p: rng.random() for p in range(1, depth)}), cost, pools=2)
    assert found[-1].cost < found[0].cost / 4
