"""One call for each method: ``evit``, ``evo_vit``, ``sit``."""

from __future__ import annotations

import copy
import itertools
import numbers
import warnings
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from ..accelerate import convert, find_unconverted
from ..adapters import Encoder
from ..schedule import ATTEND, POOL, Schedule
from .fuse import EViT
from .method import Method
from .query_pool import QueryPool
from .slow_fast import EvoViT

Model = TypeVar("Model", bound=nn.Module)


def evit(
    model: Model, keep: float = 0.7, layers: Sequence[int] | None = None, *, inplace: bool = False
) -> Model:
    """Converts a vision transformer to fuse the patches that its class token attends to least.

    Between attention and MLP of some layers the patches with the highest scores (attention of the
    class token, mean over heads) go on, and all others become one token, their mean weighted by
    the scores. No parameters are added. Features return to the grid of the patches as they do
    when tokens are merged (``psvit.record_merges``). ``psvit.restore`` undoes it.

    Args:
        model: from timm, transformers or torchvision, with a class token; or a model with one such
            encoder in it.
        keep: part of the patches that go on in each of the layers, rounded up; 1: all.
        layers: counted from 1; None: the first of the second, third and last quarter, which are
            4, 7 and 10 of 12, as in the paper.
        inplace: convert ``model`` itself instead of a copy.

    Raises:
        ValueError: a ``keep`` out of range, layers that aren't there or don't rise, a model
            without class token or one that needs every patch, and what ``psvit.accelerate``
            refuses. Nothing is changed then. When it runs: scores that are no numbers (not where a
            graph is traced or captured), a mask.

    Source: EViT, arXiv 2202.07800. The fused token is a mean there too, but its weights don't sum
    to 1 in the released code.
    """
    encoder = _with_class_token(model)
    _check_needs_few(encoder)
    depth = len(encoder.layers)
    chosen = _checked_layers(layers, [i * depth // 4 + 1 for i in (1, 2, 3)], 1, depth)
    return _slimmed(model, EViT(_checked_keep(keep), chosen), inplace)


def evo_vit(
    model: Model, keep: float = 0.5, layers: Sequence[int] | None = None, *, inplace: bool = False
) -> Model:
    """Converts a vision transformer to let only some patches, and a token for the rest, through.

    In front of some layers the patches with the highest scores (attention of the class token, over
    the layers before) are selected: they, and one token that stands for the others, go through
    the layers until the next selection. The others change as the one that stands for them, so
    that each patch has its token to the end. No parameters are added. ``psvit.restore`` undoes it.
    The paper's models average the patches at the end (timm's ``global_pool="avg"``).

    Args:
        model: as for ``evit``; one that needs every patch will do.
        keep: part of the patches that are selected, rounded down; 1: all.
        layers: in front of which patches are selected, counted from 1, from 2 up; None: after one
            and after two thirds, 5 and 9 of 12, the stage-wise form of the paper. Every layer from
            5 on is its layer-wise form, with which it begins to train.
        inplace: convert ``model`` itself instead of a copy.

    Raises:
        ValueError: as ``evit``.

    Source: Evo-ViT, arXiv 2108.01390.
    """
    encoder = _with_class_token(model)
    depth = len(encoder.layers)
    chosen = _checked_layers(layers, [i * depth // 3 + 1 for i in (1, 2)], 2, depth)
    return _slimmed(model, EvoViT(_checked_keep(keep), chosen), inplace)


def sit(
    model: Model,
    tokens: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    *,
    inplace: bool = False,
) -> Model:
    """Converts a vision transformer to slim its tokens between layers, by weights that are learned.

    A ``QueryPool`` stands in front of each of some layers. Its weights are new and random: nothing
    that the model gives means anything until it is trained, best with the original as its teacher
    (``psvit train``, ``psvit.slimming.Recalibration``). ``psvit.restore`` drops the pools.

    Args:
        model: as for ``evit``; a class token isn't needed.
        tokens: how many the patches become in front of each of the layers; None: half of those
            before, as in the paper.
        layers: counted from 1, from 2 up; None: as for ``evit``. (The paper's models are others:
            2, 3 and 4 of 14 layers, or 10, 13 and 15 of 16.)
        inplace: convert ``model`` itself instead of a copy.

    Raises:
        ValueError: tokens that don't get fewer, another number of them than of layers, layers that
            aren't there or don't rise, a model that needs every patch, and what
            ``psvit.accelerate`` refuses. Nothing is changed then.

    Warns:
        UserWarning: that the pools must be trained.

    Source: SiT, arXiv 2111.12624.
    """
    encoder = find_unconverted(model)
    _check_needs_few(encoder)
    depth = len(encoder.layers)
    chosen = _checked_layers(layers, [i * depth // 4 + 1 for i in (1, 2, 3)], 2, depth)
    counts = _checked_tokens(tokens, len(chosen), encoder)
    if not inplace:
        model = copy.deepcopy(model)
        encoder = find_unconverted(model)
    starts = (0, *(layer - 1 for layer in chosen), depth)
    schedule = Schedule(POOL.join(ATTEND * (b - a) for a, b in itertools.pairwise(starts)))
    like = encoder.convolution.weight
    pools = [QueryPool(len(like), count).to(like.device, like.dtype) for count in counts]
    convert(encoder, schedule, pools)
    warnings.warn(
        f"sit: {len(pools)} pools with random weights were put into the model, which means nothing "
        f"until it is trained",
        stacklevel=2,
    )
    return model


def _slimmed(model: Model, method: Method, inplace: bool) -> Model:
    model = model if inplace else copy.deepcopy(model)
    encoder = find_unconverted(model)
    convert(encoder, Schedule(ATTEND * len(encoder.layers)), slimming=method)
    return model


# --- checks ---------------------------------------------------------------------------------


def _with_class_token(model: nn.Module) -> Encoder:
    encoder = find_unconverted(model)
    if not encoder.has_class_token:
        raise ValueError(
            f"model: got {type(encoder.host).__name__} without a class token, expected one: its "
            f"attention tells which patches matter"
        )
    return encoder


def _check_needs_few(encoder: Encoder) -> None:
    if encoder.whole is not None:
        raise ValueError(f"model: patches would lose their tokens, but {encoder.whole}")


def _checked_keep(keep: float) -> float:
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep!r}, expected a part of the patches above 0, up to 1")
    return keep


def _checked_layers(
    layers: Sequence[int] | None, default: Sequence[int], least: int, depth: int
) -> tuple[int, ...]:
    found = tuple(default if layers is None else layers)
    whole = all(isinstance(layer, numbers.Integral) and least <= layer <= depth for layer in found)
    if not (found and whole and all(a < b for a, b in itertools.pairwise(found))):
        raise ValueError(
            f"layers: got {found}, expected at least one from {least} to {depth}, rising"
        )
    return found


def _checked_tokens(tokens: Sequence[int] | None, count: int, encoder: Encoder) -> tuple[int, ...]:
    h, w = encoder.grid
    found = tuple(h * w >> i for i in range(1, count + 1)) if tokens is None else tuple(tokens)
    whole = all(isinstance(number, numbers.Integral) and number >= 1 for number in found)
    fall = whole and all(a > b for a, b in itertools.pairwise((h * w, *found)))
    if len(found) != count or not fall:
        raise ValueError(
            f"tokens: got {found}, expected {count}, one for each of the layers, falling from "
            f"below the {h * w} patches"
        )
    return found
