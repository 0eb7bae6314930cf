"""PSViT models to train from scratch: presets by name, and a constructor for any schedule.

They take patch embedding, MLP, norms, drop path and head from timm, which is an optional
dependency: importing this package needs none of it, making a model does.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from .presets import PRESETS, Preset

if TYPE_CHECKING:
    from .vit import PSViT

__all__ = ["PRESETS", "PSViT", "Preset", "create_model"]


def create_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] = 224, **options: Any
) -> PSViT:
    """A preset with random weights, as timm's ``create_model`` would make it.

    Args:
        name: one of ``psvit.models.PRESETS``: ``psvit_{1d,2d}_{tiny,small,base}`` cost what DeiT
            of that size costs, those ending in ``_deit`` have its depth and width.
        num_classes: 0: features instead of class scores.
        img_size: pixels, one number or (height, width).
        options: of ``PSViT``, for example ``patch_size=4`` or ``drop_path_rate=0.1``.

    Raises:
        ValueError: an unknown name, or what ``PSViT`` refuses.
        ImportError: timm isn't installed.

    Source: PSViT, arXiv 2108.03428. Reproductions: the paper's code and schedules are not public.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ValueError(
            f'name: got "{name}", expected one of {", ".join(PRESETS)}'
            + (f"; did you mean {near[0]}?" if near else "")
        )
    _need_timm()
    import timm

    from . import registration

    registration.register()
    model: Any = timm.create_model(name, num_classes=num_classes, img_size=img_size, **options)
    return model


def __getattr__(name: str) -> Any:
    if name == "PSViT":  # a subclass of timm's model: only here is timm needed
        _need_timm()
        from .vit import PSViT

        return PSViT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _need_timm() -> None:
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "psvit's models take their patch embedding, MLP and head from timm, which can't be "
            f'imported ({error}); run: pip install "psvit[timm]"'
        ) from error
