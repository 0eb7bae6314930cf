"""Small sources of images for training: random pixels, in memory and in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from psvit.train.packed import Packed, statistics
from psvit.train.sources import Source

Image = pytest.importorskip("PIL.Image")

#: DeiT's changes to an image.
STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}


def pixels(*shape: int) -> np.ndarray:
    return torch.randint(256, shape, dtype=torch.uint8).numpy()


def packed_source(count: int = 24, side: int = 16, channels: int = 3, tests: int = 11) -> Source:
    """Random images whose label is their index."""
    shape = (side, side) if channels == 1 else (side, side, channels)
    x_train, x_test = pixels(count, *shape), pixels(tests, *shape)
    labels = np.arange(max(count, tests))
    train, test = Packed(x_train, labels[:count]), Packed(x_test, labels[:tests])
    return Source("made", train, test, count, channels, *statistics(x_train), flip=True)


def gathered(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def write_images(folder: Path, count: int, side: int = 16) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(pixels(side, side, 3)).save(folder / f"{i}.png")


def write_pets(folder: Path) -> Path:
    """Two classes, 4 training images and 3 test images of each."""
    for split, count in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            write_images(folder / "pets" / split / name, count)
    return folder / "pets"
