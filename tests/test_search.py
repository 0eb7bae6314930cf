"""Search: the space, the supernet's weights, costs, and what evolution finds."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter

import helpers
import hosts
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import psvit
from psvit.schedule import Schedule

pytest.importorskip("timm")

from psvit.search.cost import Limit, flops
from psvit.search.evolution import Evolution, RandomSearch
from psvit.search.latency import LatencyTable, parts_of, parts_of_all
from psvit.search.pareto import Score, front, reach, select
from psvit.search.space import Candidate, SearchSpace, Stage, default_space
from psvit.search.supernet import Supernet


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for more: threads would only wait for each other."""
    with helpers.threads(1):
        yield


def small_space(**changes) -> SearchSpace:
    fields = dict(
        depths=((1, 2, 3), (1, 3), (2,)),
        widths=((8, 16), (16, 24), (8, 24)),
        head_dim=8,
        img_size=16,
        patch_size=2,
        in_chans=2,
        num_classes=5,
        mlp_ratio=2.0,
    )
    return SearchSpace(**(fields | changes))


SPACES = {
    "2d": {},
    "1d": {"dims": 1},
    "depthwise": {"pool": "depthwise", "widths": ((8, 16), (16, 32), (32,))},
    "max": {"pool": "max", "widths": ((16,),) * 3},
    "no sharing": {"sharing": False},
}
EACH_SPACE = pytest.mark.parametrize("changes", SPACES.values(), ids=SPACES)


# --- space ----------------------------------------------------------------------------------


@EACH_SPACE
def test_size_is_the_number_of_different_candidates(changes):
    space = small_space(**changes)
    candidates = list(space)
    assert len(set(candidates)) == len(candidates) == space.size()
    assert all(candidate in space for candidate in candidates)


def test_default_spaces_have_the_size_that_arithmetic_says():
    # Patterns of a stage of d layers: 2^(d-1).
    assert default_space(8, 1, 10).size() == (3 * 7) * (4 * 7) * (3 * 3)
    assert default_space(32, 3, 10).size() == (2 * 62) * (3 * 30) * (3 * 7)
    patterns = (sum(2**d for d in (5, 7, 9, 11)), sum(2**d for d in range(2, 7)), 7)
    assert default_space(224, 3, 1000).size() == 27 * patterns[0] * patterns[1] * patterns[2]


def test_largest_default_space_holds_the_tiny_preset():
    preset = psvit.models.PRESETS["psvit_2d_tiny"]
    assert Candidate(Schedule(preset.schedule), preset.widths) in default_space(224, 3, 1000)


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(Schedule("A|A|AA|A"), (8, 16, 8, 8)),
        Candidate(Schedule("A|AA|AA"), (8, 16, 8)),
        Candidate(Schedule("A|A|AA"), (8, 8, 8)),
    ],
    ids=["four stages", "another depth", "another width"],
)
def test_what_is_outside_of_a_space(candidate):
    space = small_space()
    assert candidate not in space
    with pytest.raises(ValueError, match="expected one of the space"):
        Supernet(space).slices(candidate)


def test_sharing_layers_are_outside_of_a_space_without_sharing():
    candidate = Candidate(Schedule("AS|A|AA"), (8, 16, 8))
    assert candidate in small_space()
    assert candidate not in small_space(sharing=False)


def test_samples_are_uniform_over_the_choices_of_each_stage():
    space, rng, count = small_space(), random.Random(3), 4000
    drawn = [space.sample(rng).stages for _ in range(count)]
    assert all(Candidate.of(stages) in space for stages in drawn)
    for stage, (depths, widths) in enumerate(zip(space.depths, space.widths, strict=True)):
        found = Counter((len(s[stage].kinds), s[stage].width) for s in drawn)
        for choice in itertools.product(depths, widths):
            share = found[choice] / count
            expected = 1 / len(depths) / len(widths)
            assert abs(share - expected) < 0.05, f"stage {stage}, {choice}: {share}, {expected}"
    kinds = Counter(s[0].kinds for s in drawn if len(s[0].kinds) == 3)
    assert set(kinds) == {"AAA", "AAS", "ASA", "ASS"}
    assert max(kinds.values()) < 1.35 * min(kinds.values()), kinds


@EACH_SPACE
def test_children_stay_in_the_space(changes):
    space, rng = small_space(**changes), random.Random(4)
    for _ in range(200):
        a, b = space.sample(rng), space.sample(rng)
        child = space.crossover(a, b, rng)
        assert child in space
        assert all(
            stage in pair for stage, *pair in zip(child.stages, a.stages, b.stages, strict=True)
        )
        for rate in (0.2, 1.0):
            assert space.mutate(a, rng, rate) in space
        assert space.mutate(a, rng, 0.0) == a


