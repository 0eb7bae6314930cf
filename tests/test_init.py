"""Structured initialisation: what is exact, what holds within a tolerance, and what must fail."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surroundings import threads

pytest.importorskip("timm")

from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

import psvit
from psvit.init import (
    Report,
    impulse_init_,
    measure,
    mimetic_init_,
    norm_match_,
    shift_filter,
)
from psvit.init.shifts import taps


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """In one thread; these small models warn of few heads, which has a test of its own."""
    with threads(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(heads of )?[0-9]+ (heads|dimensions)")
        warnings.filterwarnings("ignore", ".*schedule.*")  # that a converted model needs training
        yield


def vit(width: int = 64, heads: int = 2, grid: int = 8, depth: int = 2, **more: Any) -> Any:
    """timm's, one token a pixel."""
    return VisionTransformer(
        img_size=grid, patch_size=1, in_chans=1, num_classes=3,
        embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=1, **more,
    )  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def queries_and_keys(model: Any, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Weights of each head, `(H, d, D)`."""
    attention = model.blocks[layer].attn
    query, key, _ = attention.qkv.weight.detach().chunk(3)
    return tuple(w.unflatten(0, (attention.num_heads, -1)) for w in (query, key))  # type: ignore[return-value]


def places(model: Any) -> Tensor:
    prefix = model.num_prefix_tokens
    return F.layer_norm(model.pos_embed.detach()[0, prefix:], model.pos_embed.shape[2:])


# --- the filters ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 4)])
def test_shift_filters_have_rows_of_one_or_zero_and_do_not_wrap(grid: tuple[int, int]) -> None:
    h, w = grid
    for dy, dx in taps(5):
        found = shift_filter(grid, (dy, dx))
        assert set(found.sum(1).tolist()) <= {0.0, 1.0}
        assert found.sum() == max(0, h - abs(dy)) * max(0, w - abs(dx))
        for row, column in found.nonzero().tolist():
            assert (row // w + dy, row % w + dx) == (column // w, column % w)


def test_taps_come_nearest_first() -> None:
    sides, corners = [(-1, 0), (0, 1), (0, -1), (1, 0)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert taps(3) == [(0, 0), *sides, *corners]
    assert taps(5)[:9] == taps(3) and len(set(taps(5))) == 25
    assert taps(1) == [(0, 0)]


# --- exact ----------------------------------------------------------------------------------


def test_norms_equal_the_gain_and_the_rank_is_at_most_a_heads() -> None:
    model = vit(heads=4).double()
    impulse_init_(model, gain=5.0, generator=seeded())
    for layer in range(2):
        query, key = queries_and_keys(model, layer)
        for weights in (query, key):
            assert torch.linalg.matrix_norm(weights) == pytest.approx(5.0, rel=1e-12)
        assert int(torch.linalg.matrix_rank(query.mT @ key).max()) <= 16


def test_value_and_output_make_minus_four_tenths_of_the_identity_and_noise() -> None:
    model = vit(width=96, heads=3).double()
    impulse_init_(model, generator=seeded())
    for block in model.blocks:
        product = (block.attn.proj.weight @ block.attn.qkv.weight[2 * 96 :]).detach()
        rest = product + 0.4 * torch.eye(96)
        assert float(product.diagonal().mean()) == pytest.approx(-0.4, abs=0.02)
        assert float(rest.abs().max()) <= 0.4 * math.sqrt(3 / 96) + 1e-12  # uniform
        assert float(rest.square().mean()) == pytest.approx(0.16 / 96, rel=0.05)


def test_without_noise_the_scores_are_the_filter_and_a_head_shifts_the_image() -> None:
    model = vit(width=32, heads=1, grid=5, depth=1, class_token=False, global_pool="avg").double()
    offset = (1, -1)
    impulse_init_(model, offsets=[offset], noise=0.0, pinv_rank="full", gain=100.0, init_vo=False)
    (query,), (key,) = queries_and_keys(model)
    target = shift_filter((5, 5), offset)
    scores = (places(model) @ query.T) @ (places(model) @ key.T).T / math.sqrt(32)
    valid = target.any(1)
    size = float(scores[target.bool()].mean())
    torch.testing.assert_close(scores[valid], size * target[valid], rtol=0, atol=1e-6 * size)

    one_hot = torch.zeros(5, 5, dtype=torch.float64)
    one_hot[3, 1] = 1
    seen = (scores.softmax(1) @ one_hot.flatten()).unflatten(0, (5, 5))
    shifted = torch.zeros(5, 5, dtype=torch.float64)
    shifted[2, 2] = 1  # the token that looks one down and one to the left
    torch.testing.assert_close(seen[:4, 1:], shifted[:4, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "initialise",
    [impulse_init_, mimetic_init_, lambda m, **more: impulse_init_(m, method="gradient", **more)],
    ids=["impulse", "mimetic", "gradient"],
)
def test_nothing_else_changes(initialise: Callable[..., Report]) -> None:
    model = vit(depth=3, reg_tokens=2, init_values=0.1)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.bias)
    before = copy.deepcopy(model.state_dict())
    initialise(model, layers=[1], pos_scale=18.0, generator=seeded())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"pos_embed", "blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"}
    assert torch.equal(model.pos_embed, before["pos_embed"] * 18)
    assert model.pos_embed.requires_grad


def test_values_and_output_stay_if_they_shall() -> None:
    model = vit()
    before = copy.deepcopy(model.blocks[0].attn.state_dict())
    impulse_init_(model, init_vo=False, zero_qk_bias=True)
    attention = model.blocks[0].attn
    assert torch.equal(attention.proj.weight, before["proj.weight"])
    assert torch.equal(attention.qkv.weight[128:], before["qkv.weight"][128:])
    assert not torch.equal(attention.qkv.weight[:128], before["qkv.weight"][:128])


def test_biases_of_queries_and_keys_become_zero_if_they_shall() -> None:
    model = vit()
    nn.init.normal_(model.blocks[0].attn.qkv.bias)
    before = model.blocks[0].attn.qkv.bias.detach().clone()
    impulse_init_(model, zero_qk_bias=True)
    bias = model.blocks[0].attn.qkv.bias
    assert not bias[:128].any() and torch.equal(bias[128:], before[128:])


@pytest.mark.parametrize("offsets", ["fixed", "random"])
def test_the_same_generator_gives_the_same_weights(offsets: Any) -> None:
    first, second, third = (vit() for _ in range(3))
    second.load_state_dict(first.state_dict())
    third.load_state_dict(first.state_dict())
    for model, seed in ((first, 7), (second, 7), (third, 8)):
        torch.rand(1)  # the global generator plays no part
        impulse_init_(model, offsets=offsets, generator=seeded(seed))
    states = [model.blocks.state_dict() for model in (first, second, third)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert not torch.equal(states[0]["0.attn.qkv.weight"], states[2]["0.attn.qkv.weight"])
    assert not torch.equal(states[0]["0.attn.qkv.weight"], states[0]["1.attn.qkv.weight"])


# --- within tolerance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "grid"),
    [(192, 3, 14), (384, 6, 14), (768, 12, 14), (192, 3, 16), (192, 3, 8)],
    ids=["Ti/16@224", "S/16@224", "B/16@224", "Ti/2@32", "Ti/4@32"],
)
def test_heads_look_at_their_target(width: int, heads: int, grid: int) -> None:
    report = impulse_init_(vit(width, heads, grid, depth=1), generator=seeded())
    assert report.argmax >= 0.95
    assert report.mass >= 0.65


def test_the_report_is_what_the_model_computes() -> None:
    model = vit(heads=2, depth=1).eval()
    report = impulse_init_(model, generator=seeded())
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv(places(model)).unflatten(1, (3, 2, 32)).permute(1, 2, 0, 3)
    maps = (qkv[0] @ qkv[1].mT / math.sqrt(32)).softmax(-1)
    for head, offset in enumerate(report.rows[0].offsets):
        target = shift_filter((8, 8), offset).float()
        mass = (maps[head] * target).sum() / target.sum()
        assert report.rows[0].mass[head] == pytest.approx(float(mass), abs=1e-4)


def test_a_mass_is_reached_by_each_head() -> None:
    model = vit(heads=2)
    report = impulse_init_(model, target_mass=0.8, generator=seeded())
    for row in report.rows:
        assert row.mass == pytest.approx((0.8, 0.8), abs=1e-4)


def test_sines_and_cosines_defeat_the_closed_form_and_not_the_gradient() -> None:
    model = vit(heads=2, class_token=False, global_pool="avg")
    model.pos_embed.data[0] = build_sincos2d_pos_embed([8, 8], dim=64)
    closed = impulse_init_(copy.deepcopy(model), generator=seeded())
    assert closed.mass == pytest.approx(1 / 64, rel=0.2)
    assert closed.remarks[-2:] == (
        "Uniform maps, mass about 1/N (1.56%): layers 1, 2.",
        "The closed form needs a position embedding whose largest singular values are alike, as "
        'noise has; for sines and cosines use method="gradient".',
    )
    solved = impulse_init_(model, method="gradient", gain=10.0, layers=[0], generator=seeded())
    assert solved.mass > 0.65 and solved.argmax > 0.95 and not solved.remarks


# --- the peer and the control ---------------------------------------------------------------


def test_mimetic_heads_look_at_themselves() -> None:
    model = vit(width=192, heads=3, depth=1)
    report = mimetic_init_(model, pos_scale=18.0, generator=seeded())
    query, key = (w.double() for w in queries_and_keys(model))
    assert int(torch.linalg.matrix_rank(query.mT @ key, rtol=1e-5).max()) <= 64
    assert report.mass > 0.9 and report.rows[0].offsets == ((0, 0),) * 3


def test_the_control_has_the_norms_and_its_own_directions() -> None:
    model, reference = vit(), vit()
    before = [w.clone() for w in queries_and_keys(model)]
    impulse_init_(reference, generator=seeded())
    kept = copy.deepcopy(reference.state_dict())
    report = norm_match_(model, reference)
    for now, then, wanted in zip(
        queries_and_keys(model), before, queries_and_keys(reference), strict=True
    ):
        norms = [torch.linalg.matrix_norm(w) for w in (now, wanted)]
        torch.testing.assert_close(*norms)
        cosine = F.cosine_similarity(now.flatten(1), then.flatten(1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(model.pos_embed.norm(), reference.pos_embed.norm())
    assert report.mass < 0.1  # it has none of the structure
    assert all(torch.equal(v, kept[k]) for k, v in reference.state_dict().items())


# --- sharing and pooling --------------------------------------------------------------------


def test_a_sharing_layer_starts_with_its_donors_map() -> None:
    model = psvit.accelerate(vit(depth=3), "ASA", strip=True)
    report = impulse_init_(model, generator=seeded())
    donor, sharing, _ = report.rows
    assert (sharing.donor, sharing.mass, sharing.argmax) == (0, donor.mass, donor.argmax)
    assert report.remarks == (
        "Layers without queries and keys of their own start with their donor's map: layer 2.",
    )
    assert "of layer 1" in str(report)
    attention = model.blocks.block(1).attn
    product = (attention.proj.weight @ attention.qkv.weight).detach()
    assert float(product.diagonal().mean()) == pytest.approx(-0.4, abs=0.03)


@pytest.mark.parametrize("pool", ["avg", "stride", "conv"])
def test_linear_pools_hand_the_position_embedding_on(pool: Any) -> None:
    model = psvit.accelerate(vit(width=96, heads=3, depth=2), "A|A", pool=pool)
    report = impulse_init_(model, generator=seeded())
    assert report.argmax > 0.95 and report.mass > 0.65 and not report.remarks


@pytest.mark.parametrize(
    "options", [{}, {"class_token": True, "pool_positions": True}, {"pool": "depthwise"}], ids=str
)
def test_psvit_models_are_initialised_stage_by_stage(options: dict[str, Any]) -> None:
    size = {"head_dim": 32, "img_size": 8, "patch_size": 1, "in_chans": 1}
    model = psvit.PSViT("AS|A", (96, 192), **size, **options)
    report = impulse_init_(model, generator=seeded())
    assert [row.donor for row in report.rows] == [0, 0, 2]
    assert [len(row.offsets) for row in report.rows] == [3, 3, 6]
    assert report.argmax > 0.95 and report.mass > 0.65


def test_psvit_models_of_a_sequence_are_initialised_up_to_the_first_pool() -> None:
    sequence = psvit.PSViT("A|A", 96, dims=1, head_dim=32, img_size=8, patch_size=1, in_chans=1)
    first, second = impulse_init_(sequence, generator=seeded()).rows
    assert min(first.argmax) > 0.95 and second.missing


def test_free_dimensions_of_a_head_keep_their_gradient() -> None:
    model = vit(width=64, heads=1, grid=4, depth=1)  # 16 tokens, 64 dimensions
    report = impulse_init_(model, generator=seeded())
    assert report.argmax == 1
    model(torch.randn(2, 1, 4, 4)).square().sum().backward()
    query, key = (w[0] for w in queries_and_keys(model))
    assert bool((query.abs().sum(1) + key.abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pool": "max"}, "after a max pool positions can't be told apart from content"),
        (
            {"pool": "avg", "dims": 1},
            "after a pool of the sequence the tokens have no grid",
        ),
    ],
)
def test_layers_without_a_position_embedding_stay_and_the_report_says_so(
    options: dict[str, Any], reason: str
) -> None:
    model = psvit.accelerate(vit(), "A|A", **options)
    before = copy.deepcopy(model.blocks.block(1).state_dict())
    report = impulse_init_(model, generator=seeded())
    assert report.rows[1].missing == reason and not report.rows[1].mass
    assert report.remarks == (
        f"Maps that don't follow from positions: layer 2 ({reason}).",
        "Those layers were left as they were.",
    )
    after = model.blocks.block(1).state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


# --- the report -----------------------------------------------------------------------------


def test_the_report_reads_well_and_is_json() -> None:
    model = vit(heads=2)
    untouched = measure(model)
    assert untouched.mass < 0.05
    report = impulse_init_(model, generator=seeded())
    assert measure(model) == report
    assert repr(report) == f"Report(2 layers, mass {report.mass:.3f}, argmax {report.argmax:.3f})"
    assert "its own" in str(report)
    assert len(json.loads(json.dumps(report.to_dict()))["rows"]) == 2


# --- warnings and refusals ------------------------------------------------------------------


def test_warns_of_few_dimensions_and_few_heads() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        impulse_init_(vit(width=32, heads=2))
    assert [str(w.message) for w in caught] == [
        "heads of 16 dimensions for 64 tokens, fewer than half as many: the maps will be less "
        "sharp",
        "2 heads in a layer for a filter of 9 taps: not every tap has a head",
    ]
    assert {w.filename for w in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impulse_init_(vit(width=72, heads=9, grid=4))


def rotary() -> nn.Module:
    model = vit()
    model.rope = nn.Identity()
    return model


def without_position_embedding() -> nn.Module:
    return vit(pos_embed="none")


def with_norms() -> nn.Module:
    return vit(qk_norm=True)


def wide_attention() -> nn.Module:
    model = vit()
    for block in model.blocks:
        block.attn = type(block.attn)(64, num_heads=2, attn_head_dim=16, qkv_bias=True)
    return model


def same_everywhere() -> nn.Module:
    model = vit()
    nn.init.zeros_(model.pos_embed)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            with_norms,
            "model: layer 1 has q_norm (LayerNorm), which undoes the gain of queries and keys; "
            "expected a model without q/k norm",
        ),
        (
            rotary,
            "model: got VisionTransformer with rotary position embeddings, expected one that is "
            "added at the input",
        ),
        (
            without_position_embedding,
            "model: got VisionTransformer without a position embedding (pos_embed), expected one: "
            "the maps are made from it",
        ),
        (
            wide_attention,
            "init_vo: got True for layer 1, whose attention is 32 wide with tokens of 64; expected "
            "equal widths, or init_vo=False",
        ),
        (
            same_everywhere,
            "model: its pos_embed is the same everywhere, expected one that tells places apart",
        ),
    ],
)
def test_models_that_are_refused_stay_as_they_are(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        impulse_init_(model)
    assert str(caught.value) == message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_attention_of_another_width_is_initialised_without_its_values() -> None:
    report = impulse_init_(wide_attention(), init_vo=False, generator=seeded())
    assert report.mass > 0.2


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), vit(block_fn=ParallelScalingBlock)], ids=["Linear", "parallel"]
)
def test_other_models_are_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError) as caught:
        impulse_init_(model)
    assert str(caught.value) == (
        f"model: got {type(model).__name__}, expected timm's VisionTransformer with its usual "
        f"blocks, or a PSViT model"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "svd"}, 'method: got "svd", expected "closed_form" or "gradient"'),
        ({"kernel_size": 4}, "kernel_size: got 4, expected an odd number from 1 up"),
        (
            {"kernel_size": 17},
            "kernel_size: got 17, expected at most 15 for a grid of 8 x 8",
        ),
        (
            {"offsets": "near"},
            'offsets: got "near", expected "fixed", "random" or a list of (dy, dx)',
        ),
        ({"offsets": []}, "offsets: got an empty list, expected at least one (dy, dx)"),
        (
            {"offsets": [(0, 8)]},
            "offsets: got (0, 8), which leaves a grid of 8 x 8 from every token",
        ),
        ({"pos_scale": 0.0}, "pos_scale: got 0.0, expected a number above 0"),
        ({"gain": math.nan}, "gain: got nan, expected a number above 0"),
        ({"noise": -1.0}, "noise: got -1.0, expected a number from 0 up"),
        ({"target_mass": 1.0}, "target_mass: got 1.0, expected between 0 and 1"),
        ({"pinv_rank": 0}, 'pinv_rank: got 0, expected "head_dim", "full" or a number from 1 up'),
        ({"layers": [0, 2]}, "layers: got 2, expected 0 to 1: the model has 2 layers"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        impulse_init_(model, **arguments)
    assert str(caught.value) == message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_mass_beyond_reach_is_refused() -> None:
    model = vit(width=16, heads=4, grid=12)  # 4 dimensions for 144 tokens
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"target_mass: got 0.99, but head 1 of layer 1 reaches"):
        impulse_init_(model, target_mass=0.99)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_control_needs_the_same_architecture_and_weights_with_a_direction() -> None:
    with pytest.raises(ValueError) as caught:
        norm_match_(vit(), vit(depth=3))
    assert str(caught.value) == (
        "reference: got another depth, width, number of heads, grid or schedule than the model's, "
        "expected the same"
    )
    with pytest.raises(ValueError) as caught:
        norm_match_(same_everywhere(), vit())
    assert str(caught.value) == "model: pos_embed is all zero, expected weights with a direction"
