"""Search spaces and their supernets: which candidates there are, and the weights that each has."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter

import hosts
import pytest
import torch

import psvit
from psvit.schedule import Schedule

pytest.importorskip("timm")

from spaces import EACH_SPACE, small_space

from psvit.search.space import Candidate, SearchSpace, Stage, default_space
from psvit.search.supernet import Supernet

pytestmark = pytest.mark.usefixtures("one_thread")


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
