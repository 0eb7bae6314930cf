"""Images that are packed in arrays: an ``.npz`` file, CIFAR-10 as atlases, the digits."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

#: Pixels of a side of one image in an atlas.
TILE = 32

KEYS = ("x_train", "y_train", "x_test", "y_test")


class Packed(Dataset[Any]):
    """Pictures of Pillow with their labels, out of arrays.

    Args:
        images: `(N, H, W)` or `(N, H, W, 3)`, uint8.
        labels: `(N,)`, class indices.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), int(self.labels[index])


class Arrays(NamedTuple):
    """Training and test images as ``Packed`` takes them, checked."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.y_train.max()) + 1

    @property
    def channels(self) -> int:
        """1 or 3."""
        return _channels(self.x_train)


def read_npz(path: Path) -> Arrays:
    """An ``.npz`` file with the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

    Images are uint8, `(N, H, W)` or `(N, H, W, C)` with 1 or 3 channels; labels are whole numbers
    from 0 up, `(N,)`.

    Raises:
        ValueError: no such file, a damaged one, a missing array, or one of another dtype, shape or
            range; the message names the file and the array.
    """
    return _checked(path, _arrays(path, KEYS))


def is_atlas(folder: Path) -> bool:
    """Whether a folder holds CIFAR-10 as atlases."""
    return (folder / "test.webp").is_file() and (folder / "labels.npz").is_file()


def read_atlas(folder: Path) -> Arrays:
    """CIFAR-10 as ``train1..5.webp``, ``test.webp`` and ``labels.npz``.

    Each picture is a table of images of 32 x 32, row by row; labels are in the same order. Test
    images whose index is in ``test_lossy_idx`` are not CIFAR-10's own pixels and are left out.

    Raises:
        ValueError: a missing or damaged file, labels that don't fit the images.
    """
    names = [*(f"train{i}.webp" for i in range(1, 6)), "test.webp"]
    with ThreadPoolExecutor() as pool:  # the decoder works outside of Python's lock
        *train, test = pool.map(_tiles, [folder / name for name in names])
    labels = _arrays(folder / "labels.npz", ("y_train", "y_test", "test_lossy_idx"))
    images = {"x_train": np.concatenate(train), "x_test": test}
    found = _checked(folder, {**images, **labels})
    kept = np.setdiff1d(np.arange(len(test)), labels["test_lossy_idx"])
    return found._replace(x_test=found.x_test[kept], y_test=found.y_test[kept])


def read_digits() -> Arrays:
    """scikit-learn's digits, split as ``psvit.digits.Digits``; its -1 to 1 are 0 to 255 here."""
    from ..digits import Digits

    images, labels, test_images, test_labels = (t.numpy() for t in Digits.load())
    x_train, x_test = (
        np.rint((x[:, 0] + 1) * 127.5).astype(np.uint8) for x in (images, test_images)
    )
    return Arrays(x_train, labels, x_test, test_labels)


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on the scale from 0 to 1."""
    values, means, deviations = np.arange(256) / 255, [], []
    for channel in np.moveaxis(images.reshape(*images.shape[:3], -1), 3, 0):
        # Counted in parts: one count of it all would need eight bytes a pixel.
        parts = np.array_split(channel, -(-len(channel) // 1000))
        counts = sum(np.bincount(part.ravel(), minlength=256) for part in parts)
        mean = np.average(values, weights=counts)
        deviation = np.sqrt(np.average((values - mean) ** 2, weights=counts))
        means.append(float(mean))
        deviations.append(max(float(deviation), 1 / 255))  # an empty channel has none
    return tuple(means), tuple(deviations)


def _arrays(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            missing = [key for key in keys if key not in file]
            found = {} if missing else {key: file[key] for key in keys}
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    # TypeError: an .npy file under this name, whose array is no context.
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an .npz file that can be read") from error
    if missing:
        raise ValueError(f"{path}: no {missing[0]} in it; expected {', '.join(keys)}")
    return found


def _tiles(path: Path) -> np.ndarray:
    """The images of an atlas, `(N, 32, 32, 3)`."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            atlas = np.asarray(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read") from error
    height, width, _ = atlas.shape
    if height % TILE or width % TILE:
        raise ValueError(f"{path}: got {width} x {height} pixels, expected multiples of {TILE}")
    tiles = atlas.reshape(height // TILE, TILE, width // TILE, TILE, 3).swapaxes(1, 2)
    return tiles.reshape(-1, TILE, TILE, 3)


def _checked(path: Path, arrays: Mapping[str, np.ndarray]) -> Arrays:
    for split in ("train", "test"):
        _check_images(f"{path}: x_{split}", arrays[f"x_{split}"])
        _check_labels(f"{path}: y_{split}", arrays[f"y_{split}"], len(arrays[f"x_{split}"]))
    found = Arrays(*(arrays[key] for key in KEYS))
    if _channels(found.x_test) != found.channels:
        raise ValueError(
            f"{path}: x_test: got {_channels(found.x_test)} channels, expected {found.channels} as "
            "in x_train"
        )
    if found.y_test.max() >= found.classes:
        raise ValueError(
            f"{path}: y_test: got label {found.y_test.max()}, expected 0 to {found.classes - 1} as "
            "in y_train"
        )
    x_train, x_test = (x[..., 0] if x.shape[3:] == (1,) else x for x in (found[0], found[2]))
    return found._replace(x_train=x_train, x_test=x_test)


def _check_images(what: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise ValueError(f"{what}: got {images.dtype}, expected uint8")
    if images.ndim not in (3, 4) or _channels(images) not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{what}: got {images.shape}, expected (N, H, W) or (N, H, W, 1 or 3)")


def _check_labels(what: str, labels: np.ndarray, images: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: got {labels.dtype}, expected whole numbers")
    if labels.shape != (images,):
        raise ValueError(f"{what}: got {labels.shape}, expected ({images},), one for each image")
    if labels.min() < 0:
        raise ValueError(f"{what}: got label {labels.min()}, expected from 0 up")


def _channels(images: np.ndarray) -> int:
    return images.shape[3] if images.ndim == 4 else 1
