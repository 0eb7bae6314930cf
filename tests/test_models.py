"""PSViT models: what they compute, what they cost, and what timm expects of a model."""

from __future__ import annotations

import helpers
import hosts
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import psvit
import psvit_kernels
from psvit.cost import layer_costs
from psvit.models import PRESETS
from psvit.models.pool import StagePool

timm = pytest.importorskip("timm")

SCHEDULE = "AAS|ASA|AS"
WIDTHS = (16, 24, 40)
MATCHED = [name for name in PRESETS if not name.endswith("_deit")]
DIMS = pytest.mark.parametrize("dims", [1, 2])


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for more: threads would only wait for each other."""
    with helpers.threads(1):
        yield


def small(schedule: str = SCHEDULE, widths=WIDTHS, **options) -> psvit.PSViT:
    """On a grid of 8 x 8, every weight random."""
    sizes = dict(img_size=32, patch_size=4, head_dim=8, num_classes=5)
    return hosts.randomised(psvit.PSViT(schedule, widths, **(sizes | options)))


def preset(name: str, **options) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        return psvit.create_model(name, **options).eval()


# --- what they compute ----------------------------------------------------------------------


def plain(model: psvit.PSViT, x: Tensor) -> Tensor:
    """A PSViT with convolutional pools from its weights alone, in PyTorch's own functions."""
    one_d = model.has_class_token
    patch = model.patch_embed.proj
    image = F.conv2d(x, patch.weight, patch.bias, patch.stride)
    h, w = image.shape[-2:]
    x = image.flatten(2).transpose(1, 2)
    if one_d:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    x = x + model.pos_embed
    layer = pools = 0
    for character in str(model.schedule):
        if character == "|":
            pool = model.blocks.pools[pools]
            x, (h, w) = _plain_pool(pool, x, (h, w))
            pools += 1
            continue
        block = model.blocks[layer]
        layer += 1
        y = block.norm1(x)
        fused = block.attn.qkv(y)
        heads = block.attn.num_heads
        parts = [p.unflatten(2, (heads, -1)).transpose(1, 2) for p in fused.split(x.shape[2], 2)]
        if character == "A":
            probabilities = (parts[0] @ parts[1].mT * parts[0].shape[-1] ** -0.5).softmax(-1)
        x = x + block.attn.proj((probabilities @ parts[-1]).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    if one_d:
        return model.head(model.norm(x)[:, 0])
    return model.head(model.fc_norm(x.mean(1)))


def _plain_pool(pool: StagePool, x: Tensor, grid: tuple[int, int]):
    x = x.transpose(1, 2)
    conv = pool.conv
    if pool.dims == 1:
        x = F.max_pool1d(F.conv1d(x, conv.weight, conv.bias, 1, 1), 3, 2, 1)
    else:
        x = F.conv2d(x.unflatten(2, grid), conv.weight, conv.bias, 2, 1)
        grid = tuple(x.shape[-2:])
        x = x.flatten(2)
    return pool.norm(x.transpose(1, 2)), grid


@DIMS
def test_computes_what_a_plain_implementation_computes(dims):
    model = small(dims=dims).train()
    x = hosts.images()
    want = plain(model, x)
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5 * scale)
    with psvit_kernels.use("reference"):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5 * scale)
    got = hosts.gradients(model, x)
    model.zero_grad()
    weights = torch.linspace(-1, 1, want.numel()).view(want.shape)
    (plain(model, x) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(dims=1),
        dict(dims=2),
        dict(dims=2, class_token=True),
        dict(dims=2, qkv_bias=False, qk_norm=True, init_values=0.1, mlp_ratio=2.0),
    ],
)
def test_with_all_layers_attending_it_is_timms_vision_transformer(options):
    model = small("AAA", 24, **options)
    options = {k: v for k, v in options.items() if k != "dims"}
    host = hosts.timm_vit(
        depth=3,
        class_token=model.has_class_token,
        global_pool="token" if model.has_class_token else "avg",
        **{k: v for k, v in options.items() if k != "class_token"},
    )
    host.load_state_dict(model.state_dict())
    x = hosts.images()
    torch.testing.assert_close(model(x), host(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.forward_intermediates(x), host.forward_intermediates(x), rtol=1e-5, atol=1e-5
    )


def test_the_defaults_are_those_that_the_readme_promises():
    one, two = preset("psvit_1d_tiny"), preset("psvit_2d_tiny")
    assert [layout.tokens for layout in one.layouts()] == [197, 99, 50]
    assert [layout.grid for layout in two.layouts()] == [(14, 14), (7, 7), (4, 4)]
    assert one.has_class_token and one.global_pool == "token"
    assert not two.has_class_token and two.global_pool == "avg"
    for model, dims in ((one, 1), (two, 2)):
        for pool in model.blocks.pools:
            assert isinstance(pool.norm, nn.LayerNorm) and pool.conv.groups == 1
            assert pool.conv.kernel_size == (3,) * dims and pool.conv.stride == (dims,) * dims
        for i in range(len(model.blocks)):
            attention = model.blocks[i].attn
            assert attention.num_heads * 64 == attention.proj.in_features
            assert attention.scale == 64**-0.5


@pytest.mark.parametrize("name", PRESETS)
def test_stages_have_the_tokens_that_their_layouts_say(name):
    model = preset(name)
    seen = [tuple(f.shape) for f in model.forward_intermediates(
        torch.empty(1, 3, 224, 224, device="meta"), output_fmt="NLC", intermediates_only=True
    )]  # fmt: skip
    layouts, widths = model.layouts(), PRESETS[name].widths
    assert seen == [(1, layouts[stage].cells, widths[stage]) for stage in model.blocks.stages]


def test_sharing_layers_have_no_q_and_k():
    model = small(qk_norm=True)
    for i, kind in enumerate(model.schedule.kinds):
        attention = model.blocks[i].attn
        width = attention.proj.in_features
        assert attention.qkv.weight.shape == (width * (3 if kind == "A" else 1), width)
        assert hasattr(attention, "q_norm") == (kind == "A")


def test_kept_q_and_k_fit_a_model_in_which_all_layers_attend():
    kept, attending = small(keep_unused=True), small("AAA|AAA|AA")
    kept.load_state_dict(attending.state_dict())
    stripped = small()
    state = kept.state_dict()
    for name, value in stripped.state_dict().items():
        if ".qkv." in name and len(value) < len(state[name]):
            state[name] = state[name][-len(value) :]
    stripped.load_state_dict(state)
    x = hosts.images()
    torch.testing.assert_close(kept(x), stripped(x))


POOLS = [("conv", WIDTHS), ("depthwise", (8, 16, 32)), ("max", 16), ("avg", 16), ("stride", 16)]


@DIMS
@pytest.mark.parametrize(("pool", "widths"), POOLS)
@pytest.mark.parametrize("options", [{}, dict(class_token=True, prefix="beside")])
def test_gradients_reach_every_parameter(dims, pool, widths, options):
    model = small(widths=widths, dims=dims, pool=pool, **options).train()
    gradients = hosts.gradients(model, hosts.images())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.any() for gradient in gradients.values())


