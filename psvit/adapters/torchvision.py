"""torchvision's ``VisionTransformer``: vit_b_16 and its like."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from ..attention import Attention, split_heads
from ..block import BlockNames
from ..layout import image_grid
from ..stack import Stack
from . import Encoder, check_attributes, check_children, check_class, check_hooks

NAMES = BlockNames(
    norm1="ln_1",
    attention="self_attention",
    after_attention=("dropout",),
    norm2="ln_2",
    mlp="mlp",
    after_mlp=(),
)
_FLAGS = {"embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim"}
_FLAGS |= {"_qkv_same_embed_dim", "in_proj_weight", "in_proj_bias"}


class PackedAttention(Attention):
    """Q, K and V rows packed in a parameter of the attention, as in ``nn.MultiheadAttention``."""

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    def __init__(self, host: nn.Module, shares: bool, layer: int) -> None:
        assert isinstance(host, nn.MultiheadAttention)
        scale = host.head_dim**-0.5
        super().__init__(host, shares=shares, layer=layer, heads=host.num_heads, scale=scale)
        self.dropout = host.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = fused.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def project_values(self, x: Tensor) -> Tensor:
        return split_heads(F.linear(x, *self.values), self.num_heads)

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        weight: Tensor = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if not self.stripped:
            first = 2 * weight.shape[0] // 3
            weight, bias = weight[first:], None if bias is None else bias[first:]
        return weight, bias

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(out)

    @property
    def output_projection(self) -> nn.Linear:
        return self.out_proj

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def unused(self) -> tuple[str, ...]:
        return ()

    def strip(self) -> None:
        super().strip()
        for name in ("in_proj_weight", "in_proj_bias"):
            old = getattr(self, name)
            if old is not None:
                rows = old.detach()[2 * old.shape[0] // 3 :].clone()
                setattr(self, name, nn.Parameter(rows, requires_grad=old.requires_grad))


def encoder(module: nn.Module, model: nn.Module) -> Encoder | None:
    """What there is to convert in a module, or None if it is no host of this library."""
    if not isinstance(module, VisionTransformer):
        return None
    layers = module.encoder.layers
    if not isinstance(layers, Stack):
        check_class("encoder.layers", layers, nn.Sequential)
        for name, layer in layers.named_children():
            _check_layer(f"encoder.layers.{name}", layer)
    stem = module.conv_proj
    convolution = stem if isinstance(stem, nn.Conv2d) else stem.conv_last
    side = module.image_size // module.patch_size
    return Encoder(
        host=module,
        owner=module.encoder,
        attribute="layers",
        prefix=1,
        grid=(side, side),
        embedding=stem,
        measure=image_grid,
        convolution=convolution,
        names=NAMES,
        attention=PackedAttention,
    )


def _check_layer(where: str, layer: nn.Module) -> None:
    check_class(where, layer, EncoderBlock)
    parts = (NAMES.norm1, NAMES.norm2, NAMES.mlp, *NAMES.after_attention)
    check_children(where, layer, {**dict.fromkeys(parts), NAMES.attention: nn.MultiheadAttention})
    check_attributes(where, layer, {"num_heads"})
    where, attn = f"{where}.self_attention", layer.self_attention
    assert isinstance(attn, nn.MultiheadAttention)
    out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear
    check_children(where, attn, {"out_proj": (out_proj, nn.Linear)})
    check_attributes(where, attn, _FLAGS)
    check_hooks(where, attn)
    for flag in ("_qkv_same_embed_dim", "batch_first"):
        if not getattr(attn, flag):
            raise ValueError(f"model: {where}.{flag} is False, expected True")


def after_conversion(model: nn.Module, stack: Stack) -> None:
    """Nothing else in this host depends on its layers."""


def after_restoration(model: nn.Module) -> None:
    """As above."""
