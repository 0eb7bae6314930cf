"""What a PSViT's arguments must be, and what is said of those that don't fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..layout import Layout
from ..schedule import Schedule
from .pool import StagePool

Size = int | tuple[int, int]

_POOLINGS = ("token", "avg", "avgmax", "max", "")


def stage_widths(widths: int | Sequence[int], schedule: Schedule, head_dim: int) -> tuple[int, ...]:
    stages = len(schedule.stages)
    found = (widths,) * stages if isinstance(widths, int) else tuple(widths)
    if len(found) != stages:
        raise ValueError(
            f'widths: got {len(found)} ({", ".join(map(str, found))}) for schedule "{schedule}", '
            f"expected {stages}, one a stage"
        )
    for width in found:
        if width < 1 or width % head_dim:
            raise ValueError(f"widths: got {width}, expected a multiple of head_dim, {head_dim}")
    return found


def is_inside(prefix: str | None, dims: int) -> bool:
    if prefix not in (None, "inside", "beside"):
        raise ValueError(f'prefix: got "{prefix}", expected "inside" or "beside"')
    if prefix == "inside" and dims == 2:
        raise ValueError(
            'prefix: got "inside" for dims=2, expected "beside"; a class token has no place in '
            "the grid"
        )
    return dims == 1 and prefix != "beside"


def global_pooling(name: str | None, class_token: bool) -> str:
    if name is None:
        return "token" if class_token else "avg"
    known = _POOLINGS if class_token else _POOLINGS[1:]
    if name not in known:
        has = "a" if class_token else "no"
        raise ValueError(
            f'global_pool: got "{name}" for a model with {has} class token, expected one of '
            + ", ".join(f'"{pooling}"' for pooling in known)
        )
    return name


def stage_layouts(
    img_size: Size, patch_size: Size, prefix: int, pools: Sequence[StagePool]
) -> list[Layout]:
    """What the tokens of each stage are."""
    (height, width), (down, across) = pair(img_size), pair(patch_size)
    fits = height % down == 0 and width % across == 0
    layouts = _stages(height // down, width // across, prefix, pools) if fits else None
    if layouts is None:
        fewest = next(n for n in itertools.count(1) if _stages(n, n, prefix, pools))
        patch = str(down) if down == across else f"{down} (height) and {across} (width)"
        near = " or ".join(
            f"{n * down} x {m * across}" for n, m in _near(height / down, width / across, fewest)
        )
        raise ValueError(
            f"img_size: got {height} x {width}, expected multiples of {patch}, "
            f"from {fewest * down} x {fewest * across} on; next to it: {near}"
        )
    return layouts


def patch_layout(img_size: Size, patch_size: Size, prefix: int) -> Layout:
    (height, width), (down, across) = pair(img_size), pair(patch_size)
    return Layout(prefix, (height // down, width // across))


def _stages(h: int, w: int, prefix: int, pools: Sequence[StagePool]) -> list[Layout] | None:
    """None if a pool would find nothing to pool."""
    layouts = [Layout(prefix, (h, w))]
    for pool in pools:
        layouts.append(pool.reduced(layouts[-1]))
    fewer = all(after.tokens < before.tokens for before, after in itertools.pairwise(layouts))
    return layouts if fewer and h > 0 and w > 0 else None


def _near(h: float, w: float, fewest: int) -> list[tuple[int, int]]:
    sizes = [(max(fewest, f(h)), max(fewest, f(w))) for f in (math.floor, math.ceil)]
    return sorted(set(sizes))


def pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
