"""A layer that shares a map of before a pool: the map follows the tokens."""

from __future__ import annotations

import copy

import hosts
import pytest
import torch
from inputs import F64, normal

import psvit
import psvit_kernels as pk
from psvit.layout import Layout
from psvit.pooling import GridPool
from psvit.stack import find_stack

pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

SCHEDULES = ["AA|SA", "AS|SS", "A|S|SS"]


def pools(kind, dims):
    return GridPool(kind, dims=dims)


@pytest.mark.parametrize("kind", ["avg", "stride"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_groups_are_the_pool_and_its_upsampling(kind, dims, grid):
    """P' = R P U, with R what the pool does to tokens, U what upsampling does."""
    pool, layout = pools(kind, dims), Layout(2, grid)
    n, m = layout.tokens, pool.reduced(layout).tokens
    p = normal(1, 1, n, n, dtype=F64).softmax(-1)
    v = normal(1, m, 3, dtype=F64)
    want, _ = pool.reduce(p[0] @ pool.upsample(v, layout), layout)
    groups = pool.groups(layout, p.device)
    groups = groups._replace(means=groups.means.double(), shares=groups.shares.double())
    found = pk.DenseMap.from_dense(p).reduce(groups).dense()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 1, m, dtype=F64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0] @ v, want, rtol=0, atol=1e-6)


def by_hand(model, x, schedule, pool):
    """A timm ViT under a schedule, its map averaged and summed with whole matrices."""
    x = model._pos_embed(model.patch_embed(x))
    layout, p, layer = Layout(1, (8, 8)), None, 0
    for character in schedule:
        if character == "|":
            n = layout.tokens
            rows, _ = pool.reduce(torch.eye(n, dtype=x.dtype)[None], layout)
            m = pool.reduced(layout).tokens
            columns = pool.upsample(torch.eye(m, dtype=x.dtype)[None], layout)
            p, (x, layout) = rows @ p @ columns, pool.reduce(x, layout)
            continue
        block = model.blocks[layer]
        attn, layer = block.attn, layer + 1
        q, k, v = (
            attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        if character == "A":
            p = (attn.scale * q @ k.transpose(-1, -2)).softmax(-1)
        x = x + attn.proj((p @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["avg", "stride"])
def test_outputs_are_those_of_the_algebra(schedule, kind):
    model, x = hosts.timm_vit().double(), hosts.images().double()
    fast = psvit.accelerate(model, schedule, pool=kind)
    with torch.no_grad():
        want = by_hand(model, x, schedule, GridPool(kind))
        torch.testing.assert_close(fast(x), want, rtol=0, atol=1e-6)


def test_tokens_may_be_merged_after_it_by_the_keys_carried_over():
    model, x = hosts.timm_vit(), hosts.images()
    fast = psvit.accelerate(model, "AA|SS", pool="avg", merge=2, size_bias=True)
    with psvit.record_merges(fast) as merges, torch.no_grad():
        assert fast(x).isfinite().all()
    assert [m.tokens for m in merges] == [65, 65, 15, 13]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_trains_compiles_and_survives(schedule):
    plain, x = psvit.accelerate(hosts.timm_vit(), schedule, pool="avg"), hosts.images()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    want, got = hosts.gradients(plain.train(), x), hosts.gradients(again.train(), x)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    torch._dynamo.reset()
    plain.eval()
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=2e-5)
    first = find_stack(plain)[: len(schedule.replace("|", "")) - 1]
    assert str(first.schedule) == schedule[:-1]


@pytest.mark.parametrize("pool", ["max", "conv"])
def test_other_pools_have_nothing_a_map_could_follow(pool):
    message = r'^schedule "AA\|SA": layer 3 shares across a pool; start each stage with A$'
    for schedule in ("AA|SA", psvit.Schedule("AA|SA", carried=True)):
        with pytest.raises(ValueError, match=message):
            psvit.accelerate(hosts.timm_vit(), schedule, pool=pool)
    with pytest.raises(ValueError, match=r"^pool: got 'max', expected one of avg, stride$"):
        GridPool("max").groups(Layout(1, (4, 4)), torch.device("cpu"))
