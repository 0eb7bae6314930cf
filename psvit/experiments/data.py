"""Images of an experiment: all in memory, on the device that learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..digits import Digits

if TYPE_CHECKING:
    from ..train.packed import Packed


def _as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Data:
    """Training and test images.

    Args:
        images, test_images: `(n, channels, height, width)`, all on one device.
        labels, test_labels: `(n,)` int64, below ``classes``.
        augment: what training does to a batch of ``images`` first.
        ready: makes of a batch what a model takes: floats, normalised.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augment: Callable[[Tensor], Tensor] = _as_they_are
    ready: Callable[[Tensor], Tensor] = _as_they_are

    def few(self, count: int, seed: int) -> Data:
        """So many training images, as many of each class as can be; all of the test.

        Raises:
            ValueError: more images than there are.
        """
        if not 1 <= count <= len(self.images):
            raise ValueError(f"images: got {count}, expected 1 to {len(self.images)}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator)
        labels = self.labels.cpu()[order]
        seen = torch.stack([(labels == c).cumsum(0) for c in range(self.classes)])
        rank = seen[labels, range(len(labels))]
        chosen = order[rank.argsort(stable=True)[:count]].to(self.images.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def digits(device: str = "cpu") -> Data:
    """scikit-learn's (see ``psvit.digits.Digits``), not augmented."""
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in Digits.load())
    return Data(images, labels, test_images, test_labels, classes=10)


def packed(text: str, device: str = "cpu") -> Data:
    """CIFAR-10 as atlases or an ``.npz`` file (see ``psvit.train.sources``), kept as uint8.

    Raises:
        ValueError: no such data, or of another kind.
    """
    from ..train.packed import Packed
    from ..train.sources import open_source

    source = open_source(text)
    if not isinstance(source.train, Packed) or not isinstance(source.test, Packed):
        raise ValueError(
            f"data: got {text}, expected digits, an .npz file or a folder with CIFAR-10's atlases"
        )
    train, test = _as_tensors(source.train, device), _as_tensors(source.test, device)
    mean, deviation = (
        torch.tensor(values, device=device)[:, None, None] for values in (source.mean, source.std)
    )
    return Data(
        *train,
        *test,
        source.classes,
        partial(shifted, mirror=source.flip),
        lambda images: (images / 255 - mean) / deviation,
    )


def _as_tensors(packed: Packed, device: str) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(packed.images)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().to(device), torch.from_numpy(packed.labels).long().to(device)


# --- augmentation on the device -------------------------------------------------------------


def shifted(images: Tensor, margin: int = 4, *, mirror: bool) -> Tensor:
    """Each image moved by up to ``margin`` pixels, 0 coming in, and with ``mirror`` half mirrored.

    CIFAR's usual augmentation (arXiv 1512.03385, section 4.2), each image on its own.

    Args:
        images: `(B, C, H, W)`, any dtype.
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (margin,) * 4)
    down, across = torch.randint(0, 2 * margin + 1, (2, count, 1), device=device)
    rows = down + torch.arange(height, device=device)  # (B, H)
    columns = across + torch.arange(width, device=device)  # (B, W)
    if mirror:
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
