"""Merging of tokens in a converted model: the paper's algorithm, every host, what survives."""

from __future__ import annotations

import copy
import pickle

import hosts
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import psvit
from psvit.merging import merge_counts, tokens_left
from psvit.stack import find_stack

pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

EXACT = dict(rtol=0, atol=2e-5)


def pairs(metric, r, penalty):
    """Of one image, the tokens that join another: (even positions, odd positions), class token 0.

    Written after the paper's appendix: the best partner of each even token, the r best of those.
    """
    unit = F.normalize(metric, dim=-1)
    scores = unit[::2] @ unit[1::2].T
    scores[0] = -torch.inf
    best, partner = scores.max(1)
    best = best - penalty[::2]
    joins = best.argsort(descending=True)[:r]
    return [(2 * int(i), 2 * int(partner[i]) + 1) for i in joins]


def merged_by_hand(x, sizes, joins):
    """Tokens and sizes of one image: what stays of the even ones, in order, then the odd ones."""
    totals, weights = x * sizes[:, None], sizes.clone()
    for i, j in joins:
        totals[j] += x[i] * sizes[i]
        weights[j] += sizes[i]
    gone = {i for i, _ in joins}
    left = [i for i in range(0, len(x), 2) if i not in gone] + list(range(1, len(x), 2))
    return (totals / weights[:, None])[left], weights[left]


def followed_by_hand(p, keys, sizes, joins):
    """The map `(H, N, N)` of one image and the keys, once tokens were merged."""
    every = torch.eye(len(sizes), dtype=p.dtype)
    means, _ = merged_by_hand(every, sizes, joins)  # (M, N)
    members = (means > 0).to(p.dtype)
    return means @ p @ members.T, means @ keys


