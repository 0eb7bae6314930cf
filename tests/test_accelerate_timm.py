"""``accelerate`` on timm: the host's outputs, an oracle for sharing and pooling, its API."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import hosts
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import psvit
from psvit import Layout
from psvit.pooling import GridPool

timm = pytest.importorskip("timm")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

EXACT = dict(rtol=0, atol=1e-5)


def images_for(host):
    return hosts.images(2, 3, *host.patch_embed.img_size)


@hosts.cases(hosts.TIMM)
def test_attending_everywhere_gives_the_hosts_outputs(make):
    host = make()
    model = psvit.accelerate(host, "AAAA")
    x = images_for(host)
    torch.testing.assert_close(model(x), host(x), **EXACT)
    assert list(model.state_dict()) == list(host.state_dict())
    hosts.assert_same_gradients(
        hosts.gradients(model.double(), x.double()),
        hosts.gradients(host.double(), x.double()),
    )


def test_attending_everywhere_gives_the_outputs_of_a_trained_model_on_photographs():
    data = Path(__file__).parents[2] / "shared" / "data"
    weights = data / "vit_tiny_patch16_224" / "model.safetensors"
    if not weights.is_file():
        pytest.skip("shared/data, with trained weights and photographs, is not here")
    host = timm.create_model("vit_tiny_patch16_224").eval()
    state = pytest.importorskip("safetensors.torch").load_file(weights)
    host.load_state_dict({name: p.float() for name, p in state.items()})
    image = pytest.importorskip("PIL.Image")
    photographs = [image.open(data / "imagenet_val" / f"{i:04}.jpg").convert("RGB") for i in (0, 1)]
    x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in photographs])
    x = x[:, :, :224, :224] / 127.5 - 1
    model = psvit.accelerate(host, "A" * 12)
    with torch.no_grad():
        outputs = (model(x), host(x))
        features = (model.forward_features(x), host.forward_features(x))
    for got, want in (outputs, features):
        # Outputs of up to 27, of which float32 keeps about 1e-5.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


# --- an independent implementation of sharing and pooling ---------------------------------------


def naive(host, x, schedule, kind="max", size_bias=False):
    """The same model written out again with plain PyTorch on the host's own modules."""
    p, (h, w) = host.num_prefix_tokens, host.patch_embed.dynamic_feat_size(x.shape[-2:])
    x = host.norm_pre(host._pos_embed(host.patch_embed(x)))
    sizes = torch.ones(h, w, dtype=x.dtype)
    layer, shared = 0, None
    for character in schedule:
        if character == "|":
            image = x[:, p:].transpose(1, 2).unflatten(2, (h, w))
            if kind == "max":
                image = F.max_pool2d(image, 3, 2, 1)
            elif kind == "avg":
                image = F.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
            else:
                image = image[:, :, ::2, ::2]
            sizes = pooled_sizes(sizes, kind)
            h, w = image.shape[2:]
            x = torch.cat([x[:, :p], image.flatten(2).transpose(1, 2)], 1)
            continue
        block = host.blocks[layer]
        layer += 1
        attn, y = block.attn, block.norm1(x)
        b, n, _ = y.shape
        qkv = attn.qkv(y).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        if character == "A":
            q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
            scores = q @ k.transpose(-1, -2) * attn.scale
            if size_bias:
                scores = scores + torch.cat([sizes.new_ones(p), sizes.flatten()]).log()
            shared = scores.softmax(-1)
        y = (shared @ qkv[2]).transpose(1, 2).reshape(b, n, -1)
        y = attn.proj(attn.norm(y))
        x = x + block.ls1(y)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return host.forward_head(host.norm(x))


def pooled_sizes(sizes, kind):
    """Sums over windows, each token split equally among the windows that hold it."""
    sizes = sizes[None, None]
    if kind == "stride":
        return F.avg_pool2d(sizes, 2, ceil_mode=True, divisor_override=1)[0, 0]
    box = torch.ones(1, 1, 3, 3, dtype=sizes.dtype)
    one_a_window = torch.ones_like(F.conv2d(sizes, box, stride=2, padding=1))
    odd = [1 - n % 2 for n in sizes.shape[2:]]
    windows = F.conv_transpose2d(one_a_window, box, stride=2, padding=1, output_padding=odd)
    return F.conv2d(sizes / windows, box, stride=2, padding=1)[0, 0]


