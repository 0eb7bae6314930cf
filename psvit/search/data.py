"""A data set's training images in two parts: to learn from, and to compare candidates on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Subset

from ..train.data import Loading, steps, test_batches, train_batches
from ..train.sources import Pictures, Source
from .training import Data

#: Of the training images, and at most so many: they are kept in memory.
HELD_OUT, MOST = 0.2, 5000


def held_out_data(source: Source, loading: Loading) -> Data:
    """The training images of a source in two parts by ``loading.seed``; its test images are unused.

    As many of each class are held out as there are in all, where the classes are known without
    decoding the images.

    Raises:
        ValueError: a class with a single image; a batch larger than what is left to train on.
        CorruptImageError: a held-out image can't be read.
    """
    from sklearn.model_selection import train_test_split

    count = len(source.train)
    kept, held_out = train_test_split(
        np.arange(count),
        test_size=min(HELD_OUT, MOST / count),
        random_state=loading.seed,
        stratify=_labels(source.train),
    )
    parts = replace(source, train=_Part(source.train, kept), test=_Part(source.train, held_out))
    return Data(
        epoch=lambda epoch: train_batches(parts, loading, epoch=epoch),
        steps=steps(parts, loading),
        held_out=list(test_batches(parts, loading)),
    )


class _Part(Subset[Any]):
    def __init__(self, pictures: Pictures, indices: Any) -> None:
        super().__init__(pictures, indices)  # type: ignore[arg-type]

    @property
    def samples(self) -> list[Any]:
        """Files and classes, where the pictures are files: ``Source.describe`` asks for them."""
        samples = self.dataset.samples  # type: ignore[attr-defined]
        return [samples[i] for i in self.indices]


def _labels(pictures: Pictures) -> Any:
    """Class indices of packed arrays or of torchvision's sets, or None."""
    return getattr(pictures, "labels", getattr(pictures, "targets", None))
