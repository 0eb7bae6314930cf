"""EViT, Evo-ViT and SiT put on hosts: what they compute, on which hosts, and what survives."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import hosts
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import psvit
from psvit.slimming import evit, evo_vit, sit
from psvit.stack import find_stack

pytest.importorskip("timm")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:sit. .* pools with random weights"),
]

EXACT = dict(rtol=1e-8, atol=1e-8)
METHODS = {
    "evit": partial(evit, keep=0.6, layers=(1, 3)),
    "evo-vit-stages": partial(evo_vit, layers=(2, 4)),
    "evo-vit-layers": partial(evo_vit, layers=(2, 3, 4)),
    "sit": partial(sit, tokens=(20, 7), layers=(2, 4)),
}
every_method = pytest.mark.parametrize("slim", METHODS.values(), ids=METHODS)


def mean_pooled():
    """A ViT with a class token whose head takes the mean of the patches, as Evo-ViT's does."""
    return hosts.timm_vit(global_pool="avg", class_token=True)


def attended(block, x):
    """What a timm block's attention adds to `(N, C)`, and the row of the class token, `(H, N)`."""
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    probabilities = (attn.scale * q @ k.transpose(1, 2)).softmax(-1)
    return attn.proj((probabilities @ v).transpose(0, 1).flatten(1)), probabilities[:, 0]


def split(scores, keep):
    """Places of the patches that are kept, in order, and of the others; the class token is 0."""
    kept = sorted(1 + int(i) for i in scores.topk(keep).indices)
    return kept, [i for i in range(1, 1 + len(scores)) if i not in kept]


def mean(x, weights):
    return (weights[:, None] * x).sum(0, keepdim=True) / weights.sum()


def evit_by_hand(model, image, keep, layers):
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    for i, block in enumerate(model.blocks):
        branch, rows = attended(block, x)
        x = x + branch
        if i + 1 in layers:
            scores = rows.mean(0)[1:]
            kept, rest = split(scores, math.ceil(keep * len(scores)))
            fused = mean(x[rest], scores[[j - 1 for j in rest]])
            x = torch.cat([x[:1], x[kept], fused])
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x)[None])[0]


