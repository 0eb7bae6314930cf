"""Hugging Face transformers 5: ViT, DeiT, DINOv2, SigLIP and CLIP vision models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as dinov2_reg
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from ..attention import Attention, split_heads
from ..block import Block, BlockNames
from ..layout import image_grid
from ..stack import Flow, Stack, Step
from . import Encoder, check_attributes, check_children, check_class, check_hooks

_VIT = BlockNames(
    "layernorm_before", "attention", ("dropout",), "layernorm_after", "mlp", ("dropout",)
)
_DINOV2 = BlockNames(
    "norm1",
    "attention",
    ("layer_scale1", "drop_path"),
    "norm2",
    "mlp",
    ("layer_scale2", "drop_path"),
)
_CLIP = BlockNames("layer_norm1", "self_attn", (), "layer_norm2", "mlp", ())


class Family(NamedTuple):
    """A host model, and what there is in it."""

    model: type[nn.Module]
    layer: type[nn.Module]
    attention: type[nn.Module]
    names: BlockNames
    container: str
    convolution: str
    prefix: int


FAMILIES = [
    Family(
        vit.ViTModel, vit.ViTLayer, vit.ViTAttention, _VIT,
        "layers", "embeddings.patch_embeddings.projection", 1,
    ),
    Family(
        deit.DeiTModel, deit.DeiTLayer, deit.DeiTAttention, _VIT,
        "layers", "embeddings.patch_embeddings.projection", 2,
    ),
    Family(
        dinov2.Dinov2Model, dinov2.Dinov2Layer, dinov2.Dinov2Attention, _DINOV2,
        "encoder.layer", "embeddings.patch_embeddings.projection", 1,
    ),
    Family(
        dinov2_reg.Dinov2WithRegistersModel, dinov2_reg.Dinov2WithRegistersLayer,
        dinov2_reg.Dinov2WithRegistersAttention, _DINOV2,
        "encoder.layer", "embeddings.patch_embeddings.projection", 1,
    ),
    Family(
        siglip.SiglipVisionModel, siglip.SiglipEncoderLayer, siglip.SiglipAttention, _CLIP,
        "encoder.layers", "embeddings.patch_embedding", 0,
    ),
    Family(
        clip.CLIPVisionModel, clip.CLIPEncoderLayer, clip.CLIPAttention, _CLIP,
        "encoder.layers", "embeddings.patch_embedding", 1,
    ),
]  # fmt: skip

#: Arguments that hosts hand to their layers, and that say nothing about attention.
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"}
_HARMLESS |= {"use_cache", "labels"}
_FLAGS = {"config", "num_attention_heads", "num_heads", "embed_dim", "head_dim", "is_causal"}
_FLAGS |= {"attention_dropout", "dropout", "scaling", "scale"}


class SeparateAttention(Attention):
    """A projection each for Q, K and V; a sharing layer leaves those of Q and K alone."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, host: nn.Module, shares: bool, layer: int) -> None:
        flags = vars(host)
        heads = flags.get("num_attention_heads", flags.get("num_heads"))
        scale = flags.get("scaling", flags.get("scale"))
        super().__init__(host, shares=shares, layer=layer, heads=heads, scale=scale)  # type: ignore
        self.dropout: float = flags.get("attention_dropout", flags.get("dropout", 0.0))
        self.output = "o_proj" if hasattr(host, "o_proj") else "out_proj"

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(split_heads(t, self.num_heads) for t in (q, k, v))  # type: ignore

    def project_values(self, x: Tensor) -> Tensor:
        return split_heads(self.v_proj(x), self.num_heads)

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.v_proj.weight, self.v_proj.bias

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.output_projection(out)

    @property
    def output_projection(self) -> nn.Linear:
        return getattr(self, self.output)

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def unused(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj")


class HubStep(Step):
    """A layer of a host's loop, which also hands its own arguments to each layer."""

    _stack: HubStack

    def __call__(  # type: ignore[override]
        self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        for name, value in kwargs.items():
            if name not in _HARMLESS and value is not None:
                raise ValueError(f"{name}: got {value!r} for a converted model, expected None")
        stack, flow = self._stack, self._flow
        if self._index == 0 and stack.wants_attentions(kwargs):
            flow.open(stack.tap)
        if stack.gradient_checkpointing and stack.training:
            return stack.checkpointed(flow, self._index, x, attention_mask)
        return flow.run(self._index, x, attention_mask)


class HubStack(Stack):
    """A stack for transformers' models: their outputs and their gradient checkpointing.

    Checkpointing takes a group (a layer that attends and those that share its map) as one: its
    map is computed again in the backward pass, not kept.
    """

    config: Any
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable

    def __init__(self, host: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(host, *args, **kwargs)
        first: Any = self.block(0)._host[0]  # type: ignore[index]
        self.config = first._modules[self.block(0).names.attention].config
        self.tap = _TAPS[type(first)]()
        self.tap.requires_grad_(False)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))

    def steps(self) -> list[Step]:
        flow = Flow(self)
        return [HubStep(self, i, flow) for i in range(len(self))]

    def wants_attentions(self, kwargs: dict[str, Any]) -> bool:
        asked = kwargs.get("output_attentions")
        return bool(getattr(self.config, "output_attentions", False) if asked is None else asked)

    def checkpointed(self, flow: Flow, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """The first layer of a group runs all of it; the others hand out what came of that."""
        if self.donors[index] != index:
            before, ready = flow.ready.pop(0)
            if before is not x:
                raise ValueError(
                    f"layer {index + 1}: got tokens that aren't those of layer {index}, expected "
                    f"those: under gradient checkpointing layers that share a map run as one"
                )
            return ready
        group = next(group for group in self.groups if group[0] == index)

        def run(x: Tensor) -> tuple[Tensor, ...]:
            outs = [x]
            for i in group:
                outs.append(flow.run(i, outs[-1], mask))
            return tuple(outs[1:])

        outs = self._gradient_checkpointing_func(run, x)
        flow.ready = list(itertools.pairwise(outs))
        return outs[0]


class MapTap(nn.Module):
    """Nothing but a place that transformers' hooks look at when attention maps are asked for."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, attention_map: Tensor) -> tuple[None, Tensor]:
        return None, attention_map


def _as(base: type, host: type) -> type:
    """A subclass of ``base`` that also passes as a ``host``: by their classes transformers knows
    which modules to take hidden states and attention maps from, and how to wrap layers."""
    name = f"PSViT{host.__name__}"
    made = type(name, (base, host), {"__module__": __name__, "__doc__": base.__doc__})
    # transformers wraps the forward of each subclass of a layer, or its call (5.20), with
    # checkpointing of its own.
    made.forward = base.forward  # type: ignore[attr-defined]
    made.__call__ = base.__call__  # type: ignore[method-assign]
    globals()[name] = made  # where pickle looks for it
    return made


_BLOCKS = {family.layer: _as(Block, family.layer) for family in FAMILIES}
_TAPS = {family.layer: _as(MapTap, family.attention) for family in FAMILIES}


def encoder(module: nn.Module, model: nn.Module) -> Encoder | None:
    """What there is to convert in a module, or None if it is no host of this library."""
    family = next((family for family in FAMILIES if type(module) is family.model), None)
    if family is None:
        return None
    path, _, attribute = family.container.rpartition(".")
    owner = module.get_submodule(path)
    container = getattr(owner, attribute)
    if not isinstance(container, Stack):
        check_class(family.container, container, nn.ModuleList)
        for name, layer in container.named_children():
            _check_layer(f"{family.container}.{name}", layer, family)
    convolution = module.get_submodule(family.convolution)
    assert isinstance(convolution, nn.Conv2d)
    config: Any = module.config
    size = config.image_size
    h, w = size if isinstance(size, (list, tuple)) else (size, size)
    patch_h, patch_w = convolution.stride
    return Encoder(
        host=module,
        owner=owner,
        attribute=attribute,
        prefix=family.prefix + getattr(config, "num_register_tokens", 0),
        grid=(h // patch_h, w // patch_w),
        embedding=convolution,
        measure=image_grid,
        convolution=convolution,
        names=family.names,
        attention=SeparateAttention,
        whole=_whole(model),
        block=lambda layer: _BLOCKS[type(layer)],
        stack=HubStack,
        heads=_heads(module),
    )


def after_conversion(model: nn.Module, stack: Stack) -> None:
    _hook_again(model)


def after_restoration(model: nn.Module) -> None:
    _hook_again(model)


def _hook_again(model: nn.Module) -> None:
    """Output hooks, if transformers has put some, go: it puts them on the modules there now."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if _is_capture(hook):
                del module._forward_hooks[key]
        if getattr(module, "_output_capturing_hooks_installed", False):
            module._output_capturing_hooks_installed = False  # type: ignore[assignment]


def _is_capture(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _whole(model: nn.Module) -> str | None:
    name = type(model).__name__
    needs_all = name.endswith(("ForMaskedImageModeling", "Backbone"))
    return f"{name} reads every patch of the grid" if needs_all else None


def _check_layer(where: str, layer: nn.Module, family: Family) -> None:
    names = family.names
    check_class(where, layer, family.layer)
    parts = (names.norm1, names.norm2, names.mlp, *names.after_attention, *names.after_mlp)
    check_children(where, layer, {**dict.fromkeys(parts), names.attention: family.attention})
    flags = {"embed_dim", "gradient_checkpointing", "_gradient_checkpointing_func"}
    check_attributes(where, layer, flags)
    where, attn = f"{where}.{names.attention}", getattr(layer, names.attention)
    output = "o_proj" if hasattr(attn, "o_proj") else "out_proj"
    check_children(where, attn, dict.fromkeys(("q_proj", "k_proj", "v_proj", output)))
    check_attributes(where, attn, _FLAGS)
    if attn.is_causal:
        raise ValueError(f"model: {where}.is_causal is True, expected False")
    check_hooks(where, attn, harmless=_is_capture)


def _heads(model: nn.Module) -> list:
    """SigLIP's pooling head attends to every token."""
    head = getattr(model, "head", None)
    if not isinstance(head, siglip.SiglipMultiheadAttentionPoolingHead):
        return []
    width = head.attention.embed_dim

    def flops(tokens: int) -> int:
        mlp = sum(m.weight.numel() for m in head.mlp.modules() if isinstance(m, nn.Linear))
        # Q and the output projection of one query, K and V of every token, the core, the MLP.
        return 2 * (2 * width**2 + 2 * tokens * width**2 + 2 * tokens * width + mlp)

    return [(head, flops)]
