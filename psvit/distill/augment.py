"""Changed images: cut, mirrored and mixed, a batch at a time, wherever they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The least part of an image's sides that a cut keeps.
LEAST = 0.6


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each image, enlarged to its size, half of them mirrored; half mixed with another.

    A teacher sees the same images, so there is no label that a mixture could spoil.

    Args:
        images: `(B, C, H, W)`.
        generator: on the CPU; equal ones give equal images.
    """
    n = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    scale = LEAST + (1 - LEAST) * uniform(n)
    mirror = torch.where(uniform(n) < 0.5, -1.0, 1.0)
    shift = (1 - scale)[:, None] * (2 * uniform(n, 2) - 1)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale * mirror, scale, shift
    where = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    cut = F.grid_sample(images, where, padding_mode="reflection", align_corners=False)
    part = torch.where(uniform(n) < 0.5, uniform(n), 1.0).to(images).view(n, 1, 1, 1)
    other = torch.randperm(n, generator=generator).to(images.device)
    return part * cut + (1 - part) * cut[other]