def evo_vit_by_hand(model, image, keep, layers):
    """The fast path written out: each patch left out gets what the one token for them gained."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    kept, rest = list(range(1, len(x))), []
    for i, block in enumerate(model.blocks):
        if i + 1 in layers:
            kept, rest = split(scores, int(keep * len(scores)))  # noqa: F821
            weights = scores[[j - 1 for j in rest]]  # noqa: F821
        slow = torch.cat([x[:1], x[kept]] + ([mean(x[rest], weights)] if rest else []))
        branch, rows = attended(block, slow)
        out = slow + branch
        out = out + block.mlp(block.norm2(out))
        x = x.clone()
        x[[0, *kept]] = out[: 1 + len(kept)]
        if rest:
            x[rest] = x[rest] + (out - slow)[-1]
        row = rows.sum(0)[1 : 1 + len(kept)]
        if not rest:
            scores = row
        else:
            at = [j - 1 for j in kept]
            scores[at] = 0.5 * scores[at] + 0.5 * row
    return model.forward_head(model.norm(x)[None])[0]


@pytest.mark.parametrize(("keep", "layers"), [(0.7, (2, 3, 4)), (0.3, (1,)), (0.5, (1, 4))])
def test_evit_is_its_algorithm(keep, layers):
    model, x = hosts.timm_vit().double(), hosts.images().double()
    with torch.no_grad():
        want = torch.stack([evit_by_hand(model, image, keep, layers) for image in x])
        torch.testing.assert_close(evit(model, keep, layers)(x), want, **EXACT)


@pytest.mark.parametrize(("keep", "layers"), [(0.5, (2, 4)), (0.5, (2, 3, 4)), (0.2, (3,))])
def test_evo_vit_is_its_algorithm(keep, layers):
    model, x = mean_pooled().double(), hosts.images().double()
    with torch.no_grad():
        for block in model.blocks[1:]:  # sharper attention: patches that were kept are dropped
            block.attn.qkv.weight *= 3
        want = torch.stack([evo_vit_by_hand(model, image, keep, layers) for image in x])
        torch.testing.assert_close(evo_vit(model, keep, layers)(x), want, **EXACT)


def test_sit_slims_between_layers():
    model, x = hosts.timm_vit().double(), hosts.images().double()
    fast = METHODS["sit"](model)
    stack = find_stack(fast)
    assert stack.schedule == psvit.Schedule("A|AA|A")
    with torch.no_grad():
        y = model._pos_embed(model.patch_embed(x))
        layout = psvit.Layout(1, (8, 8))
        for i, block in enumerate(model.blocks):
            if i in (1, 3):
                y, layout = stack.pool(i // 2).reduce(y, layout)
            y = block(y)
        torch.testing.assert_close(fast(x), model.forward_head(model.norm(y)), **EXACT)


@pytest.mark.parametrize("slim", [evit, evo_vit])
@pytest.mark.parametrize("make", [hosts.timm_vit, mean_pooled])
def test_all_patches_kept_is_the_plain_model(slim, make):
    model, x = make(), hosts.images()
    plain = psvit.accelerate(model, "AAAA")
    assert torch.equal(slim(model, keep=1)(x), plain(x))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=2e-5)


@every_method
def test_training_computes_what_inference_does(slim):
    fast, x = slim(hosts.timm_vit()), hosts.images()
    assert torch.equal(fast.train()(x), fast.eval()(x))


def with_class_token(cases):
    return [case for case in cases if case[0] not in ("siglip", "siglip-classifier", "average")]


@hosts.cases(with_class_token(hosts.TIMM + hosts.HUB + hosts.TORCHVISION))
@pytest.mark.parametrize("name", METHODS)
def test_every_host_gets_the_tokens_that_are_counted(make, name):
    model = make()
    fast = METHODS[name](model)
    stack = find_stack(fast)
    seen = []
    for i in range(4):
        stack.block(i).register_forward_hook(lambda block, args, out: seen.append(out.shape[1]))
    embedding = getattr(model, "patch_embed", None)
    size = (32, 32) if embedding is None else embedding.img_size
    x = hosts.images(2, 3, *size)
    out = hosts.answer(fast, x)
    assert out.isfinite().all() and not torch.equal(out, hosts.answer(model, x))
    rows = stack.schedule.rows(fast)[1:-1]
    patches = rows[0].tokens - stack.prefix
    left = {"evit": [40, 40, 25, 25], "sit": [patches, 20, 20, 7]}.get(name, [patches] + [33] * 3)
    assert seen == [stack.prefix + count for count in left]
    if name != "sit":
        assert list(fast.state_dict()) == list(model.state_dict())


@every_method
def test_it_survives_copies_pickling_and_state_dicts(slim):
    fast, x = slim(hosts.timm_vit()), hosts.images()
    want = fast(x)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(x), want)
    other = slim(hosts.timm_vit())
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), want)


@every_method
def test_it_is_restored_to_the_host(slim):
    host, x = hosts.timm_vit(), hosts.images()
    want = host(x)
    fast = slim(host)
    assert not torch.equal(fast(x), want) and torch.equal(host(x), want)
    assert torch.equal(psvit.restore(fast)(x), want)
    assert slim(host, inplace=True) is host


@every_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_whole_and_exports(slim):
    fast, x = slim(hosts.timm_vit()), hosts.images()
    want = fast(x)
    torch._dynamo.reset()
    counter, y = CompileCounter(), hosts.images()
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(compiled(y), fast(y), rtol=0, atol=2e-5)
    assert counter.frame_count == 1
    with torch.no_grad():
        program = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(program(x), want, rtol=0, atol=2e-5)


@every_method
def test_it_trains_and_checkpointing_changes_nothing(slim):
    plain, x = slim(hosts.timm_vit()).train(), hosts.images()
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    want, got = hosts.gradients(plain, x), hosts.gradients(again, x)
    assert want.keys() == dict(plain.named_parameters()).keys()
    hosts.assert_same_gradients(got, want, rtol=1e-4, atol=1e-5)


@every_method
def test_lower_precision_gives_nearly_the_same(slim):
    fast, x = slim(hosts.timm_vit()), hosts.images()
    want = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = fast(x)
    for found in (automatic, fast.bfloat16()(x.bfloat16())):
        assert found.dtype == torch.bfloat16
        assert (found - want).abs().max() < 0.1 * want.abs().max()


@every_method
def test_an_image_alone_gets_what_it_gets_in_a_batch(slim):
    fast, x = slim(hosts.timm_vit()).double(), hosts.images().double()
    torch.testing.assert_close(fast(x[1:]), fast(x)[1:], **EXACT)


@every_method
def test_flops_are_counted_of_the_tokens_there_are(slim):
    model = hosts.timm_vit()
    fast = slim(model)
    stack = find_stack(fast)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(hosts.images(1, 3, 32, 32))
    found = stack.schedule.flops(fast)
    assert found < psvit.Schedule("AAAA").flops(model)
    assert found == counter.get_total_flops() - scoring(stack)


def scoring(stack):
    """FLOPs of the rows of the class token, which nobody counts: q_0 K^T, where it is looked at."""
    method, seen = stack.slimming, 0
    for i, (tokens, *_) in enumerate(method.counts(64, 4) if method else ()):
        seen += 2 * (1 + tokens) * 24 if method.looks(i) else 0
    return seen


def test_fused_patches_return_to_their_places():
    fast, x = evit(hosts.timm_vit(), 0.6, (1, 3)), hosts.images()
    with psvit.record_merges(fast) as merges:
        tokens = fast.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    features = fast.forward_intermediates(x, intermediates_only=True)
    assert [m.tokens for m in merges] == [41, 41, 26, 26]
    for layout, feature, image in zip(merges, tokens, features, strict=True):
        assert image.shape == (2, 24, 8, 8)
        torch.testing.assert_close(layout.sizes.sum(1), torch.full((2,), 65.0))
        for b, patch in ((0, 5), (1, 63)):
            at = layout.into[b, 1 + patch]
            assert torch.equal(image[b, :, patch // 8, patch % 8], feature[b, at - 1])
            assert (layout.into[b] == at).sum() == layout.sizes[b, at]


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("evo")])
def test_every_patch_keeps_a_feature(name):
    fast, x = METHODS[name](hosts.timm_vit()), hosts.images()
    assert "forward_intermediates" not in vars(fast)
    _, features = fast.forward_intermediates(x)
    assert [image.shape for image in features] == [(2, 24, 8, 8)] * 4


def test_transformers_checkpointing_and_hidden_states():
    make = dict(hosts.HUB)["vit-classifier"]
    for slim in METHODS.values():
        plain, x = slim(make()).train(), hosts.images()
        again = copy.deepcopy(plain)
        again.gradient_checkpointing_enable({"use_reentrant": False})
        want, got = hosts.gradients(plain, x), hosts.gradients(again, x)
        hosts.assert_same_gradients(got, want, rtol=1e-4, atol=1e-5)
        states = plain.eval()(x, output_hidden_states=True).hidden_states
        assert len(states) == 5


def test_maps_can_be_recorded():
    fast, x = evit(hosts.timm_vit(), 0.6, (1, 3)), hosts.images()
    with psvit.record_maps(fast) as maps:
        fast(x)
    assert [m.shape[-1] for m in maps] == [65, 41, 41, 26]


@pytest.mark.parametrize("slim", [METHODS["evit"], METHODS["evo-vit-stages"]])
def test_attention_that_is_no_number_names_the_layer(slim):
    fast, x = slim(hosts.timm_vit()), hosts.images()
    x[1, 0, 3, 3] = torch.nan
    layer = 1 if find_stack(fast).slimming.drops else 2
    with pytest.raises(ValueError, match=rf"^layer {layer}: the attention of the class token"):
        fast(x)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert compiled(x)[1].isnan().all()


def without_class_token():
    return hosts.timm_vit(class_token=False, global_pool="avg", reg_tokens=2)


BAD = [
    (lambda: evit(hosts.timm_vit(), 0), "keep: got 0, expected a part of the patches above 0, up"),
    (lambda: evo_vit(hosts.timm_vit(), 1.1), "keep: got 1.1, expected a part of the patches"),
    (lambda: evit(hosts.timm_vit(), math.nan), "keep: got nan, expected a part of the patches"),
    (lambda: evit(hosts.timm_vit(), "half"), "keep: got 'half', expected a part of the patches"),
    (lambda: evit(hosts.timm_vit(), layers=(3, 5)),
     r"layers: got \(3, 5\), expected at least one from 1 to 4, rising"),
    (lambda: evit(hosts.timm_vit(), layers=()), r"layers: got \(\), expected at least one from 1"),
    (lambda: evo_vit(hosts.timm_vit(), layers=(1,)), r"layers: got \(1,\), .* from 2 to 4, rising"),
    (lambda: evo_vit(hosts.timm_vit(), layers=(3, 2)), r"layers: got \(3, 2\), expected"),
    (lambda: sit(hosts.timm_vit(), (9,), (2, 3)),
     r"tokens: got \(9,\), expected 2, one for each of the layers, falling from below the 64 pat"),
    (lambda: sit(hosts.timm_vit(), (64,), (2,)), r"tokens: got \(64,\), expected 1, one for each"),
    (lambda: sit(hosts.timm_vit(), (8, 8), (2, 3)), r"tokens: got \(8, 8\), expected 2, one for"),
    (lambda: evit(without_class_token()), "model: got VisionTransformer without a class token, ex"),
    (lambda: evo_vit(without_class_token()), "model: got VisionTransformer without a class token"),
    (lambda: evit(hosts.timm_vit(patch_drop_rate=0.5)), "model: patches would lose their tokens, "),
    (lambda: sit(hosts.timm_vit(patch_drop_rate=0.5)), "model: patches would lose their tokens, "),
    (lambda: evit(evit(hosts.timm_vit())), "model: is converted already, to schedule"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sit"])
def test_masks_are_refused(name):
    step = find_stack(METHODS[name](hosts.timm_vit())).steps()[0]
    with pytest.raises(ValueError, match=r"^attn_mask: got a mask for a model that merges tokens"):
        step(torch.randn(2, 65, 24), torch.zeros(1, 1, 65, 65))


def test_nothing_is_said_of_positions_after_slimming():
    model = sit(hosts.timm_vit(), (9,), (3,))
    with pytest.warns(UserWarning, match=r"."):  # of heads too few for the filter
        report = psvit.init.impulse_init_(model)
    assert str(report).count("after a pool by content") >= 1


def test_sit_says_that_it_must_be_trained():
    with pytest.warns(UserWarning, match="^sit: 1 pools with random weights were put into"):
        sit(hosts.timm_vit(), (9,), (3,))
