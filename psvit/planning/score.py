"""How near a model's outputs are to the original's, on images held out of everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..outputs import kl_divergence, logits_of, relative_errors

#: One image in so many is held out of all fits, to score on.
HOLD_OUT = 4


@dataclass(frozen=True)
class Score:
    """How near a model's outputs are to the original's.

    Args:
        error: mean squared error of the class scores, relative to the original's mean square; by
            this conversions are chosen.
        agreement: part of the images whose first class is the same.
        kl: KL(original || converted) of the classes, nats, mean over the images.
    """

    error: float
    agreement: float
    kl: float

    @classmethod
    def of(cls, scores: Tensor, reference: Tensor) -> Score:
        """From class scores `(B, classes)` of the model and of the original."""
        same = (scores.argmax(1) == reference.argmax(1)).double().mean()
        error = relative_errors(scores, reference).mean()
        return cls(float(error), float(same), float(kl_divergence(scores, reference)))


def split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to fit on, and images held out.

    Raises:
        ValueError: so few that none would be held out.
    """
    held = torch.arange(len(images)) % HOLD_OUT == HOLD_OUT - 1
    if not held.any():
        raise ValueError(f"images: got {len(images)}, expected at least {HOLD_OUT}")
    return images[~held], images[held]


class Held:
    """Images held out, and what the original says of them.

    Args:
        original: the model.
        images: `(B, channels, height, width)`.
    """

    def __init__(self, original: nn.Module, images: Tensor) -> None:
        self.images = images
        self.reference = self.scores(original)

    def score(self, model: nn.Module) -> Score:
        """Of another model with the same classes."""
        return Score.of(self.scores(model), self.reference)

    @torch.inference_mode()
    def scores(self, model: nn.Module) -> Tensor:
        """Class scores of a model on these images, float64 `(B, classes)`."""
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            batches = (batch.to(device) for batch in self.images.split(32))
            return torch.cat([logits_of(model(batch)).double().cpu() for batch in batches])
        finally:
            model.train(training)
