"""Changed images: cut, mirrored, and of other contrast and colour, wherever they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The least part of an image's sides that a cut keeps.
LEAST = 0.8
#: The most that contrast changes, as a part of it, and brightness and each channel, in standard
#: deviations of the image.
MOST = 0.3


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A part of each image, enlarged to its size, half of them mirrored, with another contrast,
    brightness and colour.

    All of it mild: a conversion that is corrected already has little to learn from images that
    are unlike those it is for.

    Args:
        images: `(B, C, H, W)`.
        generator: on the CPU; equal ones give equal images.
    """
    n, channels = images.shape[:2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def change(*shape: int) -> Tensor:
        return (MOST * (2 * uniform(*shape) - 1)).to(images)

    scale = LEAST + (1 - LEAST) * uniform(n)
    mirror = torch.where(uniform(n) < 0.5, -1.0, 1.0)
    shift = (1 - scale)[:, None] * (2 * uniform(n, 2) - 1)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale * mirror, scale, shift
    where = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    cut = F.grid_sample(images, where, padding_mode="reflection", align_corners=False)
    deviation, mean = (x[:, None, None, None] for x in torch.std_mean(cut, (1, 2, 3)))
    colour = change(n, 1, 1, 1) + change(n, channels, 1, 1)
    return mean + (1 + change(n, 1, 1, 1)) * (cut - mean) + deviation * colour
