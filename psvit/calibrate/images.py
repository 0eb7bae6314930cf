"""The images of a calibration, read again for each fit, some of them held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

#: One image in so many is held out of the fits, to tell what they are worth.
HOLD_OUT = 10


class Images:
    """Batches of images and, for each image, whether it is held out.

    Args:
        images: `(B, channels, height, width)`, or batches of them that can be read repeatedly.
        batch: images that are given at a time, at most.

    Raises:
        ValueError: no image, or another shape.
        TypeError: something else than tensors, or batches that can be read only once.
    """

    def __init__(self, images: Tensor | Iterable[Tensor], batch: int) -> None:
        if isinstance(images, Iterator):
            raise TypeError(
                f"images: got a {type(images).__name__}, which can be read only once, expected a "
                f"Tensor or batches that can be read again (a list, a DataLoader)"
            )
        self.batches = [images] if isinstance(images, Tensor) else images
        self.batch = batch
        self.count = len(images) if isinstance(images, Tensor) else self._counted()
        if not self.count:
            raise ValueError("images: got none, expected at least one")

    @property
    def fitted(self) -> int:
        """Number of images that aren't held out."""
        return self.count - self.count // HOLD_OUT

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(b, channels, height, width)` and booleans `(b,)`, in order."""
        start = 0
        for few in self._few():
            places = torch.arange(start, start + len(few))
            yield few, places % HOLD_OUT == HOLD_OUT - 1
            start += len(few)

    def first(self, count: int) -> Iterator[Tensor]:
        """Batches of the first images, so many at most."""
        for few in self._few():
            if count <= 0:
                return
            yield few[:count]
            count -= len(few)

    def _few(self) -> Iterator[Tensor]:
        for images in self.batches:
            if not isinstance(images, Tensor):
                raise TypeError(f"images: got {type(images).__name__}, expected a Tensor")
            if images.dim() != 4:
                shape = tuple(images.shape)
                raise ValueError(f"images: got shape {shape}, expected (B, channels, h, w)")
            yield from images.split(self.batch)

    def _counted(self) -> int:
        return sum(len(few) for few in self._few())
