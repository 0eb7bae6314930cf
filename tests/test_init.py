"""Structured initialisation: what is exact, and what holds within a tolerance."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import hosts
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

from timm.layers import build_sincos2d_pos_embed
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

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    hosts.ignore_schedule_warning,
    pytest.mark.filterwarnings("ignore:(heads of )?[0-9]+ (heads|dimensions)"),  # tested apart
]


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
    model = hosts.vit_of_pixels(heads=4).double()
    impulse_init_(model, gain=5.0, generator=seeded())
    for layer in range(2):
        query, key = queries_and_keys(model, layer)
        for weights in (query, key):
            assert torch.linalg.matrix_norm(weights) == pytest.approx(5.0, rel=1e-12)
        assert int(torch.linalg.matrix_rank(query.mT @ key).max()) <= 16


def test_value_and_output_make_minus_four_tenths_of_the_identity_and_noise() -> None:
    model = hosts.vit_of_pixels(width=96, heads=3).double()
    impulse_init_(model, generator=seeded())
    for block in model.blocks:
        product = (block.attn.proj.weight @ block.attn.qkv.weight[2 * 96 :]).detach()
        rest = product + 0.4 * torch.eye(96)
        assert float(product.diagonal().mean()) == pytest.approx(-0.4, abs=0.02)
        assert float(rest.abs().max()) <= 0.4 * math.sqrt(3 / 96) + 1e-12  # uniform
        assert float(rest.square().mean()) == pytest.approx(0.16 / 96, rel=0.05)


def test_without_noise_the_scores_are_the_filter_and_a_head_shifts_the_image() -> None:
    model = hosts.vit_of_pixels(
        width=32, heads=1, grid=5, depth=1, class_token=False, global_pool="avg"
    ).double()
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
    model = hosts.vit_of_pixels(depth=3, reg_tokens=2, init_values=0.1)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.bias)
    before = copy.deepcopy(model.state_dict())
    initialise(model, layers=[1], pos_scale=18.0, generator=seeded())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"pos_embed", "blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"}
    assert torch.equal(model.pos_embed, before["pos_embed"] * 18)
    assert model.pos_embed.requires_grad


def test_values_and_output_stay_if_they_shall() -> None:
    model = hosts.vit_of_pixels()
    before = copy.deepcopy(model.blocks[0].attn.state_dict())
    impulse_init_(model, init_vo=False, zero_qk_bias=True)
    attention = model.blocks[0].attn
    assert torch.equal(attention.proj.weight, before["proj.weight"])
    assert torch.equal(attention.qkv.weight[128:], before["qkv.weight"][128:])
    assert not torch.equal(attention.qkv.weight[:128], before["qkv.weight"][:128])


def test_biases_of_queries_and_keys_become_zero_if_they_shall() -> None:
    model = hosts.vit_of_pixels()
    nn.init.normal_(model.blocks[0].attn.qkv.bias)
    before = model.blocks[0].attn.qkv.bias.detach().clone()
    impulse_init_(model, zero_qk_bias=True)
    bias = model.blocks[0].attn.qkv.bias
    assert not bias[:128].any() and torch.equal(bias[128:], before[128:])


@pytest.mark.parametrize("offsets", ["fixed", "random"])
def test_the_same_generator_gives_the_same_weights(offsets: Any) -> None:
    first, second, third = (hosts.vit_of_pixels() for _ in range(3))
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
    report = impulse_init_(hosts.vit_of_pixels(width, heads, grid, depth=1), generator=seeded())
    assert report.argmax >= 0.95
    assert report.mass >= 0.65


def test_the_report_is_what_the_model_computes() -> None:
    model = hosts.vit_of_pixels(heads=2, depth=1).eval()
    report = impulse_init_(model, generator=seeded())
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv(places(model)).unflatten(1, (3, 2, 32)).permute(1, 2, 0, 3)
    maps = (qkv[0] @ qkv[1].mT / math.sqrt(32)).softmax(-1)
    for head, offset in enumerate(report.rows[0].offsets):
        target = shift_filter((8, 8), offset).float()
        mass = (maps[head] * target).sum() / target.sum()
        assert report.rows[0].mass[head] == pytest.approx(float(mass), abs=1e-4)


def test_a_mass_is_reached_by_each_head() -> None:
    model = hosts.vit_of_pixels(heads=2)
    report = impulse_init_(model, target_mass=0.8, generator=seeded())
    for row in report.rows:
        assert row.mass == pytest.approx((0.8, 0.8), abs=1e-4)


def test_sines_and_cosines_defeat_the_closed_form_and_not_the_gradient() -> None:
    model = hosts.vit_of_pixels(heads=2, class_token=False, global_pool="avg")
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
    model = hosts.vit_of_pixels(width=192, heads=3, depth=1)
    report = mimetic_init_(model, pos_scale=18.0, generator=seeded())
    query, key = (w.double() for w in queries_and_keys(model))
    assert int(torch.linalg.matrix_rank(query.mT @ key, rtol=1e-5).max()) <= 64
    assert report.mass > 0.9 and report.rows[0].offsets == ((0, 0),) * 3


def test_the_control_has_the_norms_and_its_own_directions() -> None:
    model, reference = hosts.vit_of_pixels(), hosts.vit_of_pixels()
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
    model = psvit.accelerate(hosts.vit_of_pixels(depth=3), "ASA", strip=True)
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
    model = psvit.accelerate(hosts.vit_of_pixels(width=96, heads=3, depth=2), "A|A", pool=pool)
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
    model = hosts.vit_of_pixels(width=64, heads=1, grid=4, depth=1)  # 16 tokens, 64 dimensions
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
    model = psvit.accelerate(hosts.vit_of_pixels(), "A|A", **options)
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
    model = hosts.vit_of_pixels(heads=2)
    untouched = measure(model)
    assert untouched.mass < 0.05
    report = impulse_init_(model, generator=seeded())
    assert measure(model) == report
    assert repr(report) == f"Report(2 layers, mass {report.mass:.3f}, argmax {report.argmax:.3f})"
    assert "its own" in str(report)
    assert len(json.loads(json.dumps(report.to_dict()))["rows"]) == 2
