"""The parts of EViT, Evo-ViT and SiT: what SEEDS asks of them, in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import psvit_kernels as pk
from psvit import Layout
from psvit.slimming import (
    QueryPool,
    class_attention,
    select_patches,
    slow_and_fast,
    updated_scores,
)
from psvit.slimming.scores import check_scores

#: Widths of one head, of several, and beyond what the kernels take as one head's channels.
WIDTHS = (2, 24, 192, 384)
GRID = (5, 6)


def slimming(width, tokens=7, **options):
    """A pool with weights that make it choose."""
    pool = QueryPool(width, tokens, **options).double()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)  # none is a scalar, as FSDP asks
        pool.scale.fill_(3.0)
    return pool


def tokens_of(width, prefix, batch=2):
    layout = Layout(prefix, GRID)
    return torch.randn(batch, layout.tokens, width, dtype=torch.float64), layout


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("prefix", [0, 2])
def test_slimming_is_cross_attention_with_learned_queries(width, prefix):
    pool, (x, layout) = slimming(width), tokens_of(width, prefix)
    got, after = pool.reduce(x, layout)
    patches = x[:, prefix:]
    keys = F.gelu(pool.keys(pool.norm(patches)))
    queries = pool.queries.expand(2, -1, -1)
    want = F.scaled_dot_product_attention(queries, keys, patches, scale=pool.scale.item())
    torch.testing.assert_close(got[:, prefix:], want)
    assert torch.equal(got[:, :prefix], x[:, :prefix])
    assert after == Layout(prefix, (7,)) and got.shape[1] == after.tokens


@pytest.mark.parametrize("width", [24, 192, 320, 384])
def test_slimming_runs_on_the_kernels_with_all_gradients(width, provider):
    pool, (x, layout) = slimming(width).float(), tokens_of(width, 1)
    oracle = copy.deepcopy(pool).double()
    seed = torch.randn(2, 8, width, dtype=torch.float64)
    found = {}
    for name, each in (("kernel", pool), ("reference", oracle)):
        like = next(each.parameters())
        inputs = x.to(like).requires_grad_()
        forced = name == "reference"
        with pk.use("reference") if forced else pk.use(provider):
            out, _ = each.reduce(inputs, layout)
            (out * seed.to(like)).sum().backward()
        grads = {n: p.grad for n, p in each.named_parameters()}
        found[name] = {"out": out, "x": inputs.grad, **grads}
    for name, want in found["reference"].items():
        scale = want.abs().max().item()
        got = found["kernel"][name].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_slimming_does_not_ask_for_the_order_of_the_patches():
    pool, (x, layout) = slimming(24), tokens_of(24, 1)
    order = torch.randperm(layout.cells) + 1
    shuffled = torch.cat([x[:, :1], x[:, order]], dim=1)
    torch.testing.assert_close(pool.reduce(shuffled, layout)[0], pool.reduce(x, layout)[0])


def test_constant_tokens_are_a_fixed_point_of_slimming():
    pool, layout = slimming(24), Layout(0, GRID)
    token = torch.randn(1, 1, 24, dtype=torch.float64)
    got, _ = pool.reduce(token.expand(3, 30, 24), layout)
    torch.testing.assert_close(got, token.expand(3, 7, 24))


def test_queries_of_zero_give_the_mean():
    pool, (x, layout) = slimming(24), tokens_of(24, 0)
    torch.nn.init.zeros_(pool.queries)
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(pool.reduce(x, layout)[0], mean.expand(-1, 7, -1))


def test_slimmed_tokens_lie_within_the_hull_of_each_channel():
    pool, (x, layout) = slimming(24), tokens_of(24, 0)
    got, _ = pool.reduce(x, layout)
    assert (got <= x.amax(1, keepdim=True)).all() and (got >= x.amin(1, keepdim=True)).all()
    assert got.std(dim=1).min() > 1e-3  # they differ: it isn't the mean


def test_recovery_gives_patches_again():
    pool, (x, layout) = slimming(24, cells=30), tokens_of(24, 1)
    slim, _ = pool.reduce(x, layout)
    got = pool.expand(slim, layout)
    assert torch.equal(got[:, :1], x[:, :1]) and got.shape == x.shape
    parts = pool.recovery
    mixed = parts.over_tokens(parts.norm1(slim[:, 1:]).mT).mT
    torch.testing.assert_close(got[:, 1:], mixed + parts.over_channels(parts.norm2(mixed)))


def test_pools_by_queries_survive_copies():
    pool, (x, layout) = slimming(24, cells=30), tokens_of(24, 1)
    want = pool.reduce(x, layout)[0]
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(twin.reduce(x, layout)[0], want)
    other = QueryPool(24, 7, cells=30).double()
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.reduce(x, layout)[0], want)
    assert repr(pool).startswith("QueryPool(\n  tokens=7")


def matrices(selection, prefix):
    """R and E of a selection of one image, dense."""
    m, n = selection.match.tokens, selection.match.into.shape[1]
    into = selection.match.into[0]
    e = torch.zeros(n, m, dtype=torch.float64)
    e[torch.arange(n), into] = 1
    r = e.T * selection.weights[0]
    return r / r.sum(1, keepdim=True), e


@pytest.mark.parametrize("keep", [1, 11, 29, 30])
def test_slow_and_fast_is_the_formula(keep):
    prefix, f = 2, torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()).double()
    x = torch.randn(1, prefix + 30, 6, dtype=torch.float64)
    scores = torch.rand(1, 30, dtype=torch.float64)
    selection = select_patches(scores, keep, prefix)
    r, e = matrices(selection, prefix)
    for rows in (r, e):
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows), dtype=torch.float64))
    kept = [prefix + int(i) for i in scores[0].topk(keep).indices.sort().values]
    assert r[: prefix + keep].argmax(1).tolist() == [*range(prefix), *kept]
    torch.testing.assert_close(r @ e, torch.eye(len(r), dtype=torch.float64))
    want = x[0] + e @ (f(r @ x[0]) - r @ x[0])
    torch.testing.assert_close(slow_and_fast(f, x, selection)[0], want)


def test_all_patches_kept_is_the_layer_itself():
    f = torch.nn.Linear(6, 6).double()
    x = torch.randn(3, 31, 6, dtype=torch.float64)
    selection = select_patches(torch.rand(3, 30, dtype=torch.float64), 30, 1)
    torch.testing.assert_close(slow_and_fast(f, x, selection), f(x))


def test_layers_with_one_selection_may_be_taken_together():
    layers = [torch.nn.Linear(6, 6).double() for _ in range(3)]
    x = torch.randn(2, 31, 6, dtype=torch.float64)
    selection = select_patches(torch.rand(2, 30, dtype=torch.float64), 9, 1)
    want = slow_and_fast(torch.nn.Sequential(*layers), x, selection)
    for layer in layers:
        x = slow_and_fast(layer, x, selection)
    torch.testing.assert_close(x, want)


def test_gradients_reach_tokens_and_scores():
    x = torch.randn(1, 11, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(1, 10, dtype=torch.float64, requires_grad=True)

    def run(x, scores):
        return slow_and_fast(torch.tanh, x, select_patches(scores, 6, 1))

    assert torch.autograd.gradcheck(run, (x, scores))


def test_scores_of_dropped_patches_stay():
    scores = torch.rand(2, 10, dtype=torch.float64)
    for keep in (1, 4, 9):
        selection = select_patches(scores, keep, 3)
        row = torch.rand(2, keep + 1, dtype=torch.float64)
        got = updated_scores(scores, row, selection, 0.25)
        for image in range(2):
            kept = scores[image].topk(keep).indices.sort().values
            want = scores[image].clone()
            want[kept] = 0.75 * want[kept] + 0.25 * row[image, :keep]
            torch.testing.assert_close(got[image], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_class_attention_is_a_row_of_the_map(dtype):
    q, k, v = torch.randn(3, 2, 4, 20, 8, dtype=torch.float64)
    _, attn_map = pk.attention(q, k, v, scale=0.3, return_map="dense")
    got = class_attention(q.to(dtype), k.to(dtype), 0.3, prefix=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == wide and got.shape == (2, 4, 18)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    want = attn_map.dense()[:, :, 0, 2:].to(wide)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_scores_that_are_no_numbers_name_the_layer():
    check_scores(torch.rand(2, 5), 3)
    scores = torch.rand(2, 5)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^layer 4: the attention of the class token to the"):
        check_scores(scores, 3)


BAD = [
    (lambda: QueryPool(1, 3), "width: got 1, expected a whole number from 2 up"),
    (lambda: QueryPool(8, 0), "tokens: got 0, expected a whole number from 1 up"),
    (
        lambda: QueryPool(8, 3).expand(torch.zeros(1, 3, 8), Layout(0, GRID)),
        "cells: got None, expected 30 to recover those",
    ),
    (
        lambda: QueryPool(8, 3, cells=9).expand(torch.zeros(1, 3, 8), Layout(0, GRID)),
        "cells: got 9, expected 30 to recover those",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[row[1] for row in BAD])
def test_refuses_bad_input(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message
