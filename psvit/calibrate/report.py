"""What a calibration did: how far each layer's tokens were from the original's, and are now."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..console import table


@dataclass(frozen=True)
class Fit:
    """One fit of one layer.

    What it was worth is told on images held out; the layer's weights are fitted to those too then.
    Errors are weighted sums of squared differences between the tokens after the fitted part and
    the original's, relative to that of the original's tokens; earlier layers are corrected already.

    Args:
        layer: counted from 0.
        part: what was fitted: see ``psvit.calibrate.correction``.
        ridge: how strongly it was pulled towards the old weights.
        before, after: error on the images of the fit.
        held_out_before, held_out_after: on those held out; None if there are none.
        kept: whether the layer has the new weights. It has not where they raise the error on the
            images held out.
    """

    layer: int
    part: str
    ridge: float
    before: float
    after: float
    held_out_before: float | None
    held_out_after: float | None
    kept: bool


@dataclass(frozen=True)
class PoolFit:
    """A learned pool as it was chosen: see ``psvit.calibrate.pools``.

    Args:
        layer: before which it stands, counted from 0.
        token: place in the cell of the token that is blended, along each axis.
        average: part of the cell's average in the blend.
        scale: what the taps sum to, so that pooled tokens have the root mean square of the others.
        error: squared one of the model's outputs, relative to the original's, while every layer
            attends; on the images that it was chosen by.
    """

    layer: int
    token: tuple[int, ...]
    average: float
    scale: float
    error: float


@dataclass
class Report:
    """What ``calibrate`` did.

    Args:
        schedule: its text.
        images, held_out: number of images fitted to, and of those held out.
        fits: in the order in which they were made.
        pools: learned ones.
        left_alone: for layers (from 0) that the schedule changes, but of which a part couldn't be
            fitted, why.
    """

    schedule: str
    images: int
    held_out: int
    fits: list[Fit] = field(default_factory=list)
    pools: list[PoolFit] = field(default_factory=list)
    left_alone: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and strings, ready for ``json.dump``."""
        return asdict(self)

    def table(self) -> Any:
        """A table for ``psvit.console.print_tables``; layers counted from 1."""
        rows = [
            (
                str(fit.layer + 1),
                fit.part + ("" if fit.kept else ", not kept"),
                *(f"{error:.2%}" if error is not None else "" for error in _errors(fit)),
            )
            for fit in self.fits
        ]
        title = f"{self.schedule}: error of the tokens, {self.images} images"
        header = ("layer", "part", "before", "after", "held out: before", "after")
        made = table(title, header, rows, left=2)
        left_alone = (
            f"layer {layer + 1} left alone: {why}" for layer, why in self.left_alone.items()
        )
        made.caption = "\n".join((*map(_described, self.pools), *left_alone))
        return made


def _described(pool: PoolFit) -> str:
    return (
        f"pool before layer {pool.layer + 1}: {1 - pool.average:.0%} of token {pool.token}, "
        f"{pool.average:.0%} of the cell's average, times {pool.scale:.3f}"
    )


def _errors(fit: Fit) -> tuple[float | None, ...]:
    return fit.before, fit.after, fit.held_out_before, fit.held_out_after