@pytest.mark.parametrize(
    ("schedule", "kind", "size_bias"),
    [
        ("ASSA", "max", False),
        ("AS|AS", "max", False),
        ("A|AS|A", "avg", True),
        ("A|A|AS", "stride", True),
        ("A|A|A|A", "max", True),
    ],
)
@hosts.cases([case for case in hosts.TIMM if case[0] in ("dinov2", "siglip", "qk-norm", "oblong")])
def test_sharing_and_pooling_are_what_a_naive_implementation_gives(make, schedule, kind, size_bias):
    host = make().double()
    x = images_for(host).double()
    model = psvit.accelerate(host, schedule, pool=kind, size_bias=size_bias)
    torch.testing.assert_close(model(x), naive(host, x, schedule, kind, size_bias))


@hosts.cases(hosts.TIMM)
@pytest.mark.parametrize(("training", "pool"), [(False, "max"), (True, "conv")])
def test_the_compiled_kernels_give_what_the_reference_gives(make, training, pool):
    host = make()
    model = psvit.accelerate(host, "AS|AS", pool=pool, size_bias=True).train(training)
    hosts.assert_compiled_is_reference(model, images_for(host))


# --- state dicts and restoring ------------------------------------------------------------------


@hosts.cases(hosts.TIMM)
def test_checkpoints_fit_both_ways_and_restore_undoes(make):
    host, other = make(), make()
    model = psvit.accelerate(host, "AS|AS", size_bias=True)
    x = images_for(host)
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(other.state_dict())
    back = psvit.restore(model)
    assert back is model and type(back.blocks) is type(host.blocks)
    assert not back.patch_embed._forward_hooks and "forward_intermediates" not in vars(back)
    assert all(p.requires_grad for p in back.parameters())
    torch.testing.assert_close(back(x), other(x), rtol=0, atol=0)
    host.load_state_dict(psvit.accelerate(other, "ASSS").state_dict())
    torch.testing.assert_close(host(x), other(x), rtol=0, atol=0)


def test_the_original_is_left_alone_unless_asked():
    host = hosts.timm_vit()
    before = repr(host)
    model = psvit.accelerate(host, "AS|AS")
    assert model is not host and repr(host) == before and not host.patch_embed._forward_hooks
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, host))
    assert not ours & theirs
    weights = list(host.parameters())
    assert psvit.accelerate(host, "ASAS", inplace=True) is host
    assert all(a is b for a, b in zip(weights, host.parameters(), strict=True))


def test_training_a_converted_model_and_restoring_keeps_what_was_learned():
    host = hosts.timm_vit()
    model = psvit.accelerate(host, "ASAS").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hosts.gradients(model, hosts.images())
    optimizer.step()
    learned = {name: p.clone() for name, p in model.named_parameters()}
    back = psvit.restore(model)
    assert back.blocks[0].training and back.blocks[1].attn.training
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, learned[name]), name


