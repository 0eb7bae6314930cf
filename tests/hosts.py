"""Small models of every family, with weights that make every part of them matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forced_providers import skip_unless_available
from torch import Tensor, nn

import psvit_kernels as pk

Case = tuple[str, Callable[[], nn.Module]]

#: A mark; that a schedule changes what a model computes has tests of its own.
ignore_schedule_warning = pytest.mark.filterwarnings(
    "ignore:schedule .* changes what the model computes"
)

IMAGES = (2, 3, 32, 32)
DEPTH = 4


def randomised(model: nn.Module) -> nn.Module:
    """No weight left at zero or one: layer scale, biases and norms count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25 if parameter.dim() > 1 else 0.5)
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or IMAGES))


def answer(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """The tensor that counts in what a model gives."""
    out = model(x, **options)
    if isinstance(out, (Tensor, tuple)):
        return out if isinstance(out, Tensor) else torch.stack(out)
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(type(out))


def timm_vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    size = dict(img_size=32, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=5)
    return randomised(timm.VisionTransformer(**(size | options)))


def vit_of_pixels(
    width: int = 64, heads: int = 2, grid: int = 8, depth: int = 2, **options: Any
) -> Any:
    """timm's, one token a pixel, with the weights that timm gives it."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(
        img_size=grid, patch_size=1, in_chans=1, num_classes=3,
        embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=1, **options,
    )  # fmt: skip


def timm_deit() -> nn.Module:
    timm = pytest.importorskip("timm.models.deit")
    return randomised(
        timm.VisionTransformerDistilled(
            img_size=32, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=5
        )
    )


def _swiglu() -> type:
    return pytest.importorskip("timm.layers").SwiGLUPacked


TIMM: list[Case] = [
    ("vit", timm_vit),
    ("deit-distilled", timm_deit),
    ("dinov2", lambda: timm_vit(reg_tokens=4, init_values=1e-5, mlp_layer=_swiglu())),
    ("siglip", lambda: timm_vit(class_token=False, global_pool="map")),
    ("qk-norm", lambda: timm_vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True)),
    ("average", lambda: timm_vit(class_token=False, global_pool="avg", qkv_bias=False)),
    ("no-embed-class", lambda: timm_vit(no_embed_class=True, reg_tokens=1, pre_norm=True)),
    ("dynamic", lambda: timm_vit(dynamic_img_size=True, proj_bias=False)),
    ("oblong", lambda: timm_vit(img_size=(16, 64))),
]


def hub_model(kind: str, config: str, **options: Any) -> nn.Module:
    hub = pytest.importorskip("transformers")
    size = dict(
        hidden_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=4,
    )
    size |= options
    if config in ("CLIPConfig", "SiglipConfig"):
        size = dict(vision_config=size)
    return randomised(getattr(hub, kind)(getattr(hub, config)(**size)))


HUB: list[Case] = [
    ("vit", lambda: hub_model("ViTModel", "ViTConfig")),
    ("vit-classifier", lambda: hub_model("ViTForImageClassification", "ViTConfig", qkv_bias=False)),
    ("deit", lambda: hub_model("DeiTForImageClassificationWithTeacher", "DeiTConfig")),
    ("dinov2", lambda: hub_model("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2)),
    ("dinov2-swiglu", lambda: hub_model("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True)),
    (
        "dinov2-registers",
        lambda: hub_model("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    ),
    ("siglip", lambda: hub_model("SiglipVisionModel", "SiglipVisionConfig")),
    ("siglip-classifier", lambda: hub_model("SiglipForImageClassification", "SiglipConfig")),
    ("clip", lambda: hub_model("CLIPVisionModel", "CLIPVisionConfig")),
    ("clip-projection", lambda: hub_model("CLIPVisionModelWithProjection", "CLIPVisionConfig")),
]


def torchvision_vit(image_size: int = 32, patch_size: int = 4, **options: Any) -> nn.Module:
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    size = (image_size, patch_size, DEPTH, 3, 24, 48)
    return randomised(vit.VisionTransformer(*size, num_classes=5, **options))


def _with_stem() -> nn.Module:
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    stem = [vit.ConvStemConfig(out_channels=8, kernel_size=3, stride=s) for s in (2, 2)]
    return torchvision_vit(conv_stem_configs=stem)


TORCHVISION: list[Case] = [
    ("vit", torchvision_vit),
    ("conv-stem", _with_stem),
    ("pre-logits", lambda: torchvision_vit(representation_size=7)),
]


def _timm_eva() -> nn.Module:
    eva = pytest.importorskip("timm.models.eva")
    size = dict(img_size=32, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=5)
    return eva.Eva(**size, use_rot_pos_emb=True)


def _timm_swin() -> nn.Module:
    swin = pytest.importorskip("timm.models.swin_transformer")
    size = dict(img_size=32, embed_dim=12, depths=(2, 2), num_heads=(1, 2), num_classes=5)
    return swin.SwinTransformer(**size, window_size=4)


def _torchvision_swin() -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    return swin.SwinTransformer([4, 4], 12, [2, 2], [1, 2], window_size=[4, 4], num_classes=5)


def _parallel() -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm_vit(block_fn=timm.ParallelScalingBlock)


def hub_swin() -> nn.Module:
    hub = pytest.importorskip("transformers")
    size = dict(image_size=32, embed_dim=12, depths=[2, 2], num_heads=[1, 2], window_size=4)
    return hub.SwinModel(hub.SwinConfig(**size))


def _hub_relative() -> nn.Module:
    return hub_model("BeitModel", "BeitConfig", use_relative_position_bias=True)


#: Makers of models with layers that psvit doesn't know, and how it names them.
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm-rotary": (_timm_eva, "blocks.0.attn is a timm EvaAttention"),
    "timm-windows": (_timm_swin, "layers.0.blocks.0.attn is a timm WindowAttention"),
    "timm-parallel": (_parallel, "blocks.0 is a timm ParallelScalingBlock"),
    "hub-rotary": (
        lambda: hub_model("DINOv3ViTModel", "DINOv3ViTConfig"),
        "is a transformers DINOv3ViTAttention",
    ),
    "hub-windows": (hub_swin, "is a transformers SwinAttention"),
    "hub-relative": (_hub_relative, "is a transformers BeitAttention"),
    "torchvision-windows": (_torchvision_swin, "is a torchvision ShiftedWindowAttention"),
}


#: Of all families, for ``IMAGES``.
EVERY = [
    pytest.param(make, id=f"{library}-{name}")
    for library, family in (("timm", TIMM), ("hub", HUB), ("torchvision", TORCHVISION))
    for name, make in family
    if name != "oblong"
]


def cases(family: list[Case]) -> Any:
    """A parametrisation over a family: the test gets ``make``, which makes a host."""
    return pytest.mark.parametrize("make", [m for _, m in family], ids=[n for n, _ in family])


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss that every output counts in, for each parameter that has one."""
    model.zero_grad()
    out = answer(model, x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_compiled_is_reference(model: nn.Module, x: Tensor) -> None:
    """Outputs and gradients of the CPU's kernels are those of the reference."""
    __tracebackhide__ = True
    skip_unless_available("cpu")
    with pk.use("cpu"):
        got, got_gradients = answer(model, x), gradients(model, x)
    with pk.use("reference"):
        want, want_gradients = answer(model, x), gradients(model, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert_same_gradients(got_gradients, want_gradients, rtol=1e-3, atol=1e-3)


def assert_same_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float
) -> None:
    __tracebackhide__ = True
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(
            got[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
