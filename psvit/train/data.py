"""Batches of a source, the same for any number of processes and after any interruption.

An epoch's order depends on the seed and the epoch, a changed image on the seed, the epoch and its
index, and on nothing else: so neither workers nor ranks nor a resumed run see other pixels.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images import Preprocess
from .augment import Augment
from .sources import CorruptImageError, Source

#: So many unreadable images in a row are no accident.
MOST_UNREADABLE = 50


@dataclass(frozen=True)
class Loading:
    """How images become batches.

    Args:
        size: height and width, in pixels.
        batch: images of one step, over all processes.
        workers: processes that load, for each process that trains; 0: it loads itself.
        seed: of order and augmentation, from 0 up.
        auto_augment: a policy as timm spells it, or None.
        random_erasing: probability that a box of an image becomes noise.
        skip_corrupt: warn of an image that can't be read instead of stopping.
    """

    size: tuple[int, int]
    batch: int
    workers: int = 0
    seed: int = 0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    skip_corrupt: bool = False


def steps(source: Source, loading: Loading, world: int = 1) -> int:
    """Batches of an epoch; images that don't fill the last one are left out of it.

    Raises:
        ValueError: a batch that is larger than the training set, or no multiple of ``world``.
    """
    count = len(source.train)
    if loading.batch > count:
        raise ValueError(
            f"batch: got {loading.batch}, expected at most {count}, the training images of "
            f"{source.name}"
        )
    if loading.batch % world:
        raise ValueError(
            f"batch: got {loading.batch}, expected a multiple of {world}, the number of processes"
        )
    return count // loading.batch


def order(source: Source, loading: Loading, epoch: int) -> np.ndarray:
    """Indices of the images in each batch of an epoch, `(steps, batch)`."""
    shuffled = np.random.default_rng((loading.seed, epoch)).permutation(len(source.train))
    count = steps(source, loading)
    return shuffled[: count * loading.batch].reshape(count, loading.batch)


def train_batches(
    source: Source,
    loading: Loading,
    *,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's changed images and their labels, this process's share of each batch.

    The shares of rank 0, rank 1, ... one after another are what a single process would get.

    Args:
        epoch: from 0 up; another one has another order and other changes.
        start: so many batches are left out, without reading them.
        rank, world: number of this process, and how many there are.

    Returns:
        images `(batch / world, C, H, W)`, float32, normalised, and labels, int64.

    Raises:
        ValueError: what ``steps`` refuses, an unknown policy.
        CorruptImageError: while iterating: an image can't be read; with ``skip_corrupt`` the next
            one takes its place, and only 50 unreadable ones in a row raise.
    """
    count = steps(source, loading, world)
    shares = order(source, loading, epoch).reshape(count, world, -1)[start:, rank]
    keys = ([(epoch, index) for index in share.tolist()] for share in shares)
    return _load(_Training(source, loading), keys, loading)


def test_batches(
    source: Source, loading: Loading, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images, each once over all ranks, resized and cropped around the centre.

    Returns and raises as ``train_batches``, but batches may be uneven; with ``skip_corrupt`` an
    unreadable image is left out, so that no other counts twice.
    """
    share = max(1, loading.batch // world)
    indices = range(rank, len(source.test), world)
    keys = (list(indices[first : first + share]) for first in range(0, len(indices), share))
    return _load(_Testing(source, loading), keys, loading)


test_batches.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest thinks


# --- samples --------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """An image, or None if there is none; and what couldn't be read on the way to it."""

    image: Tensor | None
    label: int
    unreadable: list[str]


class _Training(Dataset[_Sample]):
    def __init__(self, source: Source, loading: Loading) -> None:
        self.source, self.loading = source, loading
        self.augment = Augment(
            loading.size,
            source.mean,
            source.std,
            flip=source.flip,
            auto_augment=loading.auto_augment,
            random_erasing=loading.random_erasing,
        )

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, index = key
        unreadable: list[str] = []
        for offset in range(MOST_UNREADABLE if self.loading.skip_corrupt else 1):
            place = (index + offset) % len(self.source.train)
            try:
                picture, label = self.source.read(place, "train")
            except CorruptImageError as error:
                unreadable.append(str(error))
                continue
            return _Sample(
                self.augment(picture, self.loading.seed, epoch, index), label, unreadable
            )
        return _Sample(None, 0, unreadable)


class _Testing(Dataset[_Sample]):
    def __init__(self, source: Source, loading: Loading) -> None:
        self.source = source
        self.preprocess = Preprocess(loading.size, source.mean, source.std)

    def __getitem__(self, index: int) -> _Sample:
        try:
            picture, label = self.source.read(index, "test")
        except CorruptImageError as error:
            return _Sample(None, 0, [str(error)])
        return _Sample(self.preprocess(picture), label, [])


# --- batches --------------------------------------------------------------------------------


class _Batch(NamedTuple):
    images: Tensor | None
    labels: Tensor
    unreadable: list[str]
    complete: bool


def _collate(samples: Sequence[_Sample]) -> _Batch:
    images = [sample.image for sample in samples if sample.image is not None]
    labels = [sample.label for sample in samples if sample.image is not None]
    return _Batch(
        torch.stack(images) if images else None,
        torch.tensor(labels),
        [message for sample in samples for message in sample.unreadable],
        len(images) == len(samples),
    )


def _load(
    dataset: _Training | _Testing, keys: Iterable[list[Any]], loading: Loading
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=loading.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        generator=torch.Generator(),  # else each epoch would draw a number from the global one
    )
    stops = isinstance(dataset, _Training)
    return _checked(loader, skip=loading.skip_corrupt, stops=stops)


def _checked(
    loader: Iterable[_Batch], *, skip: bool, stops: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Raises and warns here of what the workers found: theirs would come as tracebacks."""
    for batch in loader:
        if batch.unreadable and not skip:
            raise CorruptImageError(batch.unreadable[0])
        for message in batch.unreadable:
            warnings.warn(f"{message}; skipped", stacklevel=2)
        if stops and not batch.complete:
            raise CorruptImageError(
                f"{batch.unreadable[-1]}; neither were the {MOST_UNREADABLE - 1} images before it"
            )
        if batch.images is not None:
            yield batch.images, batch.labels


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
