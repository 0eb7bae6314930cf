"""What a search chooses from: the depth, the width and the sharing layers of each stage."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..layout import Layout
from ..models.arguments import Size
from ..numbers import check_number
from ..schedule import ATTEND, POOL, SHARE, Schedule

if TYPE_CHECKING:
    from ..models import PSViT
    from ..models.pool import StageKind


class Stage(NamedTuple):
    """``A`` or ``S`` of each of its layers, and its width."""

    kinds: str
    width: int


@dataclass(frozen=True)
class Candidate:
    """One model of a space; prints as ``AAS|AS 32,48``."""

    schedule: Schedule
    widths: tuple[int, ...]

    @classmethod
    def of(cls, stages: Iterable[Stage]) -> Candidate:
        kinds, widths = zip(*stages, strict=True)
        return cls(Schedule(POOL.join(kinds)), widths)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(map(Stage, self.schedule.text.split(POOL), self.widths))

    def __str__(self) -> str:
        return f"{self.schedule} {','.join(map(str, self.widths))}"


@dataclass(frozen=True)
class SearchSpace:
    """All PSViT models whose stages have one of some depths and one of some widths each.

    The pools stand between the stages, so their places follow from the depths. Any layer but the
    first of its stage may share.

    Args:
        depths: for each stage the numbers of layers that it may have.
        widths: for each stage the channels that it may have, multiples of ``head_dim``.
        sharing: False: every layer attends.
        dims, pool, head_dim, mlp_ratio, img_size, patch_size, in_chans, num_classes: of every
            model, as for ``psvit.PSViT``.

    Raises:
        ValueError: an empty or repeated choice, a depth below 1, widths that aren't multiples of
            ``head_dim`` or that the pool can't make, an image size that the pools can't divide.

    Source: PSViT, arXiv 2108.03428, section 3.
    """

    depths: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    sharing: bool = True
    dims: Literal[1, 2] = 2
    pool: StageKind = "conv"
    head_dim: int = 64
    mlp_ratio: float = 4.0
    img_size: Size = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_number("head_dim", self.head_dim, least=1)
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"widths: got choices for {len(self.widths)} stages and depths for "
                f"{len(self.depths)}, expected both for each stage"
            )
        for name in ("depths", "widths"):
            for choices in getattr(self, name):
                _check_choices(name, choices)
        for width in itertools.chain.from_iterable(self.widths):
            if width % self.head_dim:
                raise ValueError(
                    f"widths: got {width}, expected multiples of head_dim, {self.head_dim}"
                )
        self._check_pools()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SearchSpace:
        """What ``to_dict`` gave, for example read from JSON.

        Raises:
            ValueError: an unknown or a missing name; what the space itself refuses.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f'space: got "{name}", expected one of {", ".join(names)}{hint}')
        for name in ("depths", "widths"):
            if not _is_list_of_lists(fields.get(name)):
                raise ValueError(
                    f"{name}: got {fields.get(name)!r}, expected a list of choices for each stage, "
                    f"for example [[2, 3], [1, 2]]"
                )
        return cls(**{name: _as_tuples(value) for name, value in fields.items()})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    # --- candidates -------------------------------------------------------------------------

    def size(self) -> int:
        """How many candidates there are."""
        patterns = ([2 ** (d - 1) if self.sharing else 1 for d in depths] for depths in self.depths)
        return math.prod(
            len(widths) * sum(counts) for widths, counts in zip(self.widths, patterns, strict=True)
        )

    def __iter__(self) -> Iterator[Candidate]:
        """Every candidate, once."""
        stages = [
            [Stage(kinds, width) for d in depths for kinds in self._patterns(d) for width in widths]
            for depths, widths in zip(self.depths, self.widths, strict=True)
        ]
        return (Candidate.of(chosen) for chosen in itertools.product(*stages))

    def __contains__(self, candidate: Candidate) -> bool:
        return len(candidate.stages) == len(self.depths) and all(
            len(stage.kinds) in depths
            and stage.width in widths
            and (self.sharing or SHARE not in stage.kinds)
            for stage, depths, widths in zip(
                candidate.stages, self.depths, self.widths, strict=True
            )
        )

    @cached_property
    def largest(self) -> Candidate:
        """The deepest and widest, in which every layer attends."""
        return self._extreme(max, ATTEND)

    @cached_property
    def smallest(self) -> Candidate:
        """The shallowest and narrowest, in which every layer shares that may."""
        return self._extreme(min, SHARE if self.sharing else ATTEND)

    def sample(self, rng: Random) -> Candidate:
        """A random candidate.

        Each stage's depth and width are uniform over their choices, and each layer after the first
        of its stage attends or shares with equal chances. That isn't uniform over all candidates:
        those with deeper stages are more, and each of them is rarer.
        """
        return Candidate.of(
            Stage(self._drawn(ATTEND, rng.choice(depths), rng), rng.choice(widths))
            for depths, widths in zip(self.depths, self.widths, strict=True)
        )

    def mutate(self, candidate: Candidate, rng: Random, rate: float = 0.1) -> Candidate:
        """Draws each choice anew with probability ``rate``: depths, widths, kinds of layers.

        A stage that gets shallower loses its last layers; one that gets deeper has random layers
        there. Source: the rate is that of single path one-shot, arXiv 1904.00420.
        """
        return Candidate.of(
            self._mutated(stage, depths, widths, rng, rate)
            for stage, depths, widths in zip(
                candidate.stages, self.depths, self.widths, strict=True
            )
        )

    def crossover(self, a: Candidate, b: Candidate, rng: Random) -> Candidate:
        """Each stage from one parent or the other."""
        return Candidate.of(map(rng.choice, zip(a.stages, b.stages, strict=True)))

    # --- models -----------------------------------------------------------------------------

    def model(self, candidate: Candidate, **options: Any) -> PSViT:
        """The candidate as a model with random weights; ``options`` are further ones of PSViT.

        Raises:
            ValueError: as ``psvit.PSViT``.
        """
        from ..models import PSViT

        return PSViT(candidate.schedule, candidate.widths, **self.arguments(), **options)

    def arguments(self) -> dict[str, Any]:
        """Those of ``psvit.PSViT`` that all candidates share."""
        chosen = ("depths", "widths", "sharing")
        return {name: value for name, value in self.to_dict().items() if name not in chosen}

    @cached_property
    def layouts(self) -> list[Layout]:
        """What the tokens of each stage are: the same for every candidate."""
        return self.model(self.smallest, device="meta").layouts()

    # --- parts ------------------------------------------------------------------------------

    def _check_pools(self) -> None:
        from ..models.pool import StagePool

        for choices in itertools.pairwise(self.widths):
            for before, after in itertools.product(*choices):
                StagePool(self.pool, before, after, dims=self.dims, device="meta")
        _ = self.layouts

    def _extreme(self, choose: Any, later: str) -> Candidate:
        return Candidate.of(
            Stage(ATTEND + later * (choose(depths) - 1), choose(widths))
            for depths, widths in zip(self.depths, self.widths, strict=True)
        )

    def _patterns(self, depth: int) -> list[str]:
        later = itertools.product(ATTEND + SHARE * self.sharing, repeat=depth - 1)
        return [ATTEND + "".join(kinds) for kinds in later]

    def _drawn(self, kinds: str, depth: int, rng: Random) -> str:
        """The first layers as they are, random ones up to the depth."""
        more = (rng.choice(ATTEND + SHARE * self.sharing) for _ in range(depth - len(kinds)))
        return kinds[:depth] + "".join(more)

    def _mutated(
        self,
        stage: Stage,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        rng: Random,
        rate: float,
    ) -> Stage:
        kinds, width = stage
        if rng.random() < rate:
            kinds = self._drawn(kinds, rng.choice(depths), rng)
        if rng.random() < rate:
            width = rng.choice(widths)
        for layer in range(1, len(kinds)):
            if rng.random() < rate:
                kinds = self._drawn(kinds[:layer], layer + 1, rng) + kinds[layer + 1 :]
        return Stage(kinds, width)


