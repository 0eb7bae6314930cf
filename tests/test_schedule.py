"""The schedule language: what is valid, what a schedule says of each layer, and what it costs."""

from __future__ import annotations

import itertools
import pickle
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import psvit
from psvit import Schedule


@pytest.mark.parametrize("text", ["A", "AS", "AASA|ASSS", "A|A|A", "AASA|ASAS|ASSS"])
def test_prints_as_its_text_and_parses_back(text):
    schedule = Schedule.parse(text)
    assert str(schedule) == text and repr(schedule) == f'Schedule("{text}")'
    assert Schedule.parse(str(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_is_hashable_equal_by_text_and_immutable():
    assert len({Schedule("AS"), Schedule("AS"), Schedule("AA")}) == 2
    with pytest.raises(AttributeError):
        Schedule("AS").text = "AA"


def test_says_what_each_layer_does():
    schedule = Schedule("AASA|ASSS")
    assert schedule.depth == 8 and schedule.kinds == "AASAASSS" and schedule.shared == 4
    assert schedule.donors == (0, 1, 1, 3, 4, 4, 4, 4)
    assert schedule.pools == (4,)
    assert schedule.stages == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert schedule.groups == ((0,), (1, 2), (3,), (4, 5, 6, 7))
    assert not schedule.is_plain and Schedule("AAAA").is_plain and not Schedule("A|A").is_plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'schedule "": is empty; expected one A or S for each layer'),
        ("SA", 'schedule "SA": layer 1 shares, but none attends before it; start with A'),
        (
            "AS|SA",
            'schedule "AS|SA": layer 3 shares across a pool; start each stage with A',
        ),
        (
            "AXS",
            'schedule "AXS": character 2 is "X", expected A (attend), S (share) or | (pool)',
        ),
        ("|AS", 'schedule "|AS": starts with a pool; a pool stands between two layers'),
        ("AS|", 'schedule "AS|": ends with a pool; a pool stands between two layers'),
        ("|", 'schedule "|": starts with a pool; a pool stands between two layers'),
        ("AA||A", 'schedule "AA||A": has two pools after layer 2; expected a layer between them'),
        ("as", 'schedule "as": character 1 is "a", expected A (attend), S (share) or | (pool)'),
    ],
)
def test_refuses_what_is_no_schedule(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Schedule.parse(text)


def test_refuses_another_depth_and_another_type():
    with pytest.raises(ValueError, match=r'^schedule "AAS": has 3 layers, expected 12'):
        Schedule.parse("AAS", depth=12)
    with pytest.raises(ValueError, match="has 1 layer, expected 2"):
        Schedule.parse(Schedule("A"), depth=2)
    with pytest.raises(TypeError, match="schedule: got int, expected a string"):
        Schedule.parse(3)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_enumerates_every_valid_schedule_once(depth):
    valid = set()
    for length in range(depth, 2 * depth):
        for characters in itertools.product("AS|", repeat=length):
            try:
                schedule = Schedule("".join(characters))
            except ValueError:
                continue
            if schedule.depth == depth:
                valid.add(schedule)
    found = list(Schedule.enumerate(depth))
    assert len(found) == len(set(found)) and set(found) == valid
    for pools, shared in itertools.product(range(depth), range(depth)):
        some = set(Schedule.enumerate(depth, pools=pools, shared=shared))
        assert some == {s for s in valid if len(s.pools) == pools and s.shared == shared}


# --- cost -----------------------------------------------------------------------------------


def counted_flops(model, images) -> int:
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def hosts():
    timm = pytest.importorskip("timm.models.vision_transformer")
    torchvision = pytest.importorskip("torchvision.models.vision_transformer")
    hub = pytest.importorskip("transformers")
    size = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    yield timm.VisionTransformer(**size, class_token=False, global_pool="map", qk_norm=True)
    yield timm.VisionTransformer(**size, reg_tokens=2, init_values=0.1)
    yield torchvision.VisionTransformer(32, 4, 4, 3, 24, 48, num_classes=5)
    config = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, image_size=32)
    config |= dict(patch_size=4, intermediate_size=48)
    yield hub.ViTForImageClassification(hub.ViTConfig(**config))
    yield hub.SiglipVisionModel(hub.SiglipVisionConfig(**config))
    yield hub.Dinov2ForImageClassification(
        hub.Dinov2Config(**config, mlp_ratio=2, use_swiglu_ffn=True)
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("text", "options"),
    [("AAAA", {}), ("ASAS", {}), ("AA|AS", {"pool": "conv"}), ("AS|A|A", {"dims": 1})],
)
def test_flops_are_those_that_pytorch_counts(text, options):
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("this PyTorch doesn't count its own attention on the CPU")
    for host in hosts():
        host.eval()
        model = psvit.accelerate(host, text, **options)
        images = torch.randn(1, 3, 32, 32)
        name = type(host).__name__
        assert Schedule(text).flops(host, **options) == counted_flops(model, images), name
        assert Schedule(text).flops(model) == counted_flops(model, images), name
        if text == "AAAA":
            assert counted_flops(model, images) == counted_flops(host, images), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_params_are_those_that_stay_when_the_others_are_dropped():
    for host in hosts():
        for text, options in [("ASAA", {}), ("AS|AS", {"pool": "conv"})]:
            stripped = psvit.accelerate(host, text, strip=True, **options)
            left = sum(p.numel() for p in stripped.parameters())
            assert Schedule(text).params(host, **options) == left, type(host).__name__
            assert Schedule(text).params(stripped) == left, type(host).__name__


def test_a_sharing_layer_of_deit_small_saves_a_fifth():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    plain, shared = Schedule("A" * 12), Schedule("A" + "S" * 11)
    first, last = plain.rows(host)[2], shared.rows(host)[2]
    assert first.flops == 2 * 378_391_296
    assert first.flops - last.flops == 2 * 73_000_320
    assert first.params - last.params == 295_680
    assert [row.kind for row in shared.rows(host)] == ["", "A", *"S" * 11, ""]
