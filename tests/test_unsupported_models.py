"""What ``accelerate`` refuses, with which words, and that it changes nothing then."""

from __future__ import annotations

import re

import hosts
import pytest
import torch
from torch import nn

import psvit

pytestmark = hosts.ignore_schedule_warning


def refuses(model, message, schedule="AAAA", **options):
    before = repr(model)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        psvit.accelerate(model, schedule, inplace=True, **options)
    assert repr(model) == before
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_a_model_nobody_knows_gets_the_list_of_those_we_do():
    with pytest.raises(ValueError, match="got Linear, which psvit doesn't know; it knows") as e:
        psvit.accelerate(nn.Linear(2, 2), "A")
    for name in ("timm: VisionTransformer", "transformers: ViTModel", "Dinov2", "torchvision"):
        assert name in str(e.value)
    with pytest.raises(TypeError, match=r"model: got str, expected a torch\.nn\.Module"):
        psvit.accelerate("vit", "A")


def test_schedules_that_do_not_fit():
    refuses(hosts.timm_vit(), "has 5 layers, expected 4 as the model", "AAAAA")
    refuses(hosts.timm_vit(), "layer 3 shares across a pool; start each stage with A", "AS|SA")
    refuses(hosts.timm_vit(), "pool: got 'mean', expected one of max, avg, stride", pool="mean")
    refuses(hosts.timm_vit(), "dims: got 3, expected 1 or 2", dims=3)


def test_a_converted_model_is_not_converted_again():
    model = psvit.accelerate(hosts.timm_vit(), "ASAS")
    refuses(model, 'is converted already, to schedule "ASAS"; call psvit.restore on it first')
    with pytest.raises(ValueError, match="that isn't converted, expected one that is"):
        psvit.restore(hosts.timm_vit())


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ResPostBlock", "ParallelThingsBlock"])
def test_other_blocks_of_timm(block):
    timm = pytest.importorskip("timm.models.vision_transformer")
    model = hosts.timm_vit(block_fn=getattr(timm, block))
    refuses(model, rf"model: blocks\.0 is a timm {block}, expected timm Block")


def test_other_attention_of_timm():
    model = hosts.timm_vit(attn_layer="diff", embed_dim=24, num_heads=2)
    refuses(model, r"blocks\.0\.attn is a timm DiffAttention, expected timm Attention")


def test_an_unknown_child_is_named():
    model = hosts.timm_vit()
    model.blocks[2].attn.relative = nn.Embedding(3, 3)
    refuses(model, r"blocks\.2\.attn\.relative \(torch Embedding\) is a part that psvit doesn't")
    model = hosts.timm_vit()
    model.blocks[1].adapter = nn.Linear(2, 2)
    refuses(model, r"blocks\.1\.adapter \(torch Linear\) is a part that psvit doesn't know")
    model = hosts.timm_vit()
    del model.blocks[1].ls1
    refuses(model, r"blocks\.1 has no ls1")


def test_an_unknown_parameter_or_flag_is_named():
    model = hosts.timm_vit()
    model.blocks[3].attn.temperature = nn.Parameter(torch.ones(1))
    refuses(model, r"blocks\.3\.attn\.temperature is a parameter that psvit doesn't know")
    model = hosts.timm_vit()
    model.blocks[0].attn.softcap = 50.0
    refuses(model, r"blocks\.0\.attn\.softcap = 50\.0 is a flag that psvit doesn't know")
    model.blocks[0].attn.softcap = None  # switched off
    psvit.accelerate(model, "AAAA")


def test_another_linear_layer_is_named():
    class LowRank(nn.Linear):
        pass

    model = hosts.timm_vit()
    model.blocks[1].attn.qkv = LowRank(24, 72)
    refuses(model, r"blocks\.1\.attn\.qkv is a \w+ LowRank, expected torch Linear")


def test_hooks_on_an_attention_are_refused():
    model = hosts.timm_vit()
    model.blocks[0].attn.register_forward_hook(lambda *args: None)
    refuses(model, r"blocks\.0\.attn has 1 hooks, which a converted model would not call as before")


def test_tokens_that_are_dropped_at_random_cannot_be_pooled():
    model = hosts.timm_vit(patch_drop_rate=0.5)
    refuses(model, 'schedule "AS|AS": pools tokens, but patch_drop drops 50%', "AS|AS")
    assert psvit.accelerate(model, "ASAS").train()(hosts.images()).shape == (2, 5)


def test_heads_that_read_every_patch_allow_no_pool():
    hub = pytest.importorskip("transformers")
    config = hub.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=4
    )
    model = hub.ViTForMaskedImageModeling(config)
    refuses(model, "but ViTForMaskedImageModeling reads every patch of the grid", "AA|AA")
    psvit.accelerate(model, "ASAS")


def test_two_encoders_are_one_too_many():
    pair = nn.ModuleDict({"left": hosts.timm_vit(), "right": hosts.timm_vit()})
    with pytest.raises(ValueError, match=re.escape("with 2 encoders (left, right); expected one")):
        psvit.accelerate(pair, "AAAA")


def test_an_encoder_inside_of_a_model_is_found():
    model = nn.Sequential(hosts.timm_vit(), nn.Tanh()).eval()
    fast = psvit.accelerate(model, "AAAA")
    x = hosts.images()
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    assert type(psvit.restore(fast)[0].blocks) is nn.Sequential