def test_crossover_takes_each_stage_from_either_parent():
    space, rng = small_space(), random.Random(4)
    a, b = space.smallest, space.largest
    children = {space.crossover(a, b, rng).stages for _ in range(100)}
    assert children == set(itertools.product(*zip(a.stages, b.stages, strict=True)))


def test_mutation_reaches_every_candidate():
    space, rng = small_space(), random.Random(5)
    seen = {space.mutate(space.smallest, rng, 1.0) for _ in range(20 * space.size())}
    assert seen == set(space)


def test_a_stage_that_gets_deeper_keeps_its_first_layers():
    space = small_space(depths=((2, 6), (1,), (1,)))
    rng, before = random.Random(6), Candidate.of([Stage("AS", 8), Stage("A", 16), Stage("A", 8)])
    children = (space.mutate(before, rng, 0.1) for _ in range(500))
    deeper = {c.stages[0].kinds for c in children if len(c.stages[0].kinds) == 6}
    assert sum(kinds.startswith("AS") for kinds in deeper) > 0.7 * len(deeper) > 5


def test_candidates_and_spaces_survive_being_written():
    space = small_space(img_size=(16, 32))
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    candidate = space.largest
    assert str(candidate) == "AAA|AAA|AA 16,24,24"
    assert Candidate.of(candidate.stages) == candidate
    assert hash(copy.deepcopy(candidate)) == hash(candidate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ((8, 12), (16,), (8,))}, "widths: got 12, expected multiples of head_dim, 8"),
        ({"depths": ((0, 1), (1,), (1,))}, "depths: got 0, expected a whole number from 1 up"),
        ({"depths": ((1,), (), (1,))}, "depths: got a stage without choices"),
        ({"depths": ((1, 1), (1,), (1,))}, r"depths: got \(1, 1\), expected different choices"),
        ({"depths": ((1,), (1,))}, "widths: got choices for 3 stages and depths for 2"),
        ({"img_size": 18, "patch_size": 4}, "img_size: got 18 x 18, expected multiples of 4"),
        ({"img_size": 4}, "img_size: got 4 x 4, expected multiples of 2, from 6 x 6 on"),
        ({"pool": "max"}, 'widths: got 8 and then 16 with pool "max"'),
        ({"pool": "depthwise"}, 'widths: got 16 and then 24 with pool "depthwise"'),
        ({"head_dim": 0}, "head_dim: got 0, expected a whole number from 1 up"),
    ],
)
def test_bad_spaces_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_space(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": [[1]]}, 'space: got "depth", expected one of .*; did you mean depths?'),
        ({"widths": [[8]]}, "depths: got None, expected a list of choices for each stage"),
        ({"depths": [1, 2], "widths": [[8]]}, r"depths: got \[1, 2\], expected a list of choices"),
    ],
)
def test_bad_files_of_spaces_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_dict(fields)


# --- supernet -------------------------------------------------------------------------------


def supernet(**changes) -> tuple[SearchSpace, Supernet, torch.Tensor]:
    """Every weight random, biases and norms too."""
    space = small_space(**changes)
    net = hosts.randomised(Supernet(space))
    return space, net, torch.randn(3, space.in_chans, 16, 16)


@EACH_SPACE
def test_a_candidate_in_the_supernet_is_its_own_model_to_the_bit(changes):
    space, net, images = supernet(**changes)
    rng = random.Random(7)
    for candidate in [space.smallest, space.largest, *(space.sample(rng) for _ in range(12))]:
        inside, alone = net(images, candidate), net.extract(candidate)(images)
        difference = (inside - alone).abs().max()
        assert torch.equal(inside, alone), f"{candidate}: {tuple(alone.shape)}, {difference}"
        assert alone.isfinite().all() and alone.std() > 0


def test_slices_are_the_first_heads_of_the_layer_at_the_same_place():
    _, net, _ = supernet()
    candidate = Candidate.of([Stage("AS", 8), Stage("A", 16), Stage("AS", 24)])
    slices, largest = net.slices(candidate), dict(net.largest.named_parameters())
    whole = largest["blocks.0.attn.qkv.weight"]  # 3 x 16 rows; Q, K and V of 8
    rows = torch.cat([whole[first : first + 8, :8] for first in (0, 16, 32)])
    assert torch.equal(slices["blocks.0.attn.qkv.weight"], rows)
    assert torch.equal(
        slices["blocks.1.attn.qkv.weight"], largest["blocks.1.attn.qkv.weight"][32:40, :8]
    )
    # The largest has three layers in the first stage, and three in the second.
    third = largest["blocks.6.mlp.fc1.weight"]
    assert torch.equal(slices["blocks.3.mlp.fc1.weight"], third)
    assert torch.equal(
        slices["blocks.2.mlp.fc1.weight"], largest["blocks.3.mlp.fc1.weight"][:32, :16]
    )
    assert torch.equal(
        slices["blocks.pools.0.conv.weight"], largest["blocks.pools.0.conv.weight"][:16, :8]
    )
    assert torch.equal(slices["pos_embed"], largest["pos_embed"][:, :, :8])


