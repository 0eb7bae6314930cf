"""One small file for each host library: where its encoder is, and what its layers are made of.

An adapter looks at every part of every layer and refuses what it doesn't know, by name: a part
that is silently left out changes what a model computes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor, nn

from ..attention import Attention
from ..block import Block, BlockNames
from ..stack import Stack

#: Host library -> the families that its adapter knows.
FAMILIES: dict[str, tuple[str, ...]] = {
    "timm": (
        "VisionTransformer (ViT, DeiT, DINOv2, SigLIP, with registers, layer scale, q/k norm)",
        "VisionTransformerDistilled",
    ),
    "transformers": (
        "ViTModel",
        "DeiTModel",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
        "SiglipVisionModel",
        "CLIPVisionModel",
        "and models with one of them inside, as ViTForImageClassification",
    ),
    "torchvision": ("VisionTransformer (vit_b_16 and its like)",),
}


@dataclass
class Encoder:
    """What an adapter found in a model.

    Args:
        host: the module whose forward runs the encoder.
        owner, attribute: where its container of layers is.
        prefix: number of prefix tokens.
        grid: of patches, for the image size that the model is set up for.
        embedding: the module whose forward tells the grid of patches.
        measure: (h, w) of them, from that module, its arguments and its output.
        convolution: that makes patches.
        names: of a layer's children.
        attention: makes an ``Attention`` from a host's, as (host, shares, layer).
        whole: why tokens can't be pooled here, or None.
        block: class of the blocks that stand for a given layer.
        stack: class of the container.
        heads: modules after the encoder that see all of its tokens: (module, FLOPs of one image
            for a number of tokens).
    """

    host: nn.Module
    owner: nn.Module
    attribute: str
    prefix: int
    grid: tuple[int, int]
    embedding: nn.Module
    measure: Callable[[nn.Module, tuple, Tensor], tuple[int, int]]
    convolution: nn.Conv2d
    names: BlockNames
    attention: Callable[[nn.Module, bool, int], Attention]
    whole: str | None = None
    block: Callable[[nn.Module], type[Block]] = lambda layer: Block
    stack: type[Stack] = Stack
    heads: list[tuple[nn.Module, Callable[[int], int]]] = field(default_factory=list)

    @property
    def has_class_token(self) -> bool:
        return bool(getattr(self.host, "has_class_token", self.prefix > 0))

    @property
    def container(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The host's layers, or the blocks that stand for them, by name."""
        container = self.container
        if isinstance(container, Stack):
            return {name: container.block(i) for i, name in enumerate(container.block_names)}
        return dict(container.named_children())


def find(model: nn.Module) -> Encoder:
    """The one encoder in a model that an adapter knows, every layer of it checked.

    Raises:
        ValueError: none, more than one, or one with parts that its adapter doesn't know.
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    adapters = [_adapter(library) for library in FAMILIES if library in sys.modules]
    found: dict[str, Encoder] = {}
    for name, module in model.named_modules():
        for adapter in adapters:
            encoder = adapter.encoder(module, model)
            if encoder is not None:
                found[name or type(model).__name__] = encoder
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__}, which psvit doesn't know{_attention_in(model)}; "
            f"it knows {supported()}"
        )
    if len(found) > 1:
        raise ValueError(
            f"model: got {type(model).__name__} with {len(found)} encoders "
            f"({', '.join(found)}); expected one, pass the one you mean"
        )
    return next(iter(found.values()))


def supported() -> str:
    """The families that psvit knows, in words."""
    return "; ".join(f"{library}: {', '.join(names)}" for library, names in FAMILIES.items())


def _attention_in(model: nn.Module) -> str:
    """Where the first attention of a model is, of which class, and what psvit can't convert."""
    for name, module in model.named_modules():
        if name and any(word in type(module).__name__ for word in ("Attention", "Attn")):
            return (
                f" ({name} is a {_name(type(module))}; windows, rotary embedding and relative "
                f"positions can't be converted)"
            )
    return ""


def _adapter(library: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{library}")


# --- checks that adapters share -------------------------------------------------------------


def check_class(where: str, module: nn.Module, known: type | tuple[type, ...]) -> None:
    """Raises unless the module is of just these classes: a subclass may compute otherwise."""
    classes = known if isinstance(known, tuple) else (known,)
    if type(module) not in classes:
        raise ValueError(
            f"model: {where} is a {_name(type(module))}, "
            f"expected {' or '.join(_name(c) for c in classes)}"
        )


def check_children(
    where: str, module: nn.Module, known: Mapping[str, type | tuple[type, ...] | None]
) -> None:
    """Raises unless exactly these children are there, each of a class given (None: any class)."""
    names = dict(module.named_children())
    for name in names.keys() - known.keys():
        raise ValueError(
            f"model: {where}.{name} ({_name(type(names[name]))}) is a part that psvit doesn't "
            f"know; expected {', '.join(known)}"
        )
    for name, classes in known.items():
        if name not in names:
            raise ValueError(f"model: {where} has no {name}, expected {', '.join(known)}")
        if classes is not None:
            check_class(f"{where}.{name}", names[name], classes)


def check_attributes(where: str, module: nn.Module, known: Collection[str]) -> None:
    """Raises if the module has a flag that psvit doesn't know, and it isn't off (None or False)."""
    standard = vars(nn.Module()).keys() | {"_is_hf_initialized"}
    for name, value in vars(module).items():
        unknown = name not in standard and name not in known
        if unknown and value is not None and value is not False:
            raise ValueError(f"model: {where}.{name} = {value!r} is a flag that psvit doesn't know")
    for name, parameter in [*module._parameters.items(), *module._buffers.items()]:
        if name not in known and parameter is not None:
            raise ValueError(f"model: {where}.{name} is a parameter that psvit doesn't know")


def check_hooks(
    where: str, module: nn.Module, harmless: Callable[[object], bool] = lambda hook: False
) -> None:
    """Raises if a hook waits for a call that will not come, or will come with other arguments."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    hooks = [hook for kind in kinds for hook in kind.values() if not harmless(hook)]
    if hooks:
        raise ValueError(
            f"model: {where} has {len(hooks)} hooks, which a converted model would not call as "
            f"before; remove them, or put them on the layer or on the attention's children"
        )


def _name(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]} {cls.__name__}"