def _check_choices(name: str, choices: tuple[int, ...]) -> None:
    if not choices:
        raise ValueError(f"{name}: got a stage without choices, expected one or more")
    for value in choices:
        check_number(name, value, least=1)
    if len(set(choices)) < len(choices):
        raise ValueError(f"{name}: got {choices}, expected different choices")


def _is_list_of_lists(value: Any) -> bool:
    lists = (list, tuple)
    return isinstance(value, lists) and all(isinstance(choices, lists) for choices in value)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


# --- ready-made -----------------------------------------------------------------------------

#: For images of up to so many pixels a side.
_READY: dict[float, dict[str, Any]] = {
    16: {
        "depths": ((1, 2, 3), (1, 2, 3), (1, 2)),
        "widths": ((8, 16, 32), (8, 16, 32, 48), (16, 32, 64)),
        "head_dim": 8,
        "mlp_ratio": 2.0,
        "patch_size": 1,
    },
    32: {
        "depths": ((2, 3, 4, 5, 6), (2, 3, 4, 5), (1, 2, 3)),
        "widths": ((128, 192), (128, 192, 256), (192, 256, 320)),
        "patch_size": 2,
    },
    64: {
        "depths": ((2, 3, 4, 5, 6), (2, 3, 4, 5), (1, 2, 3)),
        "widths": ((128, 192), (128, 192, 256), (192, 256, 320)),
        "patch_size": 4,
    },
    math.inf: {
        "depths": ((6, 8, 10, 12), (3, 4, 5, 6, 7), (1, 2, 3)),
        "widths": ((128, 192, 256), (192, 256, 320), (256, 320, 384)),
        "patch_size": 16,
    },
}


def default_space(img_size: Size, in_chans: int, num_classes: int) -> SearchSpace:
    """A PSViT-2D space of three stages for images of a size; ``psvit_2d_tiny`` lies in the largest.

    Raises:
        ValueError: an image size that the patches or the pools can't divide.
    """
    side = img_size if isinstance(img_size, int) else max(img_size)
    choices = next(choices for most, choices in _READY.items() if side <= most)
    return SearchSpace(**choices, img_size=img_size, in_chans=in_chans, num_classes=num_classes)
