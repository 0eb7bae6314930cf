"""PSViT models: what they compute, what they cost and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path

import hosts
import pytest
import torch
from psvits import DIMS, SCHEDULE, WIDTHS, plain, preset, small
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import psvit
import psvit_kernels
from psvit.cost import layer_costs
from psvit.models import PRESETS
from psvit.models.pool import StagePool

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")

README = Path(__file__).parents[1] / "README.md"
MATCHED = [name for name in PRESETS if not name.endswith("_deit")]


# --- what they compute ----------------------------------------------------------------------


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


def test_the_readme_has_every_preset_with_what_it_costs():
    text = README.read_text(encoding="utf-8")
    for row in table().values():
        assert row in text, f"README.md lacks or contradicts: {row}"


def table() -> dict[str, str]:
    """A row for each preset and for each DeiT, as the README has them."""
    rows, costs = {}, {}
    for size in ("tiny", "small", "base"):
        name = f"deit_{size}_patch16_224"
        deit = _deit(name)
        costs[name] = layer_costs(deit, "A" * len(deit.blocks))
        cost = _cost(costs[name], costs[name])
        rows[name] = f"| `{name}` | `{'A' * 12}` | {deit.embed_dim} | 197 | {cost} |"
    for name, ours in PRESETS.items():
        model = preset(name)
        cost = _cost(layer_costs(model, model.schedule), costs[ours.peer])
        schedule = ours.schedule.replace("|", r"\|")
        widths = ", ".join(map(str, ours.widths if len(set(ours.widths)) > 1 else ours.widths[:1]))
        tokens = ", ".join(str(layout.tokens) for layout in model.layouts())
        rows[name] = f"| `{name}` | `{schedule}` | {widths} | {tokens} | {cost} |"
    return rows


def _cost(rows, deit) -> str:
    flops, params = sum(row.flops for row in rows), sum(row.params for row in rows)
    part = flops / sum(row.flops for row in deit)
    return f"{params / 1e6:.1f} M | {flops / 1e9:.2f} G | {part:.0%}"


# --- bad input ------------------------------------------------------------------------------

IMAGE = torch.zeros(1, 3, 32, 32)
BAD = [
    (
        lambda: psvit.create_model("psvit_2d_tny"),
        f'name: got "psvit_2d_tny", expected one of {", ".join(PRESETS)}; '
        f"did you mean psvit_2d_tiny?",
    ),
    (
        lambda: small("AS|SA", 16),
        'schedule "AS|SA": layer 3 shares across a pool; start each stage with A',
    ),
    (
        lambda: small(widths=(16, 24)),
        f'widths: got 2 (16, 24) for schedule "{SCHEDULE}", expected 3, one a stage',
    ),
    (lambda: small(widths=20), "widths: got 20, expected a multiple of head_dim, 8"),
    (
        lambda: small(pool="max"),
        'widths: got 16 and then 24 with pool "max", which has no parameters; expected 16 again, '
        "or pool conv",
    ),
    (
        lambda: small(pool="depthwise"),
        'widths: got 16 and then 24 with pool "depthwise", expected a multiple of 16 after it',
    ),
    (
        lambda: small("A", 8, pool="mean"),
        "pool: got 'mean', expected one of conv, depthwise, max, avg, stride",
    ),
    (lambda: small(patch_size=0), "patch_size: got 0, expected a whole number from 1 up"),
    (lambda: small(img_size="32"), "img_size: got '32', expected a whole number from 1 up"),
    (lambda: small(num_classes=-1), "num_classes: got -1, expected a whole number from 0 up"),
    (lambda: small(dims=3), "dims: got 3, expected 1 or 2"),
    (lambda: small(prefix="in"), 'prefix: got "in", expected "inside" or "beside"'),
    (
        lambda: small(prefix="inside"),
        'prefix: got "inside" for dims=2, expected "beside"; a class token has no place in the '
        "grid",
    ),
    (
        lambda: small(global_pool="token"),
        'global_pool: got "token" for a model with no class token, expected one of "avg", '
        '"avgmax", "max", ""',
    ),
    (
        lambda: small().reset_classifier(3, "map"),
        'global_pool: got "map" for a model with no class token, expected one of "avg", '
        '"avgmax", "max", ""',
    ),
    (
        lambda: small(img_size=(33, 32)),
        "img_size: got 33 x 32, expected multiples of 4, from 12 x 12 on; "
        "next to it: 32 x 32 or 36 x 32",
    ),
    (
        lambda: small()(IMAGE[..., :8, :8]),
        "img_size: got 8 x 8, expected multiples of 4, from 12 x 12 on; next to it: 12 x 12",
    ),
    (
        lambda: small().set_input_size(30),
        "img_size: got 30 x 30, expected multiples of 4, from 12 x 12 on; "
        "next to it: 28 x 28 or 32 x 32",
    ),
    (lambda: small()(IMAGE[0]), "x: got shape (3, 32, 32), expected (B, 3, height, width)"),
    (
        lambda: small().forward_intermediates(IMAGE, norm=True),
        "norm: got True for layer 0 of width 16, expected layers of width 40 as the norm, 6 to 7",
    ),
    (
        lambda: small().forward_intermediates(IMAGE, output_fmt="NHWC"),
        'output_fmt: got "NHWC", expected "NCHW" or "NLC"',
    ),
    (
        lambda: psvit.accelerate(small(), "AAAAAAAA"),
        f'model: got PSViT, which was made for its schedule "{SCHEDULE}", expected a host\'s '
        "model; for another schedule make another PSViT",
    ),
    (
        lambda: psvit.analyze(small(), IMAGE),
        f'model: was made for its schedule "{SCHEDULE}"; analyze one of timm\'s ViTs, or a PSViT '
        "whose layers all attend, without pools",
    ),
    (
        lambda: psvit.restore(small()),
        f'model: got PSViT, which was made for its schedule "{SCHEDULE}", expected a host\'s '
        "model; for another schedule make another PSViT",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
