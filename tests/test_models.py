"""PSViT models: what they compute, what they cost, and what timm expects of a model."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

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
from psvit.models.pool import STAGE_KINDS, StagePool

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCHEDULE = "AAS|ASA|AS"
WIDTHS = (16, 24, 40)
MATCHED = [name for name in PRESETS if not name.endswith("_deit")]
DIMS = pytest.mark.parametrize("dims", [1, 2])


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


# --- pools and dense features ---------------------------------------------------------------


def stage_pool(kind: str, dims: int, inside: bool, prefix: int = 1) -> StagePool:
    width = 12 if kind in ("conv", "depthwise") else 6
    pool = StagePool(kind, 6, width, dims=dims, prefix=prefix, inside=inside, norm=False).double()
    for name, parameter in pool.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter)
    return pool


LINEAR = [("avg", 1, True), ("avg", 1, False), ("stride", 1, True), ("stride", 1, False)]
LINEAR += [(kind, 2, False) for kind in STAGE_KINDS if kind != "max"]


@pytest.mark.parametrize(("kind", "dims", "inside"), LINEAR)
@pytest.mark.parametrize("grid", [(1, 2), (3, 4), (8, 5)])
def test_expand_is_the_adjoint_of_reduce(kind, dims, inside, grid):
    pool, layout = stage_pool(kind, dims, inside), psvit.Layout(1, grid)
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    reduced, after = pool.reduce(x, layout)
    assert after.tokens == reduced.shape[1]
    y = torch.randn_like(reduced)
    torch.testing.assert_close((reduced * y).sum(), (x * pool.expand(y, layout)).sum())


def test_expand_of_a_pooled_sequence_takes_the_average_for_the_maximum():
    pool, layout = stage_pool("conv", 1, True), psvit.Layout(1, (3, 4))
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    wide = F.conv1d(x.mT, pool.conv.weight, None, 1, 1)
    average = F.avg_pool1d(wide, 3, 2, 1, count_include_pad=False).mT
    y = torch.randn_like(average)
    torch.testing.assert_close((average * y).sum(), (x * pool.expand(y, layout)).sum())


@pytest.mark.parametrize("kind", STAGE_KINDS)
@pytest.mark.parametrize(("dims", "inside"), [(1, True), (1, False), (2, False)])
def test_upsample_keeps_constants_and_means_over_the_windows_of_a_cell(kind, dims, inside):
    pool, layout = stage_pool(kind, dims, inside), psvit.Layout(1, (3, 4))
    after = pool.reduced(layout)
    ones = torch.ones(1, after.tokens, 3, dtype=torch.float64)
    torch.testing.assert_close(pool.upsample(ones, layout), ones.new_ones(1, layout.tokens, 3))
    y = torch.randn(1, after.tokens, 3, dtype=torch.float64)
    low, high = y.amin(1, keepdim=True), y.amax(1, keepdim=True)
    z = pool.upsample(y, layout)
    assert (z >= low - 1e-12).all() and (z <= high + 1e-12).all()


def test_upsample_of_a_grid_puts_each_token_where_it_came_from():
    pool, layout = stage_pool("conv", 2, False, prefix=0), psvit.Layout(0, (1, 5))
    y = torch.tensor([[[1.0], [2.0], [3.0]]])  # of windows {0, 1}, {1, 2, 3}, {3, 4}
    assert pool.upsample(y, layout).flatten().tolist() == [1, 1.5, 2, 2.5, 3]


@DIMS
def test_intermediates_are_the_tokens_of_their_layers(dims):
    model = small(dims=dims)
    x = hosts.images(2, 3, 24, 40)
    final, features = model.forward_intermediates(x, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(x))
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(model.norm(features[-1]), final[:, prefix:])
    pairs = model.forward_intermediates(
        x, [1, -1], return_prefix_tokens=True, norm=False, intermediates_only=True
    )
    if dims == 1:
        assert [p.shape for _, p in pairs] == [(2, 1, 16), (2, 1, 40)]
        assert [f.shape for f, _ in pairs] == [(2, 16, 6, 10), (2, 40, 6, 10)]
    else:
        assert [f.shape for f in pairs] == [(2, 16, 6, 10), (2, 40, 2, 3)]
    found = model.forward_intermediates(x, 1, norm=True, output_dict=True, expand=True)
    assert found["image_intermediates"][0].shape == (2, 40, 6, 10)
    torch.testing.assert_close(found["image_features"], final)
    early, [only] = model.forward_intermediates(x, [2], stop_early=True, output_fmt="NLC")
    torch.testing.assert_close(only, features[2])
    torch.testing.assert_close(early[:, prefix:], only)


@pytest.mark.parametrize("name", ["psvit_1d_tiny", "psvit_2d_tiny"])
def test_timm_makes_a_pyramid_of_features_of_it(name):
    with torch.device("meta"):
        pyramid = timm.create_model(name, features_only=True)
        features = pyramid(torch.empty(1, 3, 224, 224))
    info = pyramid.feature_info
    assert info.channels() == list(PRESETS[name].widths)
    sides = [-(-224 // reduction) for reduction in info.reduction()]
    assert [f.shape[2:] for f in features] == [(side, side) for side in sides]
    assert [f.shape[1] for f in features] == info.channels()


# --- what timm and PyTorch ask of a model ---------------------------------------------------


def test_timm_knows_the_presets_and_its_training_script_gets_what_it_asks_for():
    from timm.data import resolve_data_config
    from timm.optim import create_optimizer_v2

    assert set(timm.list_models("psvit_*")) == set(PRESETS)
    model = timm.create_model(
        "psvit_2d_tiny", pretrained=False, in_chans=3, num_classes=10, drop_rate=0.1,
        drop_path_rate=0.1, drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None,
        scriptable=False, checkpoint_path="", img_size=64,
    )  # fmt: skip
    assert model.default_cfg["architecture"] == "psvit_2d_tiny" and model.num_classes == 10
    assert model.pretrained_cfg["first_conv"] == "patch_embed.proj"
    config = resolve_data_config({"img_size": 64}, model=model)
    assert config["input_size"] == (3, 64, 64) and config["mean"] == (0.485, 0.456, 0.406)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    pool = model.blocks.pools[0].conv.weight
    layer = model.blocks[model.schedule.pools[0]].mlp.fc1.weight
    assert groups[id(pool)]["lr_scale"] == groups[id(layer)]["lr_scale"]
    assert groups[id(model.pos_embed)]["weight_decay"] == 0
    assert groups[id(pool)]["weight_decay"] == 0.05
    with pytest.raises(RuntimeError, match="No pretrained weights exist for psvit_2d_tiny"):
        timm.create_model("psvit_2d_tiny", pretrained=True)


@pytest.mark.parametrize(
    "code",
    [
        "import psvit, sys; assert 'timm' not in sys.modules; import timm",
        "import timm, psvit, importlib; importlib.reload(psvit)",
    ],
)
def test_timm_knows_the_presets_whichever_is_imported_first(code):
    check = "assert len(timm.list_models('psvit_*')) == 12"
    _python(f"import warnings; warnings.filterwarnings('error', 'Overwriting'); {code}; {check}")


def test_without_timm_psvit_works_and_a_model_says_what_is_missing():
    _python(
        "import sys; sys.modules['timm'] = None\n"
        "import psvit, psvit.cli\n"
        "assert psvit.models.PRESETS and psvit.Schedule('AS').depth == 2\n"
        "for make in (lambda: psvit.create_model('psvit_1d_tiny'), lambda: psvit.PSViT):\n"
        "    try: make()\n"
        "    except ImportError as error: assert 'pip install \"psvit[timm]\"' in str(error)\n"
        "    else: raise AssertionError\n"
    )


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_a_new_classifier_has_the_width_of_the_last_stage():
    model = small()
    model.reset_classifier(7, "max")
    assert model(hosts.images()).shape == (2, 7) and model.get_classifier().in_features == 40
    model.reset_classifier(0)
    assert model(hosts.images()).shape == (2, 40) and model.num_features == 40


@DIMS
def test_other_image_sizes_interpolate_the_position_embedding(dims):
    model = small(dims=dims, pool_positions=True)
    wide = hosts.images(2, 3, 24, 40)
    want = model(wide)
    model.set_input_size((24, 40))
    assert model.pos_embed.shape[1] == model.layouts()[0].tokens == 60 + model.num_prefix_tokens
    torch.testing.assert_close(model(wide), want)


def test_positions_after_a_pool_are_added_there_and_never_decayed():
    model = small(pool_positions=True)
    assert [p.pos_embed.shape for p in model.blocks.pools] == [(1, 16, 24), (1, 4, 40)]
    assert {"pos_embed", "blocks.pools.0.pos_embed"} <= model.no_weight_decay()
    pool, layout = model.blocks.pools[0], model.layouts()[0]
    x = torch.randn(2, 64, 16)
    with_positions, _ = pool.reduce(x, layout)
    positions = pool.pos_embed.data.clone()
    pool.pos_embed.data.zero_()
    torch.testing.assert_close(pool.reduce(x, layout)[0] + positions, with_positions)


@DIMS
def test_checkpointing_changes_no_gradient(dims):
    model = small(dims=dims).train()
    x = hosts.images()
    want = hosts.gradients(model, x)
    model.set_grad_checkpointing()
    hosts.assert_same_gradients(hosts.gradients(model, x), want)
    final, _ = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))


def test_state_dicts_copies_and_pickles_make_the_same_model():
    model, x = small(dims=1, pool_positions=True), hosts.images()
    want = model(x)
    other = small(dims=1, pool_positions=True)
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x), want, rtol=0, atol=0)


@DIMS
def test_autocast_keeps_the_residual_stream_in_float32(dims):
    model, x = small(dims=dims), hosts.images()
    seen = []
    for i in range(len(model.blocks)):
        model.blocks[i].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = model(x), hosts.gradients(model, x)
    assert got.dtype == torch.bfloat16 and set(seen) == {torch.float32}
    torch.testing.assert_close(got.float(), model(x), rtol=0.1, atol=0.1)
    assert all(g.isfinite().all() for g in gradients.values())


@DIMS
def test_compiles_without_a_graph_break_and_exports(dims):
    torch.compiler.reset()
    model, x = small(dims=dims, pool_positions=True), hosts.images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    wanted = hosts.gradients(model, x)
    got = {n.removeprefix("_orig_mod."): g for n, g in hosts.gradients(compiled, x).items()}
    hosts.assert_same_gradients(got, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@DIMS
def test_images_and_batches_of_several_sizes_go_through_one_graph(dims):
    torch.compiler.reset()
    model, x = small(dims=dims), hosts.images()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for image in (x, hosts.images(3, 3, 24, 40)):
        torch.testing.assert_close(compiled(image), model(image))
    with torch.no_grad():
        sizes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(x[:1]), model(x[:1]))


def test_maps_can_be_recorded():
    model = small(dims=1)
    with psvit.record_maps(model) as maps:
        model(hosts.images())
    assert [m.shape[1:] for m in maps] == 3 * [(2, 65, 65)] + 3 * [(3, 33, 33)] + 2 * [(5, 17, 17)]
    assert maps[2] is maps[1] or torch.equal(maps[2], maps[1])


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
