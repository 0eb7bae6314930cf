"""Random changes of the training images, each a function of numbers that name it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Below this many pixels of a side a part of an image is too little to tell what it shows.
SMALL = 64


class Augment:
    """From a picture to a changed tensor: crop, flip, policy, normalise, erase (timm's parts).

    Images of 64 pixels and more: a random part of 8 to 100 % of the picture, resized. Smaller:
    the whole picture, moved by up to an eighth with black around it, as usual for CIFAR.

    Args:
        size: height and width, in pixels.
        mean, std: of each channel (values from 0 to 1); as many as there are channels, 1 or 3.
        flip: half of the pictures are mirrored.
        auto_augment: a policy as timm spells it, or None.
        random_erasing: probability that a box of a picture becomes noise.

    Raises:
        ValueError: a policy that timm doesn't know.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        flip: bool,
        auto_augment: str | None,
        random_erasing: float,
    ) -> None:
        from timm.data import create_transform
        from torchvision import transforms

        self.channels = len(mean)
        hflip = 0.5 * flip
        try:
            crop, policy, rest = create_transform(
                (3, *size),
                is_training=True,
                hflip=hflip,
                color_jitter=None,  # type: ignore[arg-type]
                auto_augment=auto_augment,
                interpolation="bicubic",
                mean=mean * (3 // self.channels),
                std=std * (3 // self.channels),
                re_prob=random_erasing,
                re_mode="pixel",
                separate=True,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f'auto_augment: got "{auto_augment}", expected a policy of timm such as '
                "rand-m9-mstd0.5-inc1, original, augmix-m3-w3 or 3a"
            ) from error
        if min(size) < SMALL:
            crop = transforms.Compose(
                [
                    transforms.Resize(max(size), transforms.InterpolationMode.BICUBIC),
                    transforms.RandomCrop(size, padding=[side // 8 for side in reversed(size)]),
                    transforms.RandomHorizontalFlip(hflip),
                ]
            )
        _keep_a_bit(policy)
        self.transform = transforms.Compose([crop, policy, rest])

    def __call__(self, picture: Any, *numbers: int) -> Tensor:
        """`(C, H, W)`, float32: the same for the same picture and numbers.

        Grey pictures go through as three equal channels: timm's policies fill with colours.
        """
        with seeded(*numbers):
            return self.transform(picture.convert("RGB"))[: self.channels]


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's generators start from these numbers, and are put back after.

    PyTorch's on the CPU only: ``torch.manual_seed`` would seed those of the GPUs too.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = [int(seed) for seed in np.random.SeedSequence(numbers).generate_state(3)]
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _keep_a_bit(policy: Any) -> None:
    """timm posterizes to no bit at its highest magnitude; newer releases of Pillow refuse that."""
    from timm.data import auto_augment

    for transform in policy.transforms:
        groups = getattr(transform, "policy", None) or [transform.ops]
        for op in itertools.chain(*groups):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def _posterize(picture: Any, bits: int, **options: Any) -> Any:
    from timm.data.auto_augment import posterize

    return posterize(picture, max(1, bits), **options)
