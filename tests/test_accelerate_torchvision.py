"""``accelerate`` on torchvision's vision transformers."""

from __future__ import annotations

import copy
import pickle

import hosts
import pytest
import torch

import psvit

pytest.importorskip("torchvision")

pytestmark = [pytest.mark.usefixtures("one_thread"), hosts.ignore_schedule_warning]


@hosts.cases(hosts.TORCHVISION)
@pytest.mark.parametrize("training", [False, True])
def test_attending_everywhere_gives_the_hosts_outputs(make, training):
    host = make().train(training)
    model = psvit.accelerate(host, "AAAA")
    x = hosts.images(8, 3, 32, 32)
    torch.testing.assert_close(model(x), host(x), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(host.state_dict())
    hosts.assert_same_gradients(
        hosts.gradients(model.double(), x.double()), hosts.gradients(host.double(), x.double())
    )


@pytest.mark.parametrize("schedule", ["ASSA", "AS|AS"])
def test_the_compiled_kernels_give_what_the_reference_gives(schedule):
    model = psvit.accelerate(hosts.torchvision_vit(), schedule, size_bias=True).train()
    hosts.assert_compiled_is_reference(model, hosts.images())


@hosts.cases(hosts.TORCHVISION)
def test_checkpoints_fit_both_ways_and_restore_undoes(make):
    host, other = make(), make()
    model = psvit.accelerate(host, "AS|AS")
    x = hosts.images()
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(other.state_dict())
    back = psvit.restore(model)
    torch.testing.assert_close(back(x), other(x), rtol=0, atol=0)
    assert repr(back) == repr(other)


def test_stripping_keeps_the_rows_of_v():
    host = hosts.torchvision_vit()
    model, whole = (psvit.accelerate(host, "AS|AS", strip=strip) for strip in (True, False))
    x = hosts.images()
    torch.testing.assert_close(model(x), whole(x))
    state = model.state_dict()
    assert state["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"].shape == (24, 24)
    assert state["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].shape == (72, 24)
    with pytest.raises(ValueError, match="strip=True, which dropped Q and K of layers 2, 4"):
        psvit.restore(model)


def test_survives_deepcopy_and_pickle():
    model = psvit.accelerate(hosts.torchvision_vit(), "AS|AS")
    x = hosts.images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(model(x))
        psvit.restore(twin)


def test_dropout_everywhere_still_trains():
    host = hosts.torchvision_vit(dropout=0.2, attention_dropout=0.3)
    model = psvit.accelerate(host, "AS|AS").train()
    gradients = hosts.gradients(model, hosts.images())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in gradients.values())
