"""What a model costs that merges tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor, nn

from .. import adapters
from ..cost import layer_costs
from ..latency_cache import medians
from ..schedule import ATTEND, Schedule
from ..timing import waiting
from .costs import Conversion, LayerCosts, digest
from .front import Counts


class MergedFLOPs:
    """What a model costs that merges tokens, as a part of the original: FLOPs, from formulas.

    Args:
        model: the original.
        how: it is converted.
    """

    def __init__(self, model: nn.Module, how: Conversion) -> None:
        encoder = adapters.find(model)
        self.depth, self.prefix = len(encoder.layers), encoder.prefix
        self.rows = partial(layer_costs, model, pool=how.pool, dims=how.dims)
        self.plain = self._flops(Schedule(ATTEND * self.depth), ())

    def __call__(self, schedule: Schedule, merge: Counts) -> float:
        return self._flops(schedule, merge) / self.plain

    def _flops(self, schedule: Schedule, merge: Counts) -> int:
        return sum(row.flops for row in self.rows(schedule, merge=merge or 0))

    def tokens(self, schedule: Schedule, merge: Counts) -> list[int]:
        """That enter each layer."""
        return [row.tokens for row in self.rows(schedule, merge=merge or 0)[1:-1]]

    def patches(self, schedule: Schedule) -> int:
        """That can be merged: those left after the last pool."""
        return self.tokens(schedule, ())[-1] - self.prefix


class MergedLatency(MergedFLOPs):
    """The same of latency: layers cost what their numbers of tokens do, interpolated.

    Args:
        model, how: as before.
        layers: their costs without merging.
        halved: cost of whole models that merge half of their patches in the first layer, in the
            first two, and so on; without an entry where nothing is merged.
        each: of a model that merges one pair in each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Conversion,
        layers: LayerCosts,
        halved: Sequence[float],
        each: float,
    ) -> None:
        super().__init__(model, how)
        self.layers, self.merging = layers, max(0.0, each - 1) / self.depth
        counts = halves(self.patches(Schedule(ATTEND * self.depth)), len(halved))
        tokens = [self.patches(Schedule(ATTEND * self.depth)) + self.prefix]
        parts = [1.0]  # of what a layer with all tokens costs
        for merged, (total, count) in enumerate(zip(halved, counts, strict=True), 1):
            tokens.append(tokens[-1] - count)
            # A layer that merges costs what one does with the mean of its tokens before and after.
            mixed = sum(a + b for a, b in itertools.pairwise(parts)) / 2 + parts[-1] / 2
            rest = self.depth * (total - merged * self.merging) - mixed
            parts.append(rest / (self.depth - merged + 0.5))
        self.known = tokens[::-1], parts[::-1]

    def __call__(self, schedule: Schedule, merge: Counts) -> float:
        before, after = self.tokens(schedule, ()), self.tokens(schedule, merge)
        found = 0.0
        for stage, layers in enumerate(schedule.stages):
            for i in layers:
                entering = after[i : i + 2] if merge and merge[i] else after[i : i + 1]
                part = self._part(sum(entering) / len(entering)) / self._part(before[i])
                found += self.layers(schedule.kinds[i], stage) * part
        return found + self.merging * sum(r > 0 for r in merge)

    def _part(self, tokens: float) -> float:
        return float(np.interp(tokens, *self.known))


def halves(patches: int, count: int) -> Counts:
    """Pairs to merge so that half of what is left goes, so many times."""
    return tuple(patches // 2 ** (i + 1) for i in range(count))


def merged_latency(
    model: nn.Module,
    how: Conversion,
    layers: LayerCosts,
    images: Tensor,
    *,
    seconds: float = 5.0,
    step: Callable[[float], object] = lambda part: None,
) -> MergedLatency:
    """Measured as ``latency`` is.

    Args:
        layers: what that gave.
        model, how, images, seconds, step: as there.
    """
    flops = MergedFLOPs(model, how)
    schedule = Schedule(ATTEND * flops.depth)
    work = f"{how}, {digest(how.apply(model, schedule), images)}"
    most = min(3, flops.depth - 1)
    half = halves(flops.patches(schedule), most)
    merges = [(0,) * flops.depth, (1,) * flops.depth]
    merges += [half[:n] + (0,) * (flops.depth - n) for n in range(1, most + 1)]

    def probe(merge: Counts) -> Callable[[], object]:
        return waiting(partial(how.apply(model, schedule, merge), images), images.device)

    probes = {f"merge {merge}, {work}": partial(probe, merge) for merge in merges}
    found = medians(probes, images.device, seconds=seconds, step=step)
    plain, each, *halved = (found[label] for label in probes)
    return MergedLatency(model, how, layers, [ms / plain for ms in halved], each / plain)
