"""What a model can be trained on: from the name that a person types to pictures with labels."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch.utils.data import Dataset

from ..images import IMAGENET
from .packed import Arrays, Packed, is_atlas, read_atlas, read_digits, read_npz, statistics

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Split = Literal["train", "test"]

EXPECTED = (
    "digits, a folder with train/ and val/ (or test/, validation/) and in each a folder for each "
    "class, an .npz file with x_train, y_train, x_test and y_test, a folder with CIFAR-10 as "
    "train1.webp to train5.webp, test.webp and labels.npz, torch/NAME:FOLDER or hfds/NAME"
)

TEST_FOLDERS = ("val", "test", "validation")

#: Names of data whose pictures mean something else, or nothing, in a mirror.
WRITING = ("digits", "mnist", "qmnist", "kmnist", "emnist", "svhn")


class CorruptImageError(ValueError):
    """An image can't be read; the message names it."""


class Pictures(Protocol):
    """Items are a picture of Pillow and a class index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Source:
    """Pictures with labels, to train on and to test on.

    Args:
        name: as it was typed.
        train, test: what to train on, what to test on.
        classes: number of classes.
        channels: 1 (grey) or 3 (RGB).
        mean, std: of each channel, on the scale from 0 to 1, for normalising.
        flip: whether a mirrored picture shows the same thing.
    """

    name: str
    train: Pictures
    test: Pictures
    classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that all images have, where they are packed in arrays."""
        if not isinstance(self.train, Packed):
            return None
        height, width = self.train.images.shape[1:3]
        return height, width

    def describe(self, index: int, split: Split) -> str:
        """What names an image for people: its file, or which one it is."""
        samples = getattr(getattr(self, split), "samples", None)
        return f"{split} image {index} of {self.name}" if samples is None else samples[index][0]

    def read(self, index: int, split: Split) -> tuple[Any, int]:
        """A decoded picture, grey or RGB as ``channels`` says, and its class index.

        Raises:
            CorruptImageError: it can't be read.
        """
        from PIL import Image

        damaged = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)
        try:
            picture, label = getattr(self, split)[index]
            return picture.convert("L" if self.channels == 1 else "RGB"), int(label)
        except (*damaged, Image.DecompressionBombError) as error:
            why = getattr(error, "strerror", None) or "not an image that can be read"
            raise CorruptImageError(f"{self.describe(index, split)}: {why}") from error


def open_source(text: str) -> Source:
    """The data of that name.

    Args:
        text: ``digits`` (scikit-learn's); a folder with ``train/`` and ``val/``, ``test/`` or
            ``validation/``, in each a folder for each class; an ``.npz`` file (see ``read_npz``);
            a folder with CIFAR-10 as atlases (see ``read_atlas``); ``torch/NAME:FOLDER``, a data
            set of torchvision by timm's name that lies in that folder; ``hfds/NAME`` or
            ``hfds/NAME:CACHE``, one of Hugging Face, whose library may download it.

    Normalised by the mean and deviation of the training images where they are packed in arrays,
    else by ImageNet's; digits and grey images of a library from -1 to 1. Mirrored in training,
    but for data with the name of written digits (``WRITING``).

    Raises:
        ValueError: none of these, or one that can't be used; the message says why.
    """
    if text == "digits":
        return _packed(text, read_digits(), ((0.5,), (0.5,)))
    if text.startswith("torch/"):
        return _torchvision(text)
    if text.startswith("hfds/"):
        return _hugging_face(text)
    if text.startswith(("tfds/", "wds/", "hfids/")):
        raise ValueError(
            f"data: got {text}, a stream; expected images that can be read in any order, so that "
            f"a run can go on where it stopped: {EXPECTED}"
        )
    path = Path(text)
    if path.suffix == ".npz":
        return _packed(text, read_npz(path))
    if not path.is_dir():
        raise ValueError(f"data: no such folder: {text}; expected {EXPECTED}")
    if is_atlas(path):
        return _packed(text, read_atlas(path))
    return _folder(text, path)


