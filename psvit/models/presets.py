"""The named models: what a name says of schedule and widths. Data; timm isn't needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preset:
    """What a name stands for.

    Args:
        schedule: as for ``psvit.Schedule``.
        widths: channels of each stage; heads have 64.
        dims: 1 or 2, as for ``PSViT``.
        peer: the DeiT it stands beside, as timm calls it.
    """

    schedule: str
    widths: tuple[int, ...]
    dims: Literal[1, 2]
    peer: str

    def arguments(self) -> dict[str, Any]:
        """Of ``PSViT``."""
        return {"schedule": self.schedule, "widths": self.widths, "dims": self.dims}


# DeiT's cost, within 2 % at each size. Two thirds of the layers stay where the patches are 14 x 14,
# as in other pyramids. A sequence is pooled 2 to 1 only, so that 1D has less to spend on width.
_MATCHED = {
    1: ("AASAASAA|AASAASA|AA", (192, 192, 256)),
    2: ("AASAASAASA|ASASA|AS", (192, 256, 320)),
}
_DEIT = "AASA|ASAS|ASSS"
_SIZES = {"tiny": 1, "small": 2, "base": 4}


def _presets() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for dims in (1, 2):
        for size, times in _SIZES.items():
            peer = f"deit_{size}_patch16_224"
            schedule, widths = _MATCHED[dims]
            wider = tuple(times * width for width in widths)
            name = f"psvit_{dims}d_{size}"
            found[name] = Preset(schedule, wider, dims, peer)  # type: ignore[arg-type]
            deit = (times * 192,) * 3
            found[f"{name}_deit"] = Preset(_DEIT, deit, dims, peer)  # type: ignore[arg-type]
    return found


#: ``psvit_{1d,2d}_{tiny,small,base}`` cost what DeiT of that size costs, what was freed being spent
#: on depth and width; those ending in ``_deit`` have DeiT's depth and width, and cost less.
PRESETS = _presets()
