"""Training converted models: gradients, checkpointing, autocast, compile, export, two processes."""

from __future__ import annotations

import copy
import warnings

import hosts
import pytest
import torch
import torch.multiprocessing as mp
import two_processes
from torch.utils.checkpoint import checkpoint
from two_processes import MODELS

import psvit

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]


@hosts.cases(MODELS)
@pytest.mark.parametrize("schedule", ["ASSA", "AS|AS"])
def test_gradients_reach_every_parameter_that_asks_for_one(make, schedule):
    model = psvit.accelerate(make(), schedule, pool="conv").train()
    gradients = hosts.gradients(model, hosts.images())
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted
    for name, gradient in gradients.items():
        # A key's bias shifts a whole row of scores: softmax doesn't see it.
        assert gradient.any() or name.endswith("k_proj.bias"), f"{name} has no gradient"


def test_a_sharing_layer_trains_its_donor_and_leaves_its_own_q_and_k_alone():
    model = psvit.accelerate(hosts.timm_vit(), "ASAA").train()
    gradient = hosts.gradients(model, hosts.images())["blocks.1.attn.qkv.weight"]
    assert not gradient[:48].any() and gradient[48:].any()
    block = model.blocks[0].attn
    x = torch.randn(1, 9, 24)
    slot = psvit.attention.MapSlot(reuses=1)
    block(x, slot=slot)
    model.blocks[1].attn(x, slot=slot).sum().backward()
    assert block.qkv.weight.grad[:48].any()


def test_gradients_are_those_of_finite_differences():
    model = psvit.accelerate(hosts.timm_vit(embed_dim=6), "AS|AS", pool="avg", size_bias=True)
    model = model.double().blocks
    x = torch.randn(1, 65, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(model, (x,), fast_mode=True)
    weight = model[0].attn.qkv.weight

    def through_weight(w):
        return torch.func.functional_call(model, {"0.attn.qkv.weight": w}, (x.detach(),))

    torch.autograd.gradcheck(through_weight, (weight.detach().requires_grad_(),), fast_mode=True)


# --- gradient checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["ASSA", "AS|AS"])
def test_timm_checkpointing_gives_the_same_gradients(schedule):
    model = psvit.accelerate(hosts.timm_vit(), schedule, size_bias=True).train()
    x = hosts.images()
    want = hosts.gradients(model, x)
    model.set_grad_checkpointing()
    hosts.assert_same_gradients(hosts.gradients(model, x), want)
    _, features = model.forward_intermediates(x)
    model.zero_grad()
    sum(f.square().sum() for f in features).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.set_grad_checkpointing(False)
    _, features = model.forward_intermediates(x)
    model.zero_grad()
    sum(f.square().sum() for f in features).backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


@pytest.mark.parametrize("reentrant", [False, True])
@hosts.cases(MODELS)
def test_checkpointing_a_whole_model_gives_the_same_gradients(make, reentrant):
    model = psvit.accelerate(make(), "AS|AS").train()
    x = hosts.images().requires_grad_()
    want = hosts.gradients(model, x)
    model.zero_grad()
    out = checkpoint(lambda x: hosts.answer(model, x), x, use_reentrant=reentrant)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    hosts.assert_same_gradients(got, want)


def test_reentrant_checkpointing_layer_by_layer_says_what_to_do_instead():
    model = psvit.accelerate(hosts.timm_vit(), "ASAA").train()
    x = torch.randn(1, 65, 24, requires_grad=True)
    for step in model.blocks:
        x = checkpoint(step, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"layer 2 shares the map .* pass use_reentrant=False"):
        x.sum().backward()


def test_inference_keeps_a_map_no_longer_than_its_group():
    model = psvit.accelerate(hosts.timm_vit(), "AS|AS")
    steps = model.blocks.steps()
    x = torch.randn(1, 65, 24)
    with torch.no_grad():
        for step in steps[:2]:
            x = step(x)
        assert all(slot.map is None for slot in steps[0]._flow.slots.values())


# --- dtypes, compiling, exporting -------------------------------------------------------------


@hosts.cases(MODELS)
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16_is_close_to_float32(make, how):
    model = psvit.accelerate(make(), "AS|AS", size_bias=True)
    for parameter in model.parameters():
        parameter.data.mul_(0.4)  # so that rounding isn't amplified layer by layer
    x = hosts.images()
    want = hosts.answer(model, x)
    model.train()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = hosts.answer(model, x)
            gradients = hosts.gradients(model, x)
    else:
        model, x = model.bfloat16(), x.bfloat16()
        got, gradients = hosts.answer(model, x), hosts.gradients(model, x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _skip_unless_the_host_is_traceable(name: str) -> None:
    """transformers 5 by itself can't be traced by PyTorch 2.6."""
    host = dict(MODELS)[name]()
    try:
        torch.compile(host, fullgraph=True, backend="eager")(hosts.images())
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this {name} can't be traced by this PyTorch, unconverted: {error}")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("timm", "aot_eager"), ("transformers", "eager"), ("torchvision", "eager")],
)
def test_the_whole_model_compiles_without_a_graph_break(name, backend, fresh_compiler):
    _skip_unless_the_host_is_traceable(name)
    model = psvit.accelerate(dict(MODELS)[name](), "AS|AS", size_bias=True)
    x = hosts.images()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(hosts.answer(compiled, x), hosts.answer(model, x))
    hosts.assert_same_gradients(
        {n.removeprefix("_orig_mod."): g for n, g in hosts.gradients(compiled, x).items()},
        hosts.gradients(model, x),
    )


@pytest.mark.parametrize(
    "size_bias",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.6"),
                reason="PyTorch 2.6 can't trace sizes of tokens that depend on the image",
            ),
        ),
    ],
)
def test_images_of_several_sizes_go_through_one_compiled_model(size_bias, fresh_compiler):
    host = hosts.timm_vit(dynamic_img_size=True)
    model = psvit.accelerate(host, "AS|AS", size_bias=size_bias)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shape in [(1, 3, 32, 32), (2, 3, 16, 64), (2, 3, 24, 40)]:
        x = hosts.images(*shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    # transformers makes a mask when it is exported, and a mask can't be pooled.
    [("timm", "AS|AS"), ("transformers", "ASAS"), ("torchvision", "AS|AS")],
)
def test_the_whole_model_exports(name, schedule, fresh_compiler):
    _skip_unless_the_host_is_traceable(name)
    model = psvit.accelerate(dict(MODELS)[name](), schedule, size_bias=True)
    x = hosts.images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(hosts.answer(exported, x), hosts.answer(model, x))


# --- two processes ----------------------------------------------------------------------------


def test_two_processes_train_as_one_does(tmp_path):
    mp.spawn(two_processes.train, (str(tmp_path),), nprocs=2)
    for name, make in MODELS:
        model = two_processes.seeded(make)
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in two_processes.batches():
            optimizer.zero_grad()
            hosts.answer(model, x).square().mean().backward()
            optimizer.step()
        trained = torch.load(tmp_path / name)
        assert any(not torch.equal(trained[key], start[key]) for key in start)
        torch.testing.assert_close(trained, dict(model.state_dict()), rtol=1e-3, atol=1e-4)
