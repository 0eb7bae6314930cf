"""``AttentionMap.reduce``: a map that follows tokens which become fewer."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_all_accurate
from inputs import F32, F64, guarded, leaf, normal
from merge_cases import random_match
from torch._dynamo.testing import CompileCounter

import psvit_kernels as pk
from psvit_kernels import DenseMap, TokenGroups, registry

SIZES = [(1, 1), (5, 3), (16, 9), (49, 25), (65, 64), (197, 184)]


def groups_of(b, n, m, dropped=0, dtype=F32):
    match = random_match(b, n, m, dropped)
    weights = 0.5 + 3 * torch.rand(b, n, dtype=dtype)
    return TokenGroups.of(match, weights, pk.merge_tokens(weights[..., None], match, weights).sizes)


def windows(n, kernel=3, stride=2):
    """Overlapping windows of a row of n tokens, as an average over them takes them."""
    m = (n + 2 - kernel) // stride + 1
    members = [
        [i for i in range(w * stride - 1, w * stride - 1 + kernel) if 0 <= i < n] for w in range(m)
    ]
    order = [i for each in members for i in each]
    starts = [sum(map(len, members[:w])) for w in range(m + 1)]
    means = [1 / len(each) for each in members for _ in each]
    shares = [1 / order.count(i) for i in order]
    tables = (torch.tensor([t]) for t in (order, starts))
    return TokenGroups(*tables, torch.tensor([means]), torch.tensor([shares]))


def matrices(groups, n):
    """Means and shares of groups, `(B, M, N)`, written out."""
    b, m = groups.order.shape[0], groups.tokens
    shares = torch.ones_like(groups.means) if groups.shares is None else groups.shares
    rows, columns = (groups.means.new_zeros(b, m, n) for _ in range(2))
    for image in range(b):
        for group in range(m):
            for e in range(int(groups.starts[image, group]), int(groups.starts[image, group + 1])):
                token = groups.order[image, e]
                rows[image, group, token] += groups.means[image, e]
                columns[image, group, token] += shares[image, e]
    return rows, columns


def random_map(b, h, n, dtype=F32):
    return DenseMap.from_dense(normal(b, h, n, n, dtype=dtype).softmax(-1))


def results(storage, n, groups, grad, reduce):
    storage = leaf(storage)
    reduced = reduce(storage, n, groups)
    (dstorage,) = torch.autograd.grad(reduced, storage, grad.to(reduced.dtype))
    return {"map": reduced.detach(), "dmap": dstorage}


def fused(storage, n, groups):
    return DenseMap(storage, n).reduce(groups).dense()


def eager(storage, n, groups):
    rows, columns = (t.unsqueeze(1).to(storage.dtype) for t in matrices(groups, n))
    return rows @ storage[..., :n] @ columns.transpose(-1, -2)


def check(one, groups):
    __tracebackhide__ = True
    n, m = one.n, groups.tokens
    b = max(one.shape[0], groups.order.shape[0])
    grad = normal(b, one.shape[1], m, m)
    got = results(one.storage, n, groups, grad, fused)
    wide = groups._replace(
        means=groups.means.double(),
        shares=None if groups.shares is None else groups.shares.double(),
    )
    exact = results(one.storage.double(), n, wide, grad.double(), eager)
    plain = results(one.storage, n, groups, grad, eager)
    magnitudes = results(one.storage.double().abs(), n, wide, grad.double().abs(), eager)
    assert_all_accurate(got, exact, plain, magnitudes, 1.0)
    assert one.storage[..., n:].eq(0).all()


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_rows_are_averaged_and_columns_summed(backend, n, m):
    check(random_map(2, 3, n, backend.dtype), groups_of(2, n, m))


@pytest.mark.parametrize("n", [5, 14, 49])
def test_windows_that_overlap_share_their_tokens(backend, n):
    check(random_map(2, 2, n, backend.dtype), windows(n))


def test_groups_of_each_image_go_with_one_map_for_all(provider):
    check(random_map(1, 2, 21), groups_of(3, 21, 10))


def test_a_map_in_any_memory_is_reduced(provider):
    one, groups = random_map(2, 2, 21), groups_of(2, 21, 10)
    strided = DenseMap(guarded(one.storage, offset=3, gaps=(5, 7, 9, 0)), 21)
    assert torch.equal(strided.reduce(groups).storage, one.reduce(groups).storage)


@pytest.mark.parametrize("make", [lambda: groups_of(2, 30, 13), lambda: windows(30)])
def test_rows_sum_to_one_and_padding_is_zero(provider, make):
    reduced = random_map(2, 2, 30).reduce(make())
    torch.testing.assert_close(reduced.dense().sum(-1), torch.ones(reduced.shape[:3]))
    assert reduced.storage.data_ptr() % 16 == 0 and reduced.storage.stride(2) % 4 == 0
    assert reduced.storage[..., reduced.n :].eq(0).all()


def test_applied_to_values_equal_within_groups_it_is_merging_after_applying():
    """And dropped tokens have no part in it."""
    match = random_match(2, 40, 17)
    weights = 1 + torch.rand(2, 40, dtype=F64)
    v = normal(2, 17, 8, dtype=F64)
    values = v.gather(1, match.into.unsqueeze(2).expand(-1, -1, 8))  # (B, N, C)
    one = random_map(2, 1, 40, F64)
    after = pk.merge_tokens((one.dense()[:, 0] @ values), match, weights)
    reduced = one.reduce(TokenGroups.of(match, weights, after.sizes))
    torch.testing.assert_close(reduced.dense()[:, 0] @ v, after.tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["uint8", "factored"])
def test_other_forms_are_reduced_as_what_they_stand_for(form):
    q, k, v = (normal(2, 2, 21, 16) for _ in range(3))
    _, one = pk.attention(q, k, v, return_map=form)
    groups = groups_of(2, 21, 10)
    want = DenseMap.from_dense(one.dense()).reduce(groups)
    torch.testing.assert_close(one.reduce(groups).dense(), want.dense())


def test_gradients_are_those_of_the_formula():
    groups = groups_of(2, 12, 5, dtype=F64)
    storage = normal(2, 2, 12, 12, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: DenseMap(t, 12).reduce(groups).dense(), storage)


def test_the_operation_passes_opcheck_and_compiles_without_recompilation():
    one, groups = random_map(2, 2, 21), groups_of(2, 21, 10)
    op = torch.ops.psvit_kernels.reduce_map.default
    torch.library.opcheck(op, (leaf(one.storage), 21, *groups))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda storage, groups: DenseMap(storage, 21).reduce(groups).dense(),
        fullgraph=True, backend=counter,
    )  # fmt: skip
    for _ in range(2):
        one, groups = random_map(2, 2, 21), groups_of(2, 21, 10)
        torch.testing.assert_close(compiled(one.storage, groups), one.reduce(groups).dense())
    assert counter.frame_count == 1


GROUPS = groups_of(2, 8, 4)
BAD = [
    (lambda: random_map(2, 1, 8).reduce(GROUPS[0]), TypeError,
     "groups: got Tensor, expected TokenGroups"),
    (lambda: random_map(3, 1, 8).reduce(GROUPS), ValueError,
     "groups: got order of shape (2, 8), expected (3 or 1, members)"),
    (lambda: random_map(2, 1, 8).reduce(GROUPS._replace(starts=GROUPS.starts.int())), ValueError,
     "groups: got starts of shape (2, 5), torch.int32, expected (2, ...), torch.int64"),
    (lambda: random_map(2, 1, 8).reduce(GROUPS._replace(means=GROUPS.means[:, :5])), ValueError,
     "groups: got means of shape (2, 5), expected (2, 8) as order"),
    (lambda: DenseMap(torch.rand(2, 1, 5, 8), 8).reduce(GROUPS), ValueError,
     "map: got 5 rows of 8 columns, expected as many"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_is_named(call, error, message):
    with registry.use("reference"), pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
