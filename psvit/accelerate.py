"""``accelerate`` puts a schedule on a vision transformer that exists; ``restore`` takes it off."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import nn

from . import adapters
from .block import Block
from .layout import GridSource, RecordGrid
from .merging import merge_counts
from .pooling import CARRYING, GridPool, Kind
from .schedule import ATTEND, Schedule
from .stack import Stack, find_stack
from .token_map import Pool

if TYPE_CHECKING:
    from .slimming.method import Method

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    schedule: str | Schedule,
    *,
    pool: Kind = "max",
    dims: Literal[1, 2] = 2,
    size_bias: bool = False,
    merge: int | Sequence[int] | str = 0,
    protect: float = 0.0,
    strip: bool = False,
    inplace: bool = False,
) -> Model:
    """Converts a vision transformer to share attention maps and pool tokens, as a schedule says.

    The container of the host's layers is replaced; everything else stays the host's own: its
    forward, its embeddings and heads, the modules inside its layers, which keep their names.
    State dicts of the host fit the converted model and the other way round, but for a learned
    pool ("conv"), whose weights have keys of their own.

    Args:
        model: from timm, transformers or torchvision; or a model with one such encoder in it.
        schedule: one character a layer, for example ``"AASA|ASAS|ASSS"``: see ``Schedule``.
        pool: "max", "avg", "stride" (every second token of each row and column) or "conv" (a
            learned depthwise convolution, which starts as an average); windows of 3, stride 2.
            After "avg" and "stride" a layer may share the map of one before: it follows the tokens.
        dims: 2 pools the grid of patches, 1 the sequence of them. Prefix tokens (class,
            distillation, registers) pass beside either, since heads look for them by place.
        size_bias: add the log of the number of patches that a pooled token stands for to its key,
            so that prefix tokens are not overweighted.
        merge: how many tokens are merged with the one most like them, in each layer between
            attention and MLP; or a number for each layer; or a text as "0.57": the fewest in every
            layer that leave so much of the FLOPs that the model has without schedule. At most half
            of the patches left can be merged. One number for all leaves out layers before a pool,
            which needs a grid. A map that later layers share follows the tokens.
        protect: how much what the class token pays to a patch keeps it from being merged: off the
            cosine of each pair goes this times what is paid to the patch that would join the other,
            over the mean of all patches. 0: as in Token Merging; ``psvit.plan`` finds what loses
            least.
        strip: drop the Q and K parameters of sharing layers. Saves memory, for deployment: state
            dicts no longer fit the host, and ``restore`` can't bring them back.
        inplace: convert ``model`` itself instead of a copy.

    Returns:
        The converted model, in the same mode (train or eval). In a layer that shares, parameters
        for Q and K alone get ``requires_grad=False``, until ``restore``.

    Raises:
        ValueError: a model that psvit doesn't know, or with parts that it doesn't know, by name;
            one that is converted already; a schedule that is none or has another depth; a pool
            or merging where the host needs every token, merging where it can't be. Nothing is
            changed then.
        TypeError: not a module, not a schedule.

    Warns:
        UserWarning: if the schedule shares or pools. Pretrained weights then compute something
        else: fine-tune, best with the original model as a teacher.

    Source: PSViT, arXiv 2108.03428; Token Merging, arXiv 2210.09461.
    """
    fast = convert_quietly(
        model,
        schedule,
        pool=pool,
        dims=dims,
        size_bias=size_bias,
        merge=merge,
        protect=protect,
        strip=strip,
        inplace=inplace,
    )
    stack = find_stack(fast)
    if any(stack.merge):
        _warn_of_halves(fast, stack, pool, dims)
    if not stack.schedule.is_plain:
        warnings.warn(
            f'schedule "{stack.schedule}" changes what the model computes: on pretrained weights '
            f"expect other outputs until you fine-tune (choose layers to share with "
            f"psvit.analyze)",
            stacklevel=2,
        )
    return fast


def convert_quietly(
    model: Model,
    schedule: str | Schedule,
    *,
    pool: Kind = "max",
    dims: Literal[1, 2] = 2,
    size_bias: bool = False,
    merge: int | Sequence[int] | str = 0,
    protect: float = 0.0,
    strip: bool = False,
    inplace: bool = False,
) -> Model:
    """As ``accelerate``, without its warnings: for those who see to what they warn of."""
    encoder = find_unconverted(model)
    schedule = Schedule.parse(schedule, depth=len(encoder.layers), carried=pool in CARRYING)
    if schedule.pools and encoder.whole is not None:
        raise ValueError(f'schedule "{schedule}": pools tokens, but {encoder.whole}')
    if isinstance(merge, str):
        merge = _merge_for(merge, model, schedule, pool, dims)
    counts = merge_counts(merge, schedule)
    if any(counts) and encoder.whole is not None:
        raise ValueError(f"merge: got {merge}, but {encoder.whole}")
    if not isinstance(protect, (int, float)) or not 0 <= protect < float("inf"):
        raise ValueError(f"protect: got {protect!r}, expected a number from 0 up")
    if protect and not encoder.has_class_token:
        raise ValueError(f"protect: got {protect}, expected 0 in a model without a class token")
    _pools(encoder, schedule, pool, dims)  # whether they can be made
    if not inplace:
        model = copy.deepcopy(model)
        encoder = adapters.find(model)
    pools = _pools(encoder, schedule, pool, dims)
    convert(
        encoder,
        schedule,
        pools,
        size_bias=size_bias,
        merge=counts,
        protect=protect,
        strip=strip,
    )
    return model


def find_unconverted(model: nn.Module) -> adapters.Encoder:
    """The encoder in a host's model, as ``adapters.find``.

    Raises:
        ValueError: one that is converted already, too.
    """
    encoder = adapters.find(model)
    if isinstance(encoder.container, Stack):
        _check_converted(model, encoder.container)
        raise ValueError(
            f'model: is converted already, to schedule "{encoder.container.schedule}"; '
            f"call psvit.restore on it first"
        )
    return encoder


def restore(model: Model) -> Model:
    """Undoes ``accelerate``, in place: the host's own layers, with their parameters as they are.

    Raises:
        ValueError: a model that isn't converted, or one whose Q and K were dropped by
            ``strip=True``.
    """
    encoder = adapters.find(model)
    stack = encoder.container
    if not isinstance(stack, Stack):
        raise ValueError(
            f"model: got {type(model).__name__} that isn't converted, expected one that is"
        )
    _check_converted(model, stack)
    blocks = [stack.block(i) for i in range(len(stack))]
    stripped = [str(b.layer + 1) for b in blocks if b.attention_layer.stripped]
    if stripped:
        raise ValueError(
            f"model: was converted with strip=True, which dropped Q and K of layers "
            f"{', '.join(stripped)}; load the original model again"
        )
    setattr(encoder.owner, encoder.attribute, stack.restored())
    hooks = encoder.embedding._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, RecordGrid)]:
        del hooks[key]
    _finish(encoder, "after_restoration", encoder.host)
    return model


def _merge_for(
    text: str, model: nn.Module, schedule: Schedule, pool: Kind, dims: Literal[1, 2]
) -> int:
    """The fewest pairs in each layer that leave so much of the FLOPs."""
    try:
        wanted = float(text)
    except ValueError:
        wanted = -1.0
    if not 0 < wanted <= 1:
        raise ValueError(f'merge: got "{text}", expected a part of the FLOPs above 0, as "0.57"')
    whole = Schedule(ATTEND * schedule.depth).flops(model)
    before, r = float("inf"), 0
    part = schedule.flops(model, pool=pool, dims=dims) / whole
    while wanted < part < before:  # until no more can be merged
        r += 1
        before, part = part, schedule.flops(model, pool=pool, dims=dims, merge=r) / whole
    if part <= wanted:
        return r
    raise ValueError(f'merge: got "{text}", but merging all that can be leaves {part:.3f}')


def _warn_of_halves(fast: nn.Module, stack: Stack, pool: Kind, dims: Literal[1, 2]) -> None:
    """Says once that in some layers fewer tokens are merged than was asked for."""
    rows = stack.schedule.rows(fast, pool=pool, dims=dims, merge=stack.merge)[1:-1]
    for i, (row, r) in enumerate(zip(rows, stack.merge, strict=True)):
        patches = row.tokens - stack.prefix
        if r > patches // 2:
            warnings.warn(
                f"merge: {r} in layer {i + 1} is more than half of the {patches} patches left "
                f"there; {patches // 2} are merged",
                stacklevel=3,
            )
            return


def _check_converted(model: nn.Module, stack: Stack) -> None:
    if stack.built:
        raise ValueError(
            f"model: got {type(model).__name__}, which was made for its schedule "
            f'"{stack.schedule}", expected a host\'s model; for another schedule make another PSViT'
        )


def _pools(
    encoder: adapters.Encoder, schedule: Schedule, kind: Kind, dims: Literal[1, 2]
) -> list[GridPool]:
    width = encoder.convolution.out_channels
    like = encoder.convolution.weight
    GridPool(kind, dims=dims, width=width)  # an unknown kind is an error without pools too
    return [
        GridPool(kind, dims=dims, width=width).to(like.device, like.dtype) for _ in schedule.pools
    ]


def convert(
    encoder: adapters.Encoder,
    schedule: Schedule,
    pools: Sequence[Pool] = (),
    *,
    size_bias: bool = False,
    merge: tuple[int, ...] = (),
    protect: float = 0.0,
    strip: bool = False,
    slimming: Method | None = None,
) -> None:
    """Puts a stack in a host's place. Everything is checked by now; the host changes in the last
    lines only."""
    blocks: dict[str, Block] = {}
    for i, (name, layer) in enumerate(encoder.layers.items()):
        host = getattr(layer, encoder.names.attention)
        attention = encoder.attention(host, schedule.donors[i] != i, i)
        if strip and attention.shares:
            attention.strip()
        cls = encoder.block(layer)
        blocks[name] = cls(layer, encoder.names, attention, schedule.donors[i])
    source = GridSource()
    stack = encoder.stack(
        encoder.container,
        blocks,
        schedule,
        prefix=encoder.prefix,
        grid=source,
        pools=pools,
        size_bias=size_bias,
        merge=merge,
        protect=protect,
        slimming=slimming,
    )
    setattr(encoder.owner, encoder.attribute, stack)
    encoder.embedding.register_forward_hook(RecordGrid(source, encoder.measure))
    _finish(encoder, "after_conversion", encoder.host, stack)


def _finish(encoder: adapters.Encoder, when: str, *args: object) -> None:
    adapter = importlib.import_module(encoder.attention.__module__)
    getattr(adapter, when)(*args)