def test_stripping_drops_q_and_k_of_sharing_layers_alone():
    host = hosts.timm_vit(qk_norm=True)
    model, whole = (psvit.accelerate(host, "AS|AS", strip=strip) for strip in (True, False))
    x = hosts.images()
    torch.testing.assert_close(model(x), whole(x))
    state = model.state_dict()
    assert state["blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert state["blocks.1.attn.qkv.weight"].shape == (24, 24)
    assert state["blocks.1.attn.qkv.bias"].shape == (24,)
    assert "blocks.1.attn.q_norm.weight" not in state and "blocks.0.attn.q_norm.weight" in state
    assert all(p.requires_grad for p in model.parameters())
    dropped = sum(p.numel() for p in whole.parameters())
    dropped -= sum(p.numel() for p in model.parameters())
    assert len(pickle.dumps(whole)) - len(pickle.dumps(model)) > 4 * dropped
    with pytest.raises(ValueError, match="strip=True, which dropped Q and K of layers 2, 4; load"):
        psvit.restore(model)
    assert copy.deepcopy(model)(x).equal(model(x))


def test_a_learned_pool_has_keys_of_its_own():
    host = hosts.timm_vit()
    model = psvit.accelerate(host, "AS|A|A", pool="conv")
    new = set(model.state_dict()) - set(host.state_dict())
    assert new == {f"blocks.pools.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert hosts.gradients(model, hosts.images())["blocks.pools.0.weight"].abs().sum() > 0
    assert list(psvit.restore(model).state_dict()) == list(host.state_dict())


# --- the host's own API ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["AAAA", "ASAS", "AS|AS"])
def test_forward_intermediates_gives_each_feature_its_grid(schedule):
    host = hosts.timm_vit(reg_tokens=1)
    model = psvit.accelerate(host, schedule)
    x = hosts.images()
    sides = [8, 8, 4, 4] if "|" in schedule else [8] * 4
    final, features = model.forward_intermediates(x)
    assert [tuple(f.shape) for f in features] == [(2, 24, s, s) for s in sides]
    torch.testing.assert_close(final, model.forward_features(x))
    with psvit.record_maps(model) as maps:
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert [t.shape[1] for t in tokens] == [s * s for s in sides] and len(maps) == 4
    for feature, token in zip(features, tokens, strict=True):
        torch.testing.assert_close(feature.flatten(2).transpose(1, 2), token)
    last = model.forward_intermediates(
        x, indices=[1], stop_early=True, norm=True, return_prefix_tokens=True, intermediates_only=1
    )
    assert [(f.shape, p.shape) for f, p in last] == [((2, 24, 8, 8), (2, 2, 24))]
    named = model.forward_intermediates(x, indices=2, output_dict=True)["image_intermediates"]
    assert named[-1].equal(features[-1])
    assert model.get_intermediate_layers(x, n=1, reshape=True)[0].shape[-1] == sides[-1]
    if schedule == "AAAA":
        torch.testing.assert_close(features, host.forward_intermediates(x)[1], **EXACT)


def test_images_of_any_size_are_pooled_on_their_own_grid():
    host = hosts.timm_vit(dynamic_img_size=True).double()
    model = psvit.accelerate(host, "AS|AS")
    for height, width in [(32, 32), (16, 64), (64, 16), (24, 40)]:
        x = hosts.images(1, 3, height, width).double()
        _, features = model.forward_intermediates(x)
        assert features[0].shape[-2:] == (height // 4, width // 4)
        pooled = GridPool().reduced(Layout(1, (height // 4, width // 4))).grid
        assert features[-1].shape[-2:] == pooled
        torch.testing.assert_close(model(x), naive(host, x, "AS|AS"))


def test_masks_and_causality():
    host = hosts.timm_vit()
    model = psvit.accelerate(host, "AAAA")
    x = hosts.images()
    mask = torch.rand(2, 1, 65, 65) > 0.3
    mask |= torch.eye(65, dtype=torch.bool)
    torch.testing.assert_close(model(x, attn_mask=mask), host(x, attn_mask=mask), **EXACT)
    added = torch.randn(65, 65)
    torch.testing.assert_close(model(x, attn_mask=added), host(x, attn_mask=added), **EXACT)
    with pytest.raises(ValueError, match="is_causal: got True, expected False"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: got a mask for a model whose schedule pools"):
        psvit.accelerate(host, "AS|AS")(x, attn_mask=mask)


def test_attention_dropout_drops_from_the_map_where_it_is_applied():
    host = hosts.timm_vit(attn_drop_rate=0.5)
    model = psvit.accelerate(host, "ASSA")
    x = hosts.images()
    quiet = model(x)
    model.train()
    assert not torch.allclose(model(x), quiet, atol=1e-3)
    with psvit.record_maps(model) as maps:
        model(x)
    for attention_map in maps:
        sums = attention_map.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert all(g.isfinite().all() for g in hosts.gradients(model, x).values())
    # Averaged over many draws, one layer gives what it gives without dropout.
    block = model.blocks[0].attn.double()
    tokens = torch.randn(1, 9, 24, dtype=torch.float64)
    draws = block(tokens.expand(2000, -1, -1))
    expected, spread = block.eval()(tokens)[0], draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - expected).abs() < 6 * spread + 1e-9).all()


def test_hooks_on_layers_and_inside_them_see_tokens():
    host = hosts.timm_vit()
    seen = []
    host.blocks[1].register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    host.blocks[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.0,))
    model = psvit.accelerate(host, "AS|AS", inplace=True)
    handle = model.blocks[3].register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model.blocks[0].mlp.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(hosts.images())
    assert len(seen) == 3 and all(isinstance(out, torch.Tensor) for _, out in seen)
    assert seen[1][1].shape == (2, 65, 24) and seen[2][0][0].shape == (2, 17, 24)
    handle.remove()
    seen.clear()
    psvit.restore(model)(hosts.images())
    assert len(seen) == 2


def test_loops_over_blocks_can_freeze_and_inspect_them():
    model = psvit.accelerate(hosts.timm_vit(), "ASAS")
    for block in model.blocks:
        block.norm1.requires_grad_(False)
        assert len(list(block.parameters())) == 12
    assert len(model.blocks) == 4 and not model.blocks[2].norm1.weight.requires_grad
    assert model.prune_intermediate_layers([2]) == [2]
    assert str(model.blocks.schedule) == "ASA" and len(model.blocks) == 3
    model(hosts.images())
    assert len(psvit.restore(model).blocks) == 3


def test_a_part_of_a_stack_starts_at_its_first_block():
    stack = psvit.accelerate(hosts.timm_vit(), "AS|AS").blocks
    assert str(stack[:2].schedule) == "AS" and str(stack[:3].schedule) == "AS|A"
    assert not list(stack[:2].named_children())[2:]
    with pytest.raises(ValueError, match=r"expected \[:n\] with n from 1 to 4"):
        stack[1:]
    with pytest.raises(RuntimeError, match="layer 2 shares the map of an earlier layer, which is"):
        stack[1](torch.randn(1, 5, 24))


def test_recorded_maps_are_those_that_were_applied():
    host = hosts.timm_vit(reg_tokens=1)
    model = psvit.accelerate(host, "AS|AS")
    x = hosts.images()
    with psvit.record_maps(model) as maps:
        recorded = model(x)
        assert [tuple(m.shape) for m in maps] == [(2, 3, 66, 66)] * 2 + [(2, 3, 18, 18)] * 2
        assert maps[0].equal(maps[1]) and maps[2].equal(maps[3])
    torch.testing.assert_close(recorded, model(x))
    assert len(maps) == 4
    unconverted = pytest.raises(ValueError, match="got VisionTransformer that isn't converted")
    with unconverted, psvit.record_maps(host):
        pass


def test_says_its_schedule_wherever_it_is_printed():
    text = repr(psvit.accelerate(hosts.timm_vit(), "AS|AS", pool="avg"))
    assert 'schedule="AS|AS"' in text and "layer 4: S, the map of layer 3" in text
    assert "shares a map, heads=3" in text and "GridPool(avg" in text


@pytest.mark.parametrize("schedule", ["AAAA", "AS|AS"])
def test_survives_deepcopy_and_pickle(schedule):
    # 4 x 16 patches, which the twins must know not to be 8 x 8.
    model = psvit.accelerate(hosts.timm_vit(img_size=(16, 64)), schedule, size_bias=True)
    x = hosts.images(2, 3, 16, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(model(x))
        assert twin.patch_embed is not model.patch_embed
        if "|" in schedule:
            assert twin.forward_intermediates.model is twin
        psvit.restore(twin)
        assert twin(x).shape == (2, 5)


def test_warns_once_that_sharing_changes_the_function():
    with pytest.warns(UserWarning, match=r'schedule "ASAA" changes what the model computes') as w:
        psvit.accelerate(hosts.timm_vit(), "ASAA")
    assert len(w) == 1 and w[0].filename == __file__


def test_plain_schedules_warn_of_nothing(recwarn):
    psvit.accelerate(hosts.timm_vit(), "AAAA")
    assert not [w for w in recwarn if "schedule" in str(w.message)]
