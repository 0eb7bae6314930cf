"""PSViT models as backbones: their pools back and forth, and the features of their layers."""

from __future__ import annotations

import hosts
import pytest
import torch
import torch.nn.functional as F
from psvits import DIMS, small
from torch import nn

import psvit
from psvit.models import PRESETS
from psvit.models.pool import STAGE_KINDS, StagePool

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


def stage_pool(kind: str, dims: int, inside: bool, prefix: int = 1) -> StagePool:
    width = 12 if kind in ("conv", "depthwise") else 6
    pool = StagePool(kind, 6, width, dims=dims, prefix=prefix, inside=inside, norm=False).double()
    for name, parameter in pool.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter)
    return pool


LINEAR = [("avg", 1, True), ("avg", 1, False), ("stride", 1, True), ("stride", 1, False)]
LINEAR += [(kind, 2, False) for kind in STAGE_KINDS if kind != "max"]


@pytest.mark.parametrize(("kind", "dims", "inside"), LINEAR)
@pytest.mark.parametrize("grid", [(1, 2), (3, 4), (8, 5)])
def test_expand_is_the_adjoint_of_reduce(kind, dims, inside, grid):
    pool, layout = stage_pool(kind, dims, inside), psvit.Layout(1, grid)
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    reduced, after = pool.reduce(x, layout)
    assert after.tokens == reduced.shape[1]
    y = torch.randn_like(reduced)
    torch.testing.assert_close((reduced * y).sum(), (x * pool.expand(y, layout)).sum())


def test_expand_of_a_pooled_sequence_takes_the_average_for_the_maximum():
    pool, layout = stage_pool("conv", 1, True), psvit.Layout(1, (3, 4))
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    wide = F.conv1d(x.mT, pool.conv.weight, None, 1, 1)
    average = F.avg_pool1d(wide, 3, 2, 1, count_include_pad=False).mT
    y = torch.randn_like(average)
    torch.testing.assert_close((average * y).sum(), (x * pool.expand(y, layout)).sum())


@pytest.mark.parametrize("kind", STAGE_KINDS)
@pytest.mark.parametrize(("dims", "inside"), [(1, True), (1, False), (2, False)])
def test_upsample_keeps_constants_and_means_over_the_windows_of_a_cell(kind, dims, inside):
    pool, layout = stage_pool(kind, dims, inside), psvit.Layout(1, (3, 4))
    after = pool.reduced(layout)
    ones = torch.ones(1, after.tokens, 3, dtype=torch.float64)
    torch.testing.assert_close(pool.upsample(ones, layout), ones.new_ones(1, layout.tokens, 3))
    y = torch.randn(1, after.tokens, 3, dtype=torch.float64)
    low, high = y.amin(1, keepdim=True), y.amax(1, keepdim=True)
    z = pool.upsample(y, layout)
    assert (z >= low - 1e-12).all() and (z <= high + 1e-12).all()


def test_upsample_of_a_grid_puts_each_token_where_it_came_from():
    pool, layout = stage_pool("conv", 2, False, prefix=0), psvit.Layout(0, (1, 5))
    y = torch.tensor([[[1.0], [2.0], [3.0]]])  # of windows {0, 1}, {1, 2, 3}, {3, 4}
    assert pool.upsample(y, layout).flatten().tolist() == [1, 1.5, 2, 2.5, 3]


@DIMS
def test_intermediates_are_the_tokens_of_their_layers(dims):
    model = small(dims=dims)
    x = hosts.images(2, 3, 24, 40)
    final, features = model.forward_intermediates(x, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(x))
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(model.norm(features[-1]), final[:, prefix:])
    pairs = model.forward_intermediates(
        x, [1, -1], return_prefix_tokens=True, norm=False, intermediates_only=True
    )
    if dims == 1:
        assert [p.shape for _, p in pairs] == [(2, 1, 16), (2, 1, 40)]
        assert [f.shape for f, _ in pairs] == [(2, 16, 6, 10), (2, 40, 6, 10)]
    else:
        assert [f.shape for f in pairs] == [(2, 16, 6, 10), (2, 40, 2, 3)]
    found = model.forward_intermediates(x, 1, norm=True, output_dict=True, expand=True)
    assert found["image_intermediates"][0].shape == (2, 40, 6, 10)
    torch.testing.assert_close(found["image_features"], final)
    early, [only] = model.forward_intermediates(x, [2], stop_early=True, output_fmt="NLC")
    torch.testing.assert_close(only, features[2])
    torch.testing.assert_close(early[:, prefix:], only)


@pytest.mark.parametrize("name", ["psvit_1d_tiny", "psvit_2d_tiny"])
def test_timm_makes_a_pyramid_of_features_of_it(name):
    with torch.device("meta"):
        pyramid = timm.create_model(name, features_only=True)
        features = pyramid(torch.empty(1, 3, 224, 224))
    info = pyramid.feature_info
    assert info.channels() == list(PRESETS[name].widths)
    sides = [-(-224 // reduction) for reduction in info.reduction()]
    assert [f.shape[2:] for f in features] == [(side, side) for side in sides]
    assert [f.shape[1] for f in features] == info.channels()