def _packed(
    name: str,
    arrays: Arrays,
    known: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Source:
    x_train, y_train, x_test, y_test = arrays
    return Source(
        name,
        Packed(x_train, y_train),
        Packed(x_test, y_test),
        arrays.classes,
        arrays.channels,
        *(known or statistics(x_train)),
        _flip(name),
    )


def _flip(name: str) -> bool:
    return Path(name.partition(":")[0]).stem.lower() not in WRITING


def _folder(name: str, path: Path) -> Source:
    tests = [folder for folder in TEST_FOLDERS if (path / folder).is_dir()]
    if not (path / "train").is_dir() or not tests:
        missing = "train/" if tests else "val/, test/ or validation/"
        raise ValueError(f"data: no {missing} in {path}; expected {EXPECTED}")
    train, test = (_images(path / folder) for folder in ("train", tests[0]))
    return _pictures(name, train, test, grey=False)  # torchvision reads all files as RGB


def _images(path: Path) -> ImageFolder:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:  # no classes, or one without images
        raise ValueError(f"{path}: {error}") from error


def _pictures(name: str, train: Any, test: Any, *, grey: bool) -> Source:
    """Of two data sets that know the names of their classes."""
    classes = list(train.classes)
    for here, there, which in ((classes, test.classes, "test"), (test.classes, classes, "train")):
        lacking = [found for found in here if found not in there]
        if lacking:
            raise ValueError(
                f"{name}: the {which} images lack the class {lacking[0]} ({len(lacking)} classes "
                "in all); expected the same classes in both"
            )
    mean, std = ((0.5,), (0.5,)) if grey else IMAGENET
    return Source(name, train, test, len(classes), 1 if grey else 3, mean, std, _flip(name))


# --- data sets of libraries ------------------------------------------------------------------


def _torchvision(text: str) -> Source:
    from timm.data import create_dataset

    name, _, folder = text.partition(":")
    if not Path(folder).is_dir() or not folder:
        raise ValueError(
            f"data: got {text}, expected torch/NAME:FOLDER, the folder that torchvision's data set "
            "lies in"
        )
    try:
        train, test = (create_dataset(name, folder, split) for split in ("train", "validation"))
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{text}: {' '.join(str(error).split())}") from error
    if not hasattr(train, "classes"):
        raise ValueError(f"{text}: torchvision doesn't tell its classes; expected a set that does")
    return _pictures(text, train, test, grey=_is_grey(text, train))


def _is_grey(name: str, pictures: Any) -> bool:
    try:
        return pictures[0][0].mode in ("1", "L")
    except OSError as error:
        raise ValueError(f"{name}: its first image can't be read") from error


class _Table(Dataset[Any]):
    """The first column of images and the first of classes of a table of Hugging Face."""

    def __init__(self, table: Any) -> None:
        import datasets

        self.table = table
        self.image = self._first(datasets.Image)
        self.label = self._first(datasets.ClassLabel)
        self.classes = table.features[self.label].names

    def _first(self, kind: type) -> str:
        features = self.table.features
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if not found:
            raise ValueError(f"got columns {', '.join(features)}, expected one of {kind.__name__}")
        return found[0]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        return row[self.image], row[self.label]


def _hugging_face(text: str) -> Source:
    """Without timm's reader, which takes another image for a damaged one and doesn't say so."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{text}: datasets not installed; run: pip install datasets")
    import datasets

    name, _, cache = text.removeprefix("hfds/").partition(":")
    try:
        splits = datasets.get_dataset_split_names(name)
        tests = [split for split in ("validation", "val", "test") if split in splits]
        if "train" not in splits or not tests:
            raise ValueError(f"got the splits {', '.join(splits)}, expected train and validation")
        train, test = (
            _Table(datasets.load_dataset(name, split=split, cache_dir=cache or None))
            for split in ("train", tests[0])
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{text}: {' '.join(str(error).split())}") from error
    return _pictures(text, train, test, grey=_is_grey(text, train))
