"""Structured initialisation: what it warns of and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import hosts
import pytest
import torch

pytest.importorskip("timm")

from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from psvit.init import impulse_init_, norm_match_

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    hosts.ignore_schedule_warning,
    pytest.mark.filterwarnings("ignore:(heads of )?[0-9]+ (heads|dimensions)"),  # tested apart
]


def test_warns_of_few_dimensions_and_few_heads() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        impulse_init_(hosts.vit_of_pixels(width=32, heads=2))
    assert [str(w.message) for w in caught] == [
        "heads of 16 dimensions for 64 tokens, fewer than half as many: the maps will be less "
        "sharp",
        "2 heads in a layer for a filter of 9 taps: not every tap has a head",
    ]
    assert {w.filename for w in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        impulse_init_(hosts.vit_of_pixels(width=72, heads=9, grid=4))


def rotary() -> nn.Module:
    model = hosts.vit_of_pixels()
    model.rope = nn.Identity()
    return model


def without_position_embedding() -> nn.Module:
    return hosts.vit_of_pixels(pos_embed="none")


def with_norms() -> nn.Module:
    return hosts.vit_of_pixels(qk_norm=True)


def wide_attention() -> nn.Module:
    model = hosts.vit_of_pixels()
    for block in model.blocks:
        block.attn = type(block.attn)(64, num_heads=2, attn_head_dim=16, qkv_bias=True)
    return model


def same_everywhere() -> nn.Module:
    model = hosts.vit_of_pixels()
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
    report = impulse_init_(
        wide_attention(), init_vo=False, generator=torch.Generator().manual_seed(0)
    )
    assert report.mass > 0.2


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), hosts.vit_of_pixels(block_fn=ParallelScalingBlock)],
    ids=["Linear", "parallel"],
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
    model = hosts.vit_of_pixels()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        impulse_init_(model, **arguments)
    assert str(caught.value) == message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_mass_beyond_reach_is_refused() -> None:
    model = hosts.vit_of_pixels(width=16, heads=4, grid=12)  # 4 dimensions for 144 tokens
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"target_mass: got 0.99, but head 1 of layer 1 reaches"):
        impulse_init_(model, target_mass=0.99)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_control_needs_the_same_architecture_and_weights_with_a_direction() -> None:
    with pytest.raises(ValueError) as caught:
        norm_match_(hosts.vit_of_pixels(), hosts.vit_of_pixels(depth=3))
    assert str(caught.value) == (
        "reference: got another depth, width, number of heads, grid or schedule than the model's, "
        "expected the same"
    )
    with pytest.raises(ValueError) as caught:
        norm_match_(same_everywhere(), hosts.vit_of_pixels())
    assert str(caught.value) == "model: pos_embed is all zero, expected weights with a direction"