@EACH_SPACE
def test_gradients_reach_the_slices_that_a_candidate_uses_and_no_more(changes):
    space, net, images = supernet(**changes)
    candidate = space.sample(random.Random(8))
    net(images, candidate).square().sum().backward()
    alone = net.extract(candidate)
    alone(images).square().sum().backward()
    grads = {name: p.grad for name, p in net.largest.named_parameters()}
    # A supernet whose weights are gradients has slices that are gradients.
    gradient = copy.deepcopy(net)
    for name, parameter in gradient.largest.named_parameters():
        parameter.data = torch.zeros_like(parameter) if grads[name] is None else grads[name]
    used = 0
    for (name, own), found in zip(
        alone.named_parameters(), gradient.slices(candidate).values(), strict=True
    ):
        error = (own.grad - found).abs().max()
        assert torch.allclose(own.grad, found, rtol=1e-4, atol=1e-6), f"{name}: {error}"
        used += own.grad.count_nonzero()
    everywhere = sum(int(g.count_nonzero()) for g in grads.values() if g is not None)
    assert everywhere == used, f"{everywhere} elements have gradients, {used} were used"


def test_the_supernet_is_copied_and_saved_like_any_module():
    space, net, images = supernet()
    candidate = space.sample(random.Random(9))
    expected = net(images, candidate)
    assert torch.equal(copy.deepcopy(net)(images, candidate), expected)
    fresh = Supernet(space)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(images, candidate), expected)


def test_an_extracted_model_has_weights_of_its_own():
    space, net, images = supernet()
    alone = net.extract(space.largest)
    before = net(images, space.largest)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    assert torch.equal(net(images, space.largest), before)


# --- costs ----------------------------------------------------------------------------------


@EACH_SPACE
def test_flops_are_those_that_pytorch_counts(changes):
    space = small_space(**changes)
    candidate = space.sample(random.Random(10))
    model = space.model(candidate).eval()
    with psvit_reference(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, space.in_chans, 16, 16))
    assert flops(space, candidate) == counter.get_total_flops(), str(candidate)


def psvit_reference():
    import psvit_kernels

    return psvit_kernels.use("reference")


@EACH_SPACE
def test_the_table_has_exactly_the_parts_that_candidates_have(changes):
    space = small_space(**changes)
    needed = {part for candidate in space for part in parts_of(candidate)}
    listed = list(parts_of_all(space))
    assert len(set(listed)) == len(listed)
    assert set(listed) == needed


def test_latency_is_the_sum_of_the_parts(tmp_path):
    space = small_space()
    table = LatencyTable.measured(space, seconds=0, kept=tmp_path / "kept.json")
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


def test_a_second_table_measures_nothing_new(tmp_path, monkeypatch):
    kept = tmp_path / "folder" / "kept.json"
    first = LatencyTable.measured(small_space(), seconds=0, kept=kept)

    def never(*args, **options):
        pytest.fail("measured again")

    monkeypatch.setattr("psvit.search.latency.interleaved", never)
    assert LatencyTable.measured(small_space(), kept=kept).entries == first.entries
    smaller = small_space(depths=((1,), (1,), (2,)))
    assert LatencyTable.measured(smaller, kept=kept).entries.items() <= first.entries.items()
    with pytest.raises(pytest.fail.Exception):
        LatencyTable.measured(small_space(mlp_ratio=4.0), kept=kept)
    with pytest.raises(pytest.fail.Exception):
        LatencyTable.measured(small_space(), batch=2, kept=kept)


def test_a_damaged_file_of_latencies_is_measured_again(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text('{"cpu": {"embed')
    with pytest.warns(UserWarning, match="no JSON; its latencies are measured again"):
        LatencyTable.measured(small_space(), seconds=0, kept=kept)
    assert json.loads(kept.read_text())


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


def sum_of_widths(candidate: Candidate) -> float:
    layers = [(k, s.width, i) for i, s in enumerate(candidate.stages) for k in s.kinds]
    return sum(width**2 / 4**i * (3 if kind == "A" else 2) for kind, width, i in layers)


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
