"""A trained model, converted and corrected in closed form: no labels, no gradients."""

from .report import Fit, Report
from .run import RankDeficientWarning, calibrate, fewest_images

__all__ = ["Fit", "RankDeficientWarning", "Report", "calibrate", "fewest_images"]
