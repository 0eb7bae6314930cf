"""``accelerate`` on transformers: the hosts' outputs, and what transformers does around layers."""

from __future__ import annotations

import copy
import pickle

import hosts
import pytest
import torch

import psvit

hub = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]

EXACT = dict(rtol=1e-5, atol=1e-5)
CASES = dict(hosts.HUB)


@hosts.cases(hosts.HUB)
def test_attending_everywhere_gives_the_hosts_outputs(make):
    host = make()
    host.set_attn_implementation("eager")
    model = psvit.accelerate(host, "AAAA")
    x = hosts.images()
    asked = dict(output_hidden_states=True, output_attentions=True)
    got, want = model(x, **asked), host(x, **asked)
    assert got.keys() == want.keys()
    for name in got:
        ours, theirs = (t if isinstance(t, tuple) else (t,) for t in (got[name], want[name]))
        assert len(ours) == len(theirs), name
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, n=name: f"{n}: {text}", **EXACT)
    assert list(model.state_dict()) == list(host.state_dict())


@hosts.cases(hosts.HUB)
def test_the_compiled_kernels_give_what_the_reference_gives(make):
    model = psvit.accelerate(make(), "AS|AS", pool="avg", size_bias=True).train()
    hosts.assert_compiled_is_reference(model, hosts.images())


@hosts.cases(hosts.HUB)
def test_hidden_states_and_attentions_are_those_of_every_layer(make):
    host = make()
    model = psvit.accelerate(host, "AS|AS")
    x = hosts.images()
    plain = hosts.answer(model, x)
    out = model(x, output_hidden_states=True, output_attentions=True)
    prefix = out.hidden_states[0].shape[1] - 64
    tokens = [prefix + cells for cells in (64, 64, 64, 16, 16)]
    assert [h.shape[1] for h in out.hidden_states] == tokens
    assert [m.shape[-1] for m in out.attentions] == [tokens[0]] * 2 + [tokens[-1]] * 2
    assert out.attentions[0].equal(out.attentions[1])
    rows = out.attentions[3].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    torch.testing.assert_close(hosts.answer(model, x), plain)
    with psvit.record_maps(model) as maps:
        model(x)
    for ours, theirs in zip(maps, out.attentions, strict=True):
        assert ours.equal(theirs)


def test_attentions_asked_for_in_the_config_come_too():
    model = psvit.accelerate(CASES["vit"](), "ASAS")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(hosts.images()).attentions) == 4


def test_outputs_asked_for_before_converting_and_after_restoring_come():
    host = CASES["dinov2"]()
    host.set_attn_implementation("eager")
    x, asked = hosts.images(), dict(output_hidden_states=True, output_attentions=True)
    host(x, **asked)
    model = psvit.accelerate(host, "AAAA", inplace=True)
    out = model(x, **asked)
    assert len(out.attentions) == 4 and len(out.hidden_states) == 5
    out = psvit.restore(model)(x, **asked)
    assert len(out.attentions) == 4 and len(out.hidden_states) == 5


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip"])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_no_map(name, reentrant):
    model = psvit.accelerate(CASES[name](), "ASSA").train()
    x = hosts.images()
    want = hosts.gradients(model, x)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hosts.assert_same_gradients(hosts.gradients(model, x.requires_grad_()), want)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        hosts.answer(model, x)
    assert not [shape for shape in kept if len(shape) == 4 and shape[2] >= 64]
    model.gradient_checkpointing_disable()
    hosts.assert_same_gradients(hosts.gradients(model, x), want)


@hosts.cases(hosts.HUB)
def test_checkpoints_fit_both_ways_and_restore_undoes(make):
    host, other = make(), make()
    model = psvit.accelerate(host, "AS|AS")
    x = hosts.images()
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(other.state_dict())
    back = psvit.restore(model)
    torch.testing.assert_close(hosts.answer(back, x), hosts.answer(other, x), rtol=0, atol=0)
    assert all(p.requires_grad for p in back.parameters())
    assert repr(back) == repr(other)


def test_q_and_k_of_sharing_layers_are_frozen_until_restored():
    host = CASES["clip"]()
    host.encoder.layers[1].self_attn.q_proj.bias.requires_grad_(False)
    model = psvit.accelerate(host, "ASAA")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
    assert frozen == {f"encoder.layers.1.self_attn.{part}" for part in parts}
    back = psvit.restore(model)
    frozen = {name for name, p in back.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.layers.1.self_attn.q_proj.bias"}


def test_stripping_drops_the_projections():
    model = psvit.accelerate(CASES["vit"](), "ASAA", strip=True)
    whole = psvit.accelerate(CASES["vit"](), "ASAA")
    whole.load_state_dict(model.state_dict(), strict=False)
    names = set(whole.state_dict()) - set(model.state_dict())
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj"} and len(names) == 4
    with pytest.raises(ValueError, match="strip=True, which dropped Q and K of layers 2"):
        psvit.restore(model)


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
def test_images_of_another_shape_are_pooled_on_their_own_grid(name):
    model = psvit.accelerate(CASES[name](), "AS|AS")
    x = hosts.images(1, 3, 16, 40)
    options = {} if "dino" in name else {"interpolate_pos_encoding": True}
    out = model(x, output_hidden_states=True, **options)
    prefix = out.hidden_states[0].shape[1] - 4 * 10
    assert out.hidden_states[-1].shape[1] == prefix + 2 * 5


def test_survives_deepcopy_and_pickle():
    model = psvit.accelerate(CASES["dinov2"](), "AS|AS")
    x = hosts.images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).logits.equal(model(x).logits)
        assert len(twin(x, output_attentions=True).attentions) == 4
        psvit.restore(twin)


def test_the_vision_tower_of_a_pair_is_converted_alone():
    config = hub.CLIPConfig(
        vision_config=CASES["clip"]().config.to_dict(),
        text_config=dict(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        ),
    )
    host = hosts.randomised(hub.CLIPModel(config))
    model = psvit.accelerate(host, "AAAA")
    x = hosts.images()
    ours, theirs = (m.get_image_features(x).pooler_output for m in (model, host))
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert repr(model.text_model) == repr(host.text_model)


def test_arguments_that_would_change_attention_are_refused():
    model = psvit.accelerate(CASES["vit"](), "ASAS")
    with pytest.raises(ValueError, match="position_ids: got 3 for a converted model"):
        model(hosts.images(), position_ids=3)


def test_attention_masks_reach_the_maps():
    host = CASES["vit"]()
    model = psvit.accelerate(host, "AAAA")
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[:, 40:] = 0
    ours, theirs = (m(hosts.images() * 0 + 1, attention_mask=mask) for m in (model, host))
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, **EXACT)
    with pytest.raises(ValueError, match="attn_mask: got a mask for a model whose schedule pools"):
        psvit.accelerate(host, "AA|AA")(hosts.images(), attention_mask=mask)
