"""Structured initialisation: attention that starts as shift filters, its peer and its control.

``impulse_init_`` makes every head look at one neighbour, as one tap of a convolution does;
``mimetic_init_`` makes every head look at itself and a little elsewhere; ``norm_match_`` gives a
model the norms of another initialisation and nothing else of it, to tell the two apart.
"""

from .impulse import impulse_init_
from .mimetic import mimetic_init_, norm_match_
from .report import Report, measure
from .shifts import shift_filter

__all__ = [
    "Report",
    "impulse_init_",
    "measure",
    "mimetic_init_",
    "norm_match_",
    "shift_filter",
]
