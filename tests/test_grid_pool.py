"""``GridPool``: what it pools to, what the pooled tokens stand for, and its adjoint."""

from __future__ import annotations

import copy
import math
import pickle
import re
import threading

import pytest
import torch
import torch.nn.functional as F

from psvit import GridPool, Layout
from psvit.layout import GridSource, size_bias

KINDS = ["max", "avg", "stride", "conv"]
GRIDS = [(1, 1), (2, 3), (5, 5), (14, 14), (7, 4), (8, 16)]


def pool_of(kind, **options):
    pool = GridPool(kind, width=6, **options)
    if kind == "conv":
        torch.nn.init.normal_(pool.weight)
    return pool.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pools_the_grid_and_lets_prefix_tokens_pass(kind, dims, prefix):
    pool = pool_of(kind, dims=dims)
    layout = Layout(prefix, (14, 14))
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    y, after = pool.reduce(x, layout)
    assert after == Layout(prefix, (7, 7) if dims == 2 else (98,))
    assert y.shape == (2, after.tokens, 6)
    torch.testing.assert_close(y[:, :prefix], x[:, :prefix])
    image = x[:, prefix:].transpose(1, 2)
    image = image.unflatten(2, (14, 14)) if dims == 2 else image.unsqueeze(2)
    window = (3, 2, 1) if dims == 2 else ((1, 3), (1, 2), (0, 1))
    if kind == "max":
        want = F.max_pool2d(image, *window)
    elif kind == "avg":
        want = F.avg_pool2d(image, *window, count_include_pad=False)
    elif kind == "stride":
        want = image[:, :, :: 2 if dims == 2 else 1, ::2]
    else:
        weight = pool.weight if dims == 2 else pool.weight.unsqueeze(2)
        want = F.conv2d(image, weight, pool.bias, *window[1:], groups=6)
    torch.testing.assert_close(y[:, prefix:], want.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", ["avg", "stride", "conv"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_expand_is_the_adjoint_of_reduce(kind, dims, grid):
    pool = pool_of(kind, dims=dims)
    layout = Layout(1, grid)
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    reduced, after = pool.reduce(x, layout)
    y = torch.randn_like(reduced)
    assert reduced.shape[1] == after.tokens
    expanded = pool.expand(y, layout)
    assert expanded.shape == x.shape
    torch.testing.assert_close((reduced * y).sum(), (x * expanded).sum())


def test_the_adjoint_of_a_maximum_is_that_of_the_average():
    layout = Layout(2, (5, 7))
    y = torch.randn(1, 2 + 12, 3)
    torch.testing.assert_close(GridPool("max").expand(y, layout), GridPool("avg").expand(y, layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dims", [1, 2])
def test_sizes_add_up_to_the_tokens_there_were(kind, grid, dims):
    layout = Layout(3, grid).with_sizes()
    for _ in range(3):
        if len(layout.grid) == 1 and dims == 2:
            break
        layout = pool_of(kind, dims=dims).reduced(layout)
        assert len(layout.sizes) == layout.tokens
        assert layout.sizes[:3] == (1.0, 1.0, 1.0)
        assert sum(layout.sizes) == pytest.approx(3 + math.prod(grid))
        assert min(layout.sizes) > 0


def test_sizes_spread_each_token_over_the_windows_that_hold_it():
    layout = Layout(0, (1, 4)).with_sizes()
    after = GridPool("max", dims=1).reduced(layout)
    # windows {pad, 0, 1} and {1, 2, 3}: token 1 is in both.
    assert after.sizes == (1.5, 2.5)
    assert GridPool("stride", dims=1).reduced(Layout(0, (5,)).with_sizes()).sizes == (2, 2, 1)


def test_a_place_that_no_window_reaches_is_not_lost():
    pool = GridPool("avg", dims=1, kernel=2, stride=2, padding=0)
    assert pool.reduced(Layout(0, (7,)).with_sizes()).sizes == (2, 2, 3)


def test_sizes_are_tracked_only_if_somebody_asked():
    assert GridPool("max").reduced(Layout(1, (4, 4))).sizes is None
    assert size_bias(Layout(1, (4, 4)), torch.zeros(1)) is None
    assert size_bias(Layout(1, (4, 4)).with_sizes(), torch.zeros(1)) is None


def test_size_bias_makes_a_token_count_as_often_as_it_stands_for():
    layout = Layout(1, (2, 1), (1.0, 2.0, 3.0))
    scores = torch.randn(4, 3, dtype=torch.float64)
    biased = (scores + size_bias(layout, scores)).softmax(-1)
    repeated = scores[:, [0, 1, 1, 2, 2, 2]].softmax(-1)
    want = torch.stack([repeated[:, :1].sum(1), repeated[:, 1:3].sum(1), repeated[:, 3:].sum(1)], 1)
    torch.testing.assert_close(biased, want)


def test_size_bias_is_made_once_and_serves_training_after_inference():
    layout = Layout(0, (2, 1), (1.0, 2.0))
    like = torch.zeros(1)
    with torch.inference_mode():
        first = size_bias(layout, like)
    assert size_bias(layout, like) is first and not first.is_inference()


def test_a_learned_pool_starts_as_an_average():
    pool, layout = GridPool("conv", width=5), Layout(1, (5, 5))
    x = torch.randn(2, 26, 5)
    inner = [1 + 4]  # the window in the middle touches no border
    torch.testing.assert_close(
        pool.reduce(x, layout)[0][:, inner], GridPool("avg").reduce(x, layout)[0][:, inner]
    )


def test_says_what_it_is_and_survives_copies():
    pool = GridPool("conv", width=4, dims=1)
    assert repr(pool) == "GridPool(conv, dims=1, kernel=3, padding=1, stride=2)"
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert repr(twin) == repr(pool)
        assert list(twin.state_dict()) == ["weight", "bias"]
    assert repr(GridPool("stride")) == "GridPool(stride, dims=2, stride=2)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridPool("mean"), "pool: got 'mean', expected one of max, avg, stride, conv"),
        (lambda: GridPool(dims=3), "dims: got 3, expected 1 or 2"),
        (lambda: GridPool("conv"), 'width: got None, expected the number of channels for "conv"'),
        (
            lambda: GridPool().reduced(Layout(0, (9,))),
            "layout: got grid (9,), expected (h, w) for a pool of dims=2",
        ),
        (
            lambda: GridSource().of(8),
            "grid: got 8 patch tokens, which is no square, and no patch embedding ran that could "
            "tell their grid; call the whole model",
        ),
    ],
)
def test_refuses_bad_input(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_the_grid_is_told_thread_by_thread():
    source = GridSource()
    source.now = (2, 8)
    assert source.of(16) == (2, 8)
    with pytest.raises(ValueError, match=r"got 15 patch tokens where the .* made 2 x 8"):
        source.of(15)
    seen = []
    other = threading.Thread(target=lambda: seen.append(source.of(16)))
    other.start()
    other.join()
    assert seen == [(4, 4)]
    assert copy.deepcopy(source).now is None
