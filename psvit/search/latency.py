"""Latency of a candidate as the sum of its parts, each of them measured on this machine once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from ..attention import MapSlot
from ..latency_cache import medians
from ..schedule import POOL, Schedule
from ..timing import waiting
from .space import Candidate, SearchSpace

Name = Literal["embedding", "attends", "donates", "shares", "pool", "head"]

#: What a layer does: it attends alone, or makes the map that others share, or shares. And a stage
#: whose layers do these, in this order.
_LAYERS: tuple[Name, ...] = ("attends", "donates", "shares")
_STAGE = "AAS"


class Part(NamedTuple):
    """What the table has an entry for.

    Args:
        name: of the part; a pool is that before its stage, the head has the last norm in it.
        stage: counted from 0.
        width: of the stage.
        before: width of the stage before, for a pool.
    """

    name: Name
    stage: int
    width: int
    before: int = 0


def parts_of(candidate: Candidate) -> Iterator[Part]:
    """Every part of a candidate, as often as it has it."""
    schedule, widths = candidate.schedule, candidate.widths
    yield Part("embedding", 0, widths[0])
    for group in schedule.groups:
        stage = sum(pool <= group[0] for pool in schedule.pools)
        yield Part("donates" if len(group) > 1 else "attends", stage, widths[stage])
        for _ in group[1:]:
            yield Part("shares", stage, widths[stage])
    for stage, (before, width) in enumerate(itertools.pairwise(widths), 1):
        yield Part("pool", stage, width, before)
    yield Part("head", len(widths) - 1, widths[-1])


def parts_of_all(space: SearchSpace) -> Iterator[Part]:
    """Each part that some candidate has, once."""
    for width in space.widths[0]:
        yield Part("embedding", 0, width)
    for stage, (depths, widths) in enumerate(zip(space.depths, space.widths, strict=True)):
        shared = space.sharing and max(depths) > 1
        for name, width in itertools.product(_LAYERS if shared else _LAYERS[:1], widths):
            yield Part(name, stage, width)
        if stage:
            for before, width in itertools.product(space.widths[stage - 1], widths):
                yield Part("pool", stage, width, before)
    for width in space.widths[-1]:
        yield Part("head", len(space.widths) - 1, width)


class LatencyTable:
    """Milliseconds of each part; called with a candidate, their sum.

    Args:
        entries: by part.
    """

    def __init__(self, entries: Mapping[Part, float]) -> None:
        self.entries = dict(entries)

    def __call__(self, candidate: Candidate) -> float:
        return sum(self.entries[part] for part in parts_of(candidate))

    def rows(self) -> list[list[Any]]:
        """Plain values, for ``of_rows``."""
        return [[*part, ms] for part, ms in self.entries.items()]

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[Any]]) -> LatencyTable:
        return cls({Part(*part): ms for *part, ms in rows})

    @classmethod
    def measured(
        cls,
        space: SearchSpace,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        seconds: float = 10.0,
        step: Callable[[float], object] = lambda part: None,
    ) -> LatencyTable:
        """The table that a space needs, in float32; parts measured earlier aren't measured again.

        Args:
            batch: images in each call.
            device: "cpu", with as many threads as PyTorch has now, or "cuda".
            seconds: of measuring, about.
            step: called with the part of the work done, for a progress bar.
        """
        device = torch.device(device)
        labels = {
            part: f"{_label(space, part)}, float32, batch {batch}" for part in parts_of_all(space)
        }
        probes = {
            label: partial(_probe, space, part, batch, device) for part, label in labels.items()
        }
        found = medians(probes, device, seconds=seconds, step=step)
        return cls({part: found[label] for part, label in labels.items()})


# --- measuring ------------------------------------------------------------------------------


def _label(space: SearchSpace, part: Part) -> str:
    """All that a part's latency depends on, but for the machine."""
    layout = space.layouts[part.stage - (part.name == "pool")]
    grid = " x ".join(map(str, layout.grid))
    tokens = f"{layout.prefix} + {grid} tokens"
    arguments = space.arguments()
    chosen: dict[str, tuple[str, ...]] = {
        "embedding": ("img_size", "patch_size", "in_chans"),
        "pool": ("pool", "dims"),
        "head": ("num_classes", "dims"),
    }
    names = chosen.get(part.name, ("head_dim", "mlp_ratio"))
    width = f"{part.before} to {part.width}" if part.name == "pool" else str(part.width)
    texts = (f"{name} {arguments[name]}" for name in names)
    return ", ".join([part.name, f"width {width}", tokens, *texts])


def _probe(
    space: SearchSpace, part: Part, batch: int, device: torch.device
) -> Callable[[], object]:
    """A function that runs the part alone, in a model of which nothing else is kept."""
    widths = [choices[0] for choices in space.widths]
    widths[part.stage] = part.width
    if part.before:
        widths[part.stage - 1] = part.before
    schedule = Schedule(POOL.join([_STAGE] * len(widths)))
    model = space.model(Candidate(schedule, tuple(widths)), device=device).eval()
    return waiting(_run(model, part, space, batch, device), device)


def _run(
    model: Any, part: Part, space: SearchSpace, batch: int, device: torch.device
) -> Callable[[], object]:
    if part.name == "embedding":
        height, width = model.patch_embed.img_size
        images = torch.randn(batch, space.in_chans, height, width, device=device)
        return lambda: model._pos_embed(model.patch_embed(images))
    layout = space.layouts[part.stage - (part.name == "pool")]
    x = torch.randn(batch, layout.tokens, part.before or part.width, device=device)
    if part.name == "pool":
        pool = model.blocks.pool(part.stage - 1)
        return lambda: pool.reduce(x, layout)
    if part.name == "head":
        return lambda: model.forward_head(model.norm(x))
    first = len(_STAGE) * part.stage
    slot = MapSlot(reuses=1)
    with torch.inference_mode():
        model.blocks.block(first + 1)(x, slot=slot)  # makes the map that a sharing layer applies
    block = model.blocks.block(first + _LAYERS.index(part.name))
    own = None if part.name == "attends" else slot
    return lambda: block(x, slot=own)
