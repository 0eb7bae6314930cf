"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionPoolLatent
from timm.models import deit
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..attention import Attention, split_heads
from ..block import BlockNames
from ..layout import Layout
from ..stack import Stack, record_merges
from . import Encoder, check_attributes, check_children, check_class, check_hooks

NAMES = BlockNames(
    norm1="norm1",
    attention="attn",
    after_attention=("ls1", "drop_path1"),
    norm2="norm2",
    mlp="mlp",
    after_mlp=("ls2", "drop_path2"),
)
_FLAGS = {"num_heads", "head_dim", "attn_dim", "scale", "fused_attn"}


class FusedAttention(Attention):
    """One projection for Q, K and V. A sharing layer multiplies with the V rows of its weight."""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Linear
    proj_drop: nn.Module

    def __init__(self, host: nn.Module, shares: bool, layer: int) -> None:
        heads, scale = int(host.num_heads), float(host.scale)  # type: ignore[arg-type]
        super().__init__(host, shares=shares, layer=layer, heads=heads, scale=scale)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        q, k, v = fused.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def project_values(self, x: Tensor) -> Tensor:
        return split_heads(F.linear(x, *self.values), self.num_heads)

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        weight: Tensor = self.qkv.weight
        bias: Tensor | None = self.qkv.bias
        if not self.stripped:
            first = 2 * weight.shape[0] // 3
            weight, bias = weight[first:], None if bias is None else bias[first:]
        return weight, bias

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        norm, gate = self._modules.get("norm"), self._modules.get("gate")
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    @property
    def output_projection(self) -> nn.Linear:
        return self.proj

    @property
    def finishes_linearly(self) -> bool:
        norm, gate = self._modules.get("norm"), self._modules.get("gate")
        return gate is None and isinstance(norm, (nn.Identity, type(None)))

    @property
    def attention_dropout(self) -> float:
        return self.attn_drop.p

    @property
    def unused(self) -> tuple[str, ...]:
        return ("q_norm", "k_norm")

    def strip(self) -> None:
        super().strip()
        old = self.qkv
        first = 2 * old.out_features // 3
        new = nn.Linear(
            old.in_features, old.out_features - first, old.bias is not None, device="meta"
        )
        for name, parameter in old.named_parameters():
            setattr(new, name, _rows(parameter, first))
        new.training = old.training
        self.qkv = new


def _rows(parameter: Tensor, first: int) -> nn.Parameter:
    rows = parameter.detach()[first:].clone()
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