def by_hand(model, image, counts, schedule="AAAA", protect=0.0):
    """A timm ViT on one image, its tokens merged after each attention; weights as in the model."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    sizes = torch.ones(len(x))
    p, keys = None, None
    for block, r, kind in zip(model.blocks, counts, schedule, strict=True):
        attn, h = block.attn, model.blocks[0].attn.num_heads
        qkv = attn.qkv(block.norm1(x)).unflatten(1, (3, h, -1)).permute(1, 2, 0, 3)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        if kind == "A":
            p = (attn.scale * q @ k.transpose(1, 2) + sizes.log()).softmax(-1)
            keys = k.mean(0)
        x = x + attn.proj((p @ v).transpose(0, 1).flatten(1))
        if r:
            paid = p[:, 0].mean(0)
            joins = pairs(keys, r, protect * paid / paid[1:].mean())
            p, keys = followed_by_hand(p, keys, sizes, joins)
            x, sizes = merged_by_hand(x, sizes, joins)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x)[None])[0]


@pytest.mark.parametrize("counts", [(6, 6, 6, 6), (0, 13, 0, 5), (32, 16, 8, 4)], ids=str)
@pytest.mark.parametrize("schedule", ["AAAA", "ASSS", "ASAS"])
@pytest.mark.parametrize("protect", [0.0, 0.3])
def test_outputs_are_those_of_the_paper(counts, schedule, protect):
    """Where layers share, with the map and the keys carried over to the tokens left."""
    model, x = hosts.timm_vit().double(), hosts.images().double()
    fast = psvit.accelerate(model, schedule, merge=counts, protect=protect)
    with torch.no_grad():
        want = torch.stack([by_hand(model, image, counts, schedule, protect) for image in x])
        torch.testing.assert_close(fast(x), want, rtol=1e-8, atol=1e-8)


def test_what_the_class_token_looks_at_is_protected():
    """So much that only what it looks at least is merged."""
    fast, x = (
        psvit.accelerate(hosts.timm_vit(), "AAAA", merge=(9, 0, 0, 0), protect=1e6),
        hosts.images(),
    )
    with psvit.record_maps(fast) as maps, psvit.record_merges(fast) as merges, torch.no_grad():
        fast(x)
    paid, into = maps[0][:, :, 0].mean(1)[:, 2::2], merges[0].into
    joined = torch.zeros_like(into, dtype=torch.bool)
    for image, row in enumerate(into.tolist()):
        for n in range(2, len(row), 2):
            joined[image, n] = row.count(row[n]) > 1
    joined = joined[:, 2::2]
    assert joined.sum(1).tolist() == [9, 9]
    assert (paid[joined].view(2, 9).amax(1) < paid[~joined].view(2, -1).amin(1)).all()


def test_without_pairs_it_is_the_host():
    model, x = hosts.timm_vit(), hosts.images()
    plain, merging = (psvit.accelerate(model, "AAAA", merge=r) for r in (0, [0, 0, 0, 0]))
    assert torch.equal(merging(x), plain(x))


@hosts.cases(hosts.TIMM + hosts.HUB + hosts.TORCHVISION)
def test_every_host_gets_as_many_tokens_as_are_left(make):
    model = make()
    fast = psvit.accelerate(model, "AAAA", merge=5)
    stack = find_stack(fast)
    seen = []
    for i in range(4):
        stack.block(i).register_forward_hook(lambda block, args, out: seen.append(out.shape[1]))
    embedding = getattr(model, "patch_embed", None)
    x = hosts.images() if embedding is None else hosts.images(2, 3, *embedding.img_size)
    out = hosts.answer(fast, x)
    first = stack.block(0)
    assert out.isfinite().all() and first is not None
    tokens = seen[0] + 5
    assert seen == tokens_left(tokens, stack.prefix, (5,) * 4)
    state = fast.state_dict()
    assert list(state) == list(model.state_dict())


def converted(schedule="AASA", **options):
    options = {"merge": (3, 0, 4, 5), "protect": 0.1, **options}
    return psvit.accelerate(hosts.timm_vit(), schedule, **options).eval()


def test_it_survives_copies_pickling_and_state_dicts():
    fast, x = converted(), hosts.images()
    want = fast(x)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(x), want)
    other = converted()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), want)


def test_it_is_restored_to_the_host():
    host, x = hosts.timm_vit(), hosts.images()
    want = host(x)
    fast = psvit.accelerate(host, "AAAA", merge=7)
    assert not torch.equal(fast(x), want)
    assert torch.equal(psvit.restore(fast)(x), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("schedule", ["AASA", "ASSS"])
def test_it_compiles_whole_and_exports(schedule):
    fast, x = converted(schedule), hosts.images()
    want = fast(x)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), want, **EXACT)
    y = hosts.images()
    torch.testing.assert_close(compiled(y), fast(y), **EXACT)
    assert counter.frame_count == 1
    with torch.no_grad():
        program = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(program(x), want, **EXACT)


@pytest.mark.parametrize("schedule", ["AASA", "ASSS"])
def test_it_trains_and_checkpointing_changes_nothing(schedule):
    plain, x = converted(schedule), hosts.images()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    for model in (plain, again):
        model.train()
    want, got = hosts.gradients(plain, x), hosts.gradients(again, x)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_a_sharing_layer_merges_by_the_keys_of_its_donor():
    """And the layer after it attends to what is left, larger tokens more."""
    fast, x = converted(), hosts.images()
    seen = {}
    stack = find_stack(fast)
    for i in range(4):
        stack.block(i).register_forward_hook(lambda b, a, out, i=i: seen.setdefault(i, out))
    fast(x)
    assert [seen[i].shape[1] for i in range(4)] == [62, 62, 58, 53]


def test_hooks_on_the_norm_after_merging_run():
    fast, x = converted(), hosts.images()
    want, seen = fast(x), []
    fast.blocks.block(0).norm2.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    torch.testing.assert_close(fast(x), want, **EXACT)
    assert seen == [(2, 62, 24)]


def test_pooled_tokens_are_merged_with_the_sizes_they_have():
    model, x = hosts.timm_vit(), hosts.images()
    weighted, plain = (
        psvit.accelerate(model, "AA|AA", pool="avg", size_bias=bias, merge=3)
        for bias in (True, False)
    )
    assert find_stack(plain).merge == (0, 0, 3, 3)
    assert not torch.allclose(weighted(x), plain(x))
    assert weighted(x).isfinite().all()


@pytest.mark.parametrize("schedule", ["AASA", "ASSS"])
def test_maps_that_are_recorded_are_of_the_tokens_left(schedule):
    fast, x = converted(schedule), hosts.images()
    with psvit.record_maps(fast) as maps:
        fast(x)
    assert [m.shape[-1] for m in maps] == [65, 62, 62, 58]
    for one in maps:
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))


def test_features_return_to_the_grid_of_the_patches():
    fast, x = psvit.accelerate(hosts.timm_vit(), "AAAA", merge=(9, 0, 9, 9)), hosts.images()
    with psvit.record_merges(fast) as merges:
        tokens = fast.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    _, features = fast.forward_intermediates(x)
    last = fast.forward_intermediates(x, indices=[1], intermediates_only=True, stop_early=True)
    torch.testing.assert_close(last[0], features[1])
    assert [m.sizes.shape[1] for m in merges] == [56, 56, 47, 38]
    for merged, feature, image in zip(merges, tokens, features, strict=True):
        assert image.shape == (2, 24, 8, 8)
        torch.testing.assert_close(merged.sizes.sum(1), torch.full((2,), 65.0))
        for b, patch in ((0, 5), (1, 63)):
            at = merged.into[b, 1 + patch] - 1  # without the class token
            assert torch.equal(image[b, :, patch // 8, patch % 8], feature[b, at])
            members = (merged.into[b] == at + 1).sum()
            assert members == merged.sizes[b, at + 1]


def test_half_of_the_tokens_go_at_most():
    assert tokens_left(17, 1, (100, 100, 2, 0)) == [9, 5, 3, 3]
    message = (
        r"^merge: 40 in layer 1 is more than half of the 64 patches left there; 32 are merged$"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        fast = psvit.accelerate(hosts.timm_vit(), "AAAA", merge=40)
    assert len(warned) == 1 and fast(hosts.images()).isfinite().all()


@pytest.mark.parametrize("schedule", ["AAAA", "AASA", "ASSS", "AA|AA"])
def test_flops_are_counted_of_the_tokens_that_are_left(schedule):
    model = hosts.timm_vit()
    parsed = psvit.Schedule(schedule)
    counts = merge_counts(6, parsed)
    fast = psvit.accelerate(model, parsed, merge=counts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(hosts.images(1, 3, 32, 32))
    assert parsed.flops(model, merge=counts) == counter.get_total_flops()
    assert parsed.flops(model, merge=counts) < parsed.flops(model)


def test_the_fewest_pairs_that_leave_a_part_of_the_flops_are_found():
    model, schedule = hosts.timm_vit(), psvit.Schedule("AAAA")
    (r, *others) = find_stack(psvit.accelerate(model, schedule, merge="0.7")).merge
    assert others == [r] * 3 and r > 0
    parts = [schedule.flops(model, merge=k) / schedule.flops(model) for k in (r, r - 1)]
    assert parts[0] <= 0.7 < parts[1]
    assert find_stack(psvit.accelerate(model, schedule, merge="1")).merge == (0,) * 4


BAD = [
    (dict(merge=-1), ValueError, "merge: got -1 in layer 1, expected 0 or more"),
    (dict(merge=[1, 2]), ValueError, "merge: got 2 numbers, expected 4 as layers"),
    (dict(merge=1.5), TypeError, "merge: got 1.5, expected an integer or one for each layer"),
    (dict(merge=[1, 1, 1, None]), TypeError,
     "merge: got [1, 1, 1, None], expected an integer or one for each layer"),
    (dict(merge=3, protect=-0.1), ValueError, "protect: got -0.1, expected a number from 0 up"),
    (dict(merge="half"), ValueError,
     'merge: got "half", expected a part of the FLOPs above 0, as "0.57"'),
    (dict(merge="0"), ValueError,
     'merge: got "0", expected a part of the FLOPs above 0, as "0.57"'),
    (dict(merge=[3, 0, 0, 0], schedule="AA|AA"), ValueError,
     "merge: got 3 in layer 1, expected 0 before the pool in front of layer 3: merged tokens have "
     "no grid"),
]  # fmt: skip


def test_only_a_class_token_can_protect():
    model = hosts.timm_vit(class_token=False, global_pool="avg")
    message = r"^protect: got 0.1, expected 0 in a model without a class token$"
    with pytest.raises(ValueError, match=message):
        psvit.accelerate(model, "AAAA", merge=3, protect=0.1)


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_changes_nothing(options, error, message):
    model = hosts.timm_vit()
    options = {"schedule": "AAAA", **options}
    with pytest.raises(error) as raised:
        psvit.accelerate(model, options.pop("schedule"), inplace=True, **options)
    assert str(raised.value) == message
    assert type(model.blocks) is torch.nn.Sequential


def test_one_number_goes_where_tokens_may_be_merged():
    assert merge_counts(3, psvit.Schedule("ASA|ASSA")) == (0, 0, 0, 3, 3, 3, 3)


def test_masks_and_merging_are_refused_together():
    fast = converted()
    mask = torch.zeros(1, 1, 65, 65)
    with pytest.raises(ValueError, match=r"^attn_mask: got a mask for a model that merges tokens"):
        find_stack(fast).steps()[0](torch.randn(2, 65, 24), mask)
