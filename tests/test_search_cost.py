"""What candidates cost, in FLOPs and in measured time, and which of them evolution finds."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import psvit_kernels

pytest.importorskip("timm")

from spaces import EACH_SPACE, small_space, sum_of_widths

from psvit.search.cost import Limit, flops
from psvit.search.evolution import Evolution, RandomSearch
from psvit.search.latency import LatencyTable, parts_of, parts_of_all
from psvit.search.pareto import Score, front, reach, select
from psvit.search.space import Candidate, SearchSpace, Stage, default_space

pytestmark = pytest.mark.usefixtures("one_thread")


# --- costs ----------------------------------------------------------------------------------


@EACH_SPACE
def test_flops_are_those_that_pytorch_counts(changes):
    space = small_space(**changes)
    candidate = space.sample(random.Random(10))
    model = space.model(candidate).eval()
    with psvit_kernels.use("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, space.in_chans, 16, 16))
    assert flops(space, candidate) == counter.get_total_flops(), str(candidate)


@EACH_SPACE
def test_the_table_has_exactly_the_parts_that_candidates_have(changes):
    space = small_space(**changes)
    needed = {part for candidate in space for part in parts_of(candidate)}
    listed = list(parts_of_all(space))
    assert len(set(listed)) == len(listed)
    assert set(listed) == needed


def test_latency_is_the_sum_of_the_parts(cache_folder):
    space = small_space()
    table = LatencyTable.measured(space, seconds=0)
    assert set(table.entries) == set(parts_of_all(space))
    assert all(ms > 0 for ms in table.entries.values())
    candidate = Candidate.of([Stage("ASS", 8), Stage("A", 16), Stage("AA", 24)])
    entries = table.entries
    expected = [
        entries["embedding", 0, 8, 0],
        entries["donates", 0, 8, 0] + 2 * entries["shares", 0, 8, 0],
        entries["pool", 1, 16, 8] + entries["attends", 1, 16, 0],
        entries["pool", 2, 24, 16] + 2 * entries["attends", 2, 24, 0],
        entries["head", 2, 24, 0],
    ]
    assert table(candidate) == pytest.approx(sum(expected))


def test_a_second_table_measures_nothing_new(cache_folder, monkeypatch):
    first = LatencyTable.measured(small_space(), seconds=0)

    def never(*args, **options):
        pytest.fail("measured again")

    monkeypatch.setattr("psvit.latency_cache.interleaved", never)
    assert LatencyTable.measured(small_space()).entries == first.entries
    smaller = small_space(depths=((1,), (1,), (2,)))
    assert LatencyTable.measured(smaller).entries.items() <= first.entries.items()
    with pytest.raises(pytest.fail.Exception):
        LatencyTable.measured(small_space(mlp_ratio=4.0))
    with pytest.raises(pytest.fail.Exception):
        LatencyTable.measured(small_space(), batch=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flops<=0.5", Limit("flops", 0.5, True)),
        ("flops <= 40M", Limit("flops", 4e7, False)),
        ("flops<=1.2G", Limit("flops", 1.2e9, False)),
        ("latency<=.5", Limit("latency", 0.5, True)),
        ("latency<=3 ms", Limit("latency", 3.0, False)),
        ("latency<=250us", Limit("latency", 0.25, False)),
    ],
)
def test_limits_are_read(text, expected):
    found = Limit.parse(text)
    assert (found.measure, found.relative) == (expected.measure, expected.relative)
    assert found.value == pytest.approx(expected.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops", 'limit: got "flops", expected for example "flops<=0.5"'),
        ("params<=3M", "expected for example"),
        ("flops<=3ms", "expected for example"),
        ("flops<=40", "expected a part of the largest candidate up to 1, or a unit"),
        ("latency<=0", r"expected a part .* or a unit \(us, ms, s\)"),
    ],
)
def test_bad_limits_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Limit.parse(text)


def test_a_limit_is_relative_to_the_largest_candidate():
    space = small_space()

    def cost(candidate):
        return flops(space, candidate)

    assert Limit.parse("flops<=0.5").of(space, cost) == flops(space, space.largest) / 2
    assert Limit.parse("flops<=1M").of(space, cost) == 1e6
    with pytest.raises(ValueError, match=r"candidate \(A\|A\|AS 8,16,8\) costs 341 k and"):
        Limit.parse("flops<=0.05").of(space, cost)


# --- Pareto front ---------------------------------------------------------------------------


def random_scores(count: int, seed: int) -> list[Score]:
    """With ties."""
    rng = random.Random(seed)
    return [Score(rng.randrange(12) / 12, rng.randrange(1, 12)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_dominates(seed):
    scores = random_scores(60, seed)
    found = [scores[i] for i in front(scores)]
    assert set(found) == {s for s in scores if not any(t.dominates(s) for t in scores)}
    assert found == sorted(set(found), key=lambda score: score.cost)


@pytest.mark.parametrize("seed", range(5))
def test_selection_takes_whole_fronts_first(seed):
    scores = random_scores(40, seed)
    for count in (1, 7, 40, 50):
        chosen = select(scores, count)
        assert len(chosen) == len(set(chosen)) == min(count, 40)
        for i, j in itertools.product(set(range(40)) - set(chosen), chosen):
            assert not scores[i].dominates(scores[j])


def test_selection_keeps_the_ends_and_the_lonely():
    scores = [Score(c / 100, c) for c in (10, 49, 50, 51, 90, 20)]
    assert set(select(scores, 4)) == {0, 1, 4, 5} or set(select(scores, 4)) == {0, 3, 4, 5}


def test_reach_is_the_mean_of_the_best_accuracy_over_the_costs():
    scores = [Score(0.5, 2.0), Score(0.4, 3.0), Score(0.9, 4.0), Score(1.0, 7.0)]
    # Nothing up to 2, 0.5 up to 4, 0.9 up to 6.
    assert reach(scores, 1.0, 6.0) == pytest.approx((0 * 1 + 0.5 * 2 + 0.9 * 2) / 5)
    costs = torch.linspace(1, 6, 100_001)[1:].tolist()
    slow = sum(max([s.accuracy for s in scores if s.cost <= c], default=0) for c in costs)
    assert reach(scores, 1.0, 6.0) == pytest.approx(slow / len(costs), abs=1e-4)
    assert reach(scores[:1], 2.0, 2.0) == 0.5


# --- evolution ------------------------------------------------------------------------------


def landscape(space: SearchSpace):
    """An accuracy that grows with cost, and with one pattern among others of the same cost."""

    def accuracy(candidate):
        wide = sum(s.width * len(s.kinds) for s in candidate.stages)
        early = sum(s.kinds.count("S") / (1 + i) for i, s in enumerate(candidate.stages))
        pyramid = sum(a.width < b.width for a, b in itertools.pairwise(candidate.stages))
        return 1 - 1 / (1 + 0.01 * wide + 0.1 * early + 0.2 * pyramid)

    return accuracy


def searched(kind, seed: int, limit: float = 0.6, generations: int = 10):
    space = default_space(8, 1, 10)
    largest = sum_of_widths(space.largest)
    found = kind(space, landscape(space), sum_of_widths, limit * largest, 16)
    for generation in range(generations):
        found.generation(random.Random(f"{seed} {generation}"))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_evolution_beats_as_many_random_candidates(seed):
    evolved, drawn = searched(Evolution, seed), searched(RandomSearch, seed)
    assert len(evolved.evaluated) == len(drawn.evaluated) == 160
    low = sum_of_widths(evolved.space.smallest)
    found = {
        kind: reach(list(s.evaluated.values()), low, s.limit)
        for kind, s in (("evolution", evolved), ("random", drawn))
    }
    assert found["evolution"] > found["random"] + 0.005, found


def test_evolution_evaluates_nothing_twice_and_nothing_over_the_limit():
    asked = []
    space = small_space()

    def accuracy(candidate):
        asked.append(candidate)
        return random.Random(str(candidate)).random()

    def cost(candidate):
        return flops(space, candidate)

    limit = flops(space, space.largest) / 2
    search = Evolution(space, accuracy, cost, limit, population=8)
    for generation in range(5):
        search.generation(random.Random(generation))
    assert len(asked) == len(set(asked)) == len(search.evaluated) == 40
    assert all(cost(candidate) <= limit for candidate in asked)
    scores = search.evaluated
    assert all(scores[c] == Score(accuracy(c), cost(c)) for c in search.front())


def test_a_tight_limit_leaves_the_smallest_candidate():
    space = small_space()
    only = sum_of_widths(space.smallest)
    for kind in (RandomSearch, Evolution):
        search = kind(space, lambda c: 0.5, sum_of_widths, only, population=4)
        search.generation(random.Random(0))
        search.generation(random.Random(1))
        assert search.front() == list(search.evaluated) == [space.smallest]


def test_the_same_seed_finds_the_same_and_another_does_not():
    assert searched(Evolution, 1, generations=4).evaluated == (
        searched(Evolution, 1, generations=4).evaluated
    )
    assert set(searched(Evolution, 1, generations=2).evaluated) != set(
        searched(Evolution, 2, generations=2).evaluated
    )


def test_evolution_goes_on_from_its_state():
    whole = searched(Evolution, 3, generations=5)
    first = searched(Evolution, 3, generations=2)
    resumed = searched(Evolution, 3, generations=0)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for generation in range(resumed.done, 5):
        resumed.generation(random.Random(f"3 {generation}"))
    assert list(resumed.evaluated.items()) == list(whole.evaluated.items())
