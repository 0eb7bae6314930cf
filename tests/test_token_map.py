"""``IndexMap`` and what a ``Layout`` knows of tokens that became part of others."""

from __future__ import annotations

import pytest
import torch
from inputs import F32, F64, normal
from merge_cases import random_match

import psvit_kernels as pk
from psvit.layout import Layout, size_bias
from psvit.token_map import IndexMap

LAYOUT = Layout(1, (3, 4))


def index_map(weights=True):
    b, n, m = 2, LAYOUT.tokens, 6
    return IndexMap(random_match(b, n, m), 0.5 + torch.rand(b, n, dtype=F64) * weights)


@pytest.mark.parametrize("weights", [True, False])
def test_expand_is_the_adjoint_of_reduce(weights):
    tokens = index_map(weights)
    x, y = normal(2, 13, 5, dtype=F64), normal(2, 6, 5, dtype=F64)
    reduced, _ = tokens.reduce(x, LAYOUT)
    left, right = (reduced * y).sum(), (x * tokens.expand(y, LAYOUT)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_without_weights_all_are_one():
    match = random_match(2, 13, 6)
    x, y = normal(2, 13, 5, dtype=F64), normal(2, 6, 5, dtype=F64)
    none, ones = IndexMap(match), IndexMap(match, torch.ones(2, 13, dtype=F64))
    assert torch.equal(none.reduce(x, LAYOUT)[0], ones.reduce(x, LAYOUT)[0])
    torch.testing.assert_close(none.expand(y, LAYOUT), ones.expand(y, LAYOUT))


def test_the_groups_are_the_map_itself():
    """A map whose rows are all one vector: reduced, its rows are that vector's sums."""
    tokens = index_map()
    row = torch.rand(13, dtype=F64)
    one = pk.DenseMap.from_dense(row.expand(2, 1, 13, 13).contiguous())
    want = torch.zeros(2, 6, dtype=F64).scatter_add(1, tokens.match.into, row.expand(2, 13))
    _, after = tokens.reduce(normal(2, 13, 5, dtype=F64), LAYOUT)
    reduced = one.reduce(tokens.groups(after.sizes)).dense()
    torch.testing.assert_close(reduced, want[:, None, None].expand(2, 1, 6, 6))


def test_a_layout_follows_tokens_that_are_merged_again():
    first, x = index_map(), normal(2, 13, 5, dtype=F64)
    y, once = first.reduce(x, LAYOUT)
    second = IndexMap(random_match(2, 6, 3), once.sizes)
    _, twice = second.reduce(y, once)
    assert (once.tokens, twice.tokens, twice.grid) == (6, 3, (3, 4))
    for image in range(2):
        for token in range(13):
            middle = first.match.into[image, token]
            assert twice.into[image, token] == second.match.into[image, middle]
    torch.testing.assert_close(twice.sizes.sum(1), once.sizes.sum(1))


def test_features_return_to_the_cells():
    into = torch.tensor([[0, 1, 2, 2, 2, 1]])
    layout = Layout(1, (1, 5)).merged(into, torch.ones(1, 3))
    y = torch.tensor([[[1.0], [2.0]]])  # of patch tokens 1 and 2
    assert layout.on_grid(y).flatten().tolist() == [1.0, 2.0, 2.0, 2.0, 1.0]
    assert Layout(1, (1, 2)).on_grid(y) is y


def test_sizes_of_one_layout_or_of_each_image_give_a_bias():
    x = torch.randn(2, 4, 8)
    regular = Layout(1, (1, 3), (1.0, 2.0, 4.0, 1.0))
    own = regular.merged(torch.arange(4).repeat(2, 1), regular.counted(x))
    torch.testing.assert_close(size_bias(own, x)[1, 0, 0], size_bias(regular, x))
    assert own.counted(x) is own.sizes
    assert LAYOUT.counted(x).tolist() == [[1.0] * 4] * 2
    assert LAYOUT.counted(x.double()).dtype == F64 and LAYOUT.counted(x.half()).dtype == F32