def test_drop_path_grows_with_depth():
    model = small(drop_path_rate=0.7)
    rates = [getattr(model.blocks[i].drop_path1, "drop_prob", 0.0) for i in range(8)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_a_class_token_beside_the_pool_is_projected_and_seen_by_no_window():
    pool = StagePool("conv", 8, 16, dims=2, prefix=1, norm=False)
    layout = psvit.Layout(1, (4, 4))
    x = torch.randn(2, 17, 8)
    y, after = pool.reduce(x, layout)
    assert after == psvit.Layout(1, (2, 2)) and y.shape == (2, 5, 16)
    torch.testing.assert_close(y[:, :1], pool.beside(x[:, :1]))
    z, _ = pool.reduce(torch.cat([x[:, :1] + 1, x[:, 1:]], 1), layout)
    assert torch.equal(y[:, 1:], z[:, 1:])


# --- what they cost -------------------------------------------------------------------------


def counted(function, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_flops_are_those_that_pytorch_counts_in_the_plain_implementation(name):
    model = preset(name)
    image = torch.empty(1, 3, 224, 224, device="meta")
    rows = layer_costs(model, model.schedule)
    assert sum(row.flops for row in rows) == counted(lambda x: plain(model, x), image)
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MATCHED)
def test_a_matched_preset_costs_what_deit_costs(name):
    model, image = preset(name), torch.empty(1, 3, 224, 224, device="meta")
    ours = counted(lambda x: plain(model, x), image)
    assert ours == pytest.approx(counted(_deit(PRESETS[name].peer), image), rel=0.02)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_deit")])
def test_a_deit_preset_has_its_depth_and_width(name):
    ours, deit = PRESETS[name], _deit(PRESETS[name].peer)
    assert psvit.Schedule(ours.schedule).depth == len(deit.blocks)
    assert set(ours.widths) == {deit.embed_dim}


def _deit(name: str) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    for block in model.blocks:
        block.attn.fused_attn = False  # so that its products are seen one by one
    return model
