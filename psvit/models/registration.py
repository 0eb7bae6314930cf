"""Tells timm the names of the presets, as soon as somebody imports timm, and not before.

timm takes longer to import than psvit; who works with another library shouldn't wait for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..schedule import Schedule
from .presets import PRESETS, Preset

_REGISTRY = "timm.models"

#: What timm's training script asks of a model, where its arguments don't say otherwise. There are
#: no weights; the normalisation is DeiT's.
default_cfgs: dict[str, dict[str, Any]] = {
    name: {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }
    for name in PRESETS
}


def register() -> None:
    """Adds the presets to timm's registry, once."""
    from timm.models import is_model, register_model

    for name, preset in PRESETS.items():
        if not is_model(name):
            register_model(_entry(name, preset))


def register_when_imported() -> None:
    """Registers now if timm is there already, else after its import, if that ever comes."""
    if _REGISTRY in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Watch())


def _entry(name: str, preset: Preset) -> Callable[..., Any]:
    def make(pretrained: bool = False, **options: Any) -> Any:
        from timm.models import build_model_with_cfg

        from .vit import PSViT

        last = tuple(stage[-1] for stage in Schedule(preset.schedule).stages)
        return build_model_with_cfg(
            PSViT,
            name,
            pretrained,
            feature_cfg={"out_indices": last, "feature_cls": "getter"},
            **{**preset.arguments(), **options},
        )

    make.__name__ = make.__qualname__ = name
    kind = "at DeiT's depth and width" if name.endswith("_deit") else "at DeiT's cost"
    make.__doc__ = f"PSViT-{preset.dims}D {kind} ({preset.peer}): a reproduction, no weights."
    return make


class _Watch(MetaPathFinder):
    """Finds nothing itself: it has the module's own loader call ``register`` when it is done."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader  # nothing of this stays behind
        self.loader.exec_module(module)
        register()
