"""What timm and PyTorch ask of a model, and PSViT models have."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import torch
from psvits import DIMS, small

import psvit
from psvit.models import PRESETS

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")


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
