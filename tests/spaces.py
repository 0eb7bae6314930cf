"""Small search spaces that the tests of the search share."""

from __future__ import annotations

import pytest

from psvit.search.space import Candidate, SearchSpace


def small_space(**changes) -> SearchSpace:
    fields = dict(
        depths=((1, 2, 3), (1, 3), (2,)),
        widths=((8, 16), (16, 24), (8, 24)),
        head_dim=8,
        img_size=16,
        patch_size=2,
        in_chans=2,
        num_classes=5,
        mlp_ratio=2.0,
    )
    return SearchSpace(**(fields | changes))


SPACES = {
    "2d": {},
    "1d": {"dims": 1},
    "depthwise": {"pool": "depthwise", "widths": ((8, 16), (16, 32), (32,))},
    "max": {"pool": "max", "widths": ((16,),) * 3},
    "no sharing": {"sharing": False},
}
EACH_SPACE = pytest.mark.parametrize("changes", SPACES.values(), ids=SPACES)


def sum_of_widths(candidate: Candidate) -> float:
    layers = [(k, s.width, i) for i, s in enumerate(candidate.stages) for k in s.kinds]
    return sum(width**2 / 4**i * (3 if kind == "A" else 2) for kind, width, i in layers)
