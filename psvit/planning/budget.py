"""What a person asks of a plan: ``flops<=0.7``, ``latency<=0.7``, ``top1_agreement>=0.98``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Measure = Literal["flops", "latency", "top1_agreement"]

_FORM = re.compile(r"\s*(flops|latency|top1_agreement)\s*(<=|>=)\s*(\d+\.?\d*|\.\d+)\s*")


@dataclass(frozen=True)
class Budget:
    """A bound on what a converted model costs, or on how often it agrees with the original.

    Args:
        measure: what is bounded.
        bound: of cost at most, of agreement at least; a part of the original's, 0 to 1.
    """

    measure: Measure
    bound: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From a text.

        Raises:
            ValueError: another text, or a bound that isn't more than 0 and at most 1.
        """
        form = _FORM.fullmatch(text) if isinstance(text, str) else None
        sign = ">=" if form and form[1] == "top1_agreement" else "<="
        if form is None or form[2] != sign or not 0 < float(form[3]) <= 1:
            raise ValueError(
                f"budget: got {text!r}, expected for example flops<=0.7, latency<=0.7 (of the "
                f"original's) or top1_agreement>=0.98"
            )
        measure: Measure = form[1]  # type: ignore[assignment]
        return cls(measure, float(form[3]))

    def __str__(self) -> str:
        return f"{self.measure}{'>=' if self.measure == 'top1_agreement' else '<='}{self.bound:g}"