class Intermediates:
    """Stands on a model with fewer tokens than patches for its ``forward_intermediates``, which it
    calls.

    The host reshapes every feature to the grid of its patch embedding. After a pool that grid is
    wrong, and where the numbers happen to divide, nothing fails: so features are taken as tokens
    here, and each is given the grid that it has; merged ones are put where they came from.
    """

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model

    def __call__(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Arguments and result are the host's; features after a pool have its smaller grid. In
        the format "NLC" merged tokens stay merged."""
        flags = (indices, return_prefix_tokens, norm, stop_early)
        run = type(self.model).forward_intermediates
        with record_merges(self.model) as merges:
            found: Any = run(self.model, x, *flags, "NLC", *args, **kwargs)
        if output_fmt == "NLC":
            return found
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt: got "{output_fmt}", expected "NCHW" or "NLC"')
        by_tokens = {merged.tokens: merged for merged in merges}
        if isinstance(found, dict):
            features = [self._image(y, by_tokens) for y in found["image_intermediates"]]
            return {**found, "image_intermediates": features}
        if isinstance(found, list):
            return [self._image(y, by_tokens) for y in found]
        final, features = found
        return final, [self._image(y, by_tokens) for y in features]

    def _image(self, feature: Any, merges: dict[int, Layout]) -> Any:
        if isinstance(feature, tuple):  # with its prefix tokens
            return self._image(feature[0], merges), *feature[1:]
        stack = self.model.blocks
        assert isinstance(stack, Stack) and stack.grid.now is not None
        feature = merges[stack.prefix + feature.shape[1]].on_grid(feature)
        h, w = stack.grid.now
        for layout in stack.layouts(stack.prefix + h * w):
            if layout.cells == feature.shape[1]:
                break
        grid = layout.grid if len(layout.grid) == 2 else (1, layout.cells)
        return feature.transpose(1, 2).unflatten(2, grid).contiguous()


def encoder(module: nn.Module, model: nn.Module) -> Encoder | None:
    """What there is to convert in a module, or None if it is no host of this library."""
    if not isinstance(module, VisionTransformer):
        return None
    if not isinstance(module.blocks, Stack):
        check_class("blocks", module.blocks, nn.Sequential)
        for name, layer in module.blocks.named_children():
            _check_layer(f"blocks.{name}", layer)
    embedding = module.patch_embed
    whole = None
    if getattr(module.patch_drop, "prob", 0.0):
        whole = f"patch_drop drops {module.patch_drop.prob:.0%} of the patches in training"
    return Encoder(
        host=module,
        owner=module,
        attribute="blocks",
        prefix=module.num_prefix_tokens,
        grid=tuple(embedding.grid_size),
        embedding=embedding,
        measure=patch_grid,
        convolution=embedding.proj,
        names=NAMES,
        attention=FusedAttention,
        whole=whole,
        heads=_heads(module),
    )


def after_conversion(model: nn.Module, stack: Stack) -> None:
    if not stack.keeps_grid:
        model.forward_intermediates = Intermediates(model)  # type: ignore[assignment,arg-type]


def after_restoration(model: nn.Module) -> None:
    vars(model).pop("forward_intermediates", None)


def patch_grid(module: nn.Module, args: tuple, output: Tensor) -> tuple[int, int]:
    """(h, w) of the patches that a timm embedding makes, from its arguments."""
    h, w = module.dynamic_feat_size(tuple(args[0].shape[-2:]))  # type: ignore[operator]
    return h, w


def _check_layer(where: str, layer: nn.Module) -> None:
    check_class(where, layer, TimmBlock)
    parts = (NAMES.norm1, NAMES.norm2, NAMES.mlp, *NAMES.after_attention, *NAMES.after_mlp)
    check_children(where, layer, {**dict.fromkeys(parts), NAMES.attention: TimmAttention})
    check_attributes(where, layer, ())
    where, attn = f"{where}.attn", layer.get_submodule("attn")
    known: dict = dict.fromkeys(("q_norm", "k_norm", "proj", "proj_drop"))
    known |= {"qkv": nn.Linear, "attn_drop": nn.Dropout}
    known |= {name: None for name in ("norm", "gate") if getattr(attn, name, None) is not None}
    check_children(where, attn, known)
    check_attributes(where, attn, _FLAGS)
    check_hooks(where, attn)


def _heads(model: VisionTransformer) -> list:
    """An attention pool sees every token; with ``global_pool=""`` so do the classifiers."""
    if isinstance(model.attn_pool, AttentionPoolLatent):
        pool: Any = model.attn_pool
        width, queries = pool.kv.in_features, pool.latent_len

        def flops(tokens: int) -> int:
            inner = pool.q.out_features
            core = 4 * queries * tokens * inner
            linear = tokens * pool.kv.out_features * width + queries * inner * width
            linear += queries * inner * pool.proj.out_features
            mlp = sum(m.weight.numel() for m in pool.mlp.modules() if isinstance(m, nn.Linear))
            return int(core + 2 * (linear + queries * mlp))

        return [(pool, flops)]
    if model.global_pool == "" and not isinstance(model, deit.VisionTransformerDistilled):
        head = model.head
        if isinstance(head, nn.Linear):
            return [(head, lambda tokens: 2 * tokens * head.weight.numel())]
    return []
