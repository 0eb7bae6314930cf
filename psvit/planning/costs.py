"""What each layer of a model costs, by what it does and how many pools come before it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..accelerate import convert_quietly
from ..cost import layer_costs
from ..latency_cache import medians
from ..pooling import Kind
from ..schedule import ATTEND, POOL, SHARE, Schedule
from ..timing import waiting
from .front import Counts


@dataclass(frozen=True)
class Conversion:
    """How a model is converted, apart from its schedule: see ``psvit.accelerate``."""

    pool: Kind = "conv"
    dims: Literal[1, 2] = 2
    size_bias: bool = True
    protect: float = 0.0

    def apply(self, model: nn.Module, schedule: Schedule, merge: Counts = ()) -> nn.Module:
        """A converted copy, in eval mode."""
        return convert_quietly(model, schedule, merge=merge or 0, **asdict(self)).eval()


@dataclass(frozen=True)
class LayerCosts:
    """Parts of the cost of the original model, so that those of its own layers sum to 1.

    What isn't in a layer (embedding, head) is spread evenly over them; what a pool costs itself,
    little, over as many layers as came after it when that was found out.

    Args:
        attends, shares: by the number of pools before the layer.
    """

    attends: Sequence[float]
    shares: Sequence[float]

    def __call__(self, kind: str, stage: int) -> float:
        return (self.attends if kind == ATTEND else self.shares)[stage]

    def of(self, schedule: Schedule) -> float:
        """Of a whole model, as a part of the original's cost."""
        return sum(
            self(schedule.kinds[layer], stage)
            for stage, layers in enumerate(schedule.stages)
            for layer in layers
        )

    @classmethod
    def from_totals(cls, depth: int, pools: int, total: Callable[[Schedule], float]) -> LayerCosts:
        """From the costs of whole models, whose differences are those of layers.

        Args:
            depth: number of layers.
            pools: at most so many come before a layer.
            total: the cost of a model with a schedule, in any unit; asked once for each.
        """
        probes = _probes(depth, pools)
        totals = [(total(attending), total(sharing)) for attending, sharing in probes]
        plain = totals[0][0]
        attends: list[float] = []
        shares: list[float] = []
        for stage, (attending, sharing) in enumerate(totals):
            before = sum(attends)  # one layer stands before each pool
            attends.append((attending / plain - before) / (depth - stage))
            saved = (attending - sharing) / plain / probes[stage][1].shared
            shares.append(attends[-1] - saved)
        return cls(tuple(attends), tuple(shares))


def _probes(depth: int, pools: int) -> list[tuple[Schedule, Schedule]]:
    """For each stage whose costs are told apart: every layer attends; every second one shares.

    The pools, as many as there are layers for, stand as early as can be.
    """
    found = []
    for stage in range(min(pools + 1, depth - 1)):
        start, rest = f"{ATTEND}{POOL}" * stage, depth - stage
        sharing = ((ATTEND + SHARE) * rest)[:rest]
        found.append((Schedule(start + ATTEND * rest), Schedule(start + sharing)))
    return found


def flops(model: nn.Module, how: Conversion, depth: int, *, pools: int) -> LayerCosts:
    """From the formulas of ``psvit.cost``; with so many pools at most."""

    def total(schedule: Schedule) -> float:
        return sum(r.flops for r in layer_costs(model, schedule, pool=how.pool, dims=how.dims))

    return LayerCosts.from_totals(depth, pools, total)


def latency(
    model: nn.Module,
    how: Conversion,
    depth: int,
    images: Tensor,
    *,
    pools: int,
    seconds: float = 10.0,
    step: Callable[[float], object] = lambda part: None,
) -> LayerCosts:
    """Measured on this machine once, on these images as one batch, the models in turn; medians.

    Args:
        model, how, depth: the model, how it is converted, and its number of layers.
        images: `(B, channels, height, width)`, on the device of the model.
        pools: at most so many.
        seconds: of measuring, about.
        step: called with the part of the work done, for a progress bar.
    """
    work = f"{how}, {digest(how.apply(model, Schedule(ATTEND * depth)), images)}"

    def label(schedule: Schedule) -> str:
        return f"{schedule}, {work}"

    def probe(schedule: Schedule) -> Callable[[], object]:
        return waiting(partial(how.apply(model, schedule), images), images.device)

    schedules = itertools.chain.from_iterable(_probes(depth, pools))
    probes = {label(schedule): partial(probe, schedule) for schedule in schedules}
    times = medians(probes, images.device, seconds=seconds, step=step)
    return LayerCosts.from_totals(depth, pools, lambda schedule: times[label(schedule)])


def digest(model: nn.Module, images: Tensor) -> str:
    """Of what a model's latency depends on: its parts with their shapes and dtypes, no values."""
    weights = [(name, x.shape, x.dtype) for name, x in model.state_dict().items()]
    parts = hashlib.sha256(f"{model} {weights}".encode()).hexdigest()[:16]
    return f"{type(model).__name__} {parts}, images {tuple(images.shape)}, {images.dtype}"
