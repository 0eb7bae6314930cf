"""What a calibration did: how far each layer's tokens were from the original's, and are now."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..console import table


@dataclass(frozen=True)
class Fit:
    """One fit of one layer.

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


@dataclass
class Report:
    """What ``calibrate`` did.

    Args:
        schedule: its text.
        images, held_out: number of images fitted to, and of those held out.
        fits: in the order in which they were made.
        left_alone: for layers (from 0) that the schedule changes, but of which a part couldn't be
            fitted, why.
    """

    schedule: str
    images: int
    held_out: int
    fits: list[Fit] = field(default_factory=list)
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
        made.caption = "\n".join(
            f"layer {layer + 1} left alone: {why}" for layer, why in self.left_alone.items()
        )
        return made


def _errors(fit: Fit) -> tuple[float | None, ...]:
    return fit.before, fit.after, fit.held_out_before, fit.held_out_after
