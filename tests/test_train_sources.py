"""What psvit train reads: sources by name, as images with their labels."""

from __future__ import annotations

import importlib.machinery
import io
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sources import STRONG, gathered, pixels, write_pets
from surroundings import DATA

from psvit.digits import Digits
from psvit.train.data import Loading, test_batches, train_batches
from psvit.train.packed import statistics
from psvit.train.sources import EXPECTED, CorruptImageError, open_source

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

CIFAR = DATA / "cifar10"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pets(tmp_path)


# --- digits, folders, packed arrays -----------------------------------------------------------


def test_digits_are_those_of_the_demo():
    source = open_source("digits")
    assert (source.classes, source.channels, source.flip) == (10, 1, False)
    assert source.train[0][0].mode == "L" and source.train[0][0].size == (8, 8)
    digits = Digits.load()
    images, labels = gathered(test_batches(source, Loading((8, 8), 100)))
    assert torch.equal(labels, digits.test_labels)
    torch.testing.assert_close(
        images, digits.test_images, rtol=0, atol=1.001 / 255
    )  # rounded to whole grey values
    assert [source.train[i][1] for i in range(99)] == digits.labels[:99].tolist()


@pytest.mark.parametrize("test", ["val", "test", "validation"])
def test_a_folder_with_a_folder_for_each_class(folder, test):
    (folder / "val").rename(folder / test)
    source = open_source(str(folder))
    assert (len(source.train), len(source.test)) == (8, 6)
    assert (source.classes, source.channels, source.flip) == (2, 3, True)
    picture, label = source.read(5, "train")
    assert (picture.mode, label) == ("RGB", 1)
    assert source.describe(5, "train") == str(folder / "train" / "dog" / "1.png")
    assert source.describe(0, "test") == str(folder / test / "cat" / "0.png")


def test_classes_that_only_one_half_of_a_folder_has_are_named(folder):
    shutil.copytree(folder / "val" / "dog", folder / "val" / "fox")
    with pytest.raises(ValueError, match="the train images lack the class fox"):
        open_source(str(folder))
    shutil.rmtree(folder / "val" / "fox")
    shutil.rmtree(folder / "val" / "cat")
    with pytest.raises(ValueError, match="the test images lack the class cat"):
        open_source(str(folder))


def test_a_class_without_images_is_named(folder):
    (folder / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"train: .*eel"):
        open_source(str(folder))


@pytest.mark.parametrize("missing", ["train", "val"])
def test_half_a_folder_is_refused(folder, missing):
    shutil.rmtree(folder / missing)
    with pytest.raises(ValueError, match=f"data: no {missing}/"):
        open_source(str(folder))


@pytest.mark.parametrize("text", ["imagenet", "/no/where", "cifar10"])
def test_an_unknown_name_lists_what_is_expected(text):
    with pytest.raises(ValueError) as error:
        open_source(text)
    assert str(error.value) == f"data: no such folder: {text}; expected {EXPECTED}"


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    made = {"x_train": pixels(12, 8, 8, 3), "x_test": pixels(5, 8, 8, 3)}
    return {**made, "y_train": np.arange(12) % 4, "y_test": np.arange(5) % 4, **changed}


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1), (6, 9, 3)])
def test_packed_arrays_come_back_as_they_were(tmp_path, shape):
    made = arrays(x_train=pixels(12, *shape), x_test=pixels(5, *shape))
    np.savez(tmp_path / "a.npz", **made)
    source = open_source(str(tmp_path / "a.npz"))
    channels = 3 if shape[-1] == 3 else 1
    assert (source.classes, source.channels) == (4, channels)
    for split in ("train", "test"):
        for i, (image, label) in enumerate(zip(made[f"x_{split}"], made[f"y_{split}"])):  # noqa: B905
            picture, got = source.read(i, split)
            assert got == label and picture.mode == ("RGB" if channels == 3 else "L")
            assert np.array_equal(np.asarray(picture).reshape(shape), image)
    assert source.describe(3, "test") == f"test image 3 of {tmp_path / 'a.npz'}"
    scaled = made["x_train"].reshape(-1, channels) / 255
    np.testing.assert_allclose(source.mean, scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(source.std, scaled.std(0), rtol=1e-12)


@pytest.mark.parametrize(("name", "flip"), [("mnist", False), ("flowers", True), ("SVHN", False)])
def test_packed_digits_are_not_mirrored(tmp_path, name, flip):
    np.savez(tmp_path / f"{name}.npz", **arrays())
    assert open_source(str(tmp_path / f"{name}.npz")).flip == flip


def test_a_channel_without_any_contrast_can_be_normalised():
    _, std = statistics(np.full((3, 4, 4), 7, np.uint8))
    assert std == (1 / 255,)


BAD_ARRAYS = [
    ({"x_test": None}, "no x_test in it; expected x_train, y_train, x_test, y_test"),
    ({"x_train": np.zeros((12, 8, 8, 3))}, "x_train: got float64, expected uint8"),
    ({"x_train": pixels(12, 8)}, r"x_train: got \(12, 8\), expected \(N, H, W\)"),
    ({"x_train": pixels(12, 8, 8, 4)}, r"x_train: got \(12, 8, 8, 4\), expected"),
    ({"x_test": pixels(0, 8, 8, 3)}, r"x_test: got \(0, 8, 8, 3\), expected"),
    ({"x_test": pixels(5, 8, 8)}, "x_test: got 1 channels, expected 3 as in x_train"),
    ({"y_train": np.arange(11)}, r"y_train: got \(11,\), expected \(12,\), one for each image"),
    ({"y_test": np.zeros((5, 1), int)}, r"y_test: got \(5, 1\), expected \(5,\)"),
    ({"y_train": np.zeros(12)}, "y_train: got float64, expected whole numbers"),
    ({"y_train": np.arange(12) - 1}, "y_train: got label -1, expected from 0 up"),
    ({"y_test": np.arange(5)}, "y_test: got label 4, expected 0 to 3 as in y_train"),
    ({"x_test": np.array([{}])}, "not an .npz file that can be read"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_ARRAYS, ids=[m[:20] for _, m in BAD_ARRAYS])
def test_packed_arrays_that_do_not_fit(tmp_path, changed, message):
    made = {name: value for name, value in arrays(**changed).items() if value is not None}
    np.savez(tmp_path / "a.npz", **made)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(tmp_path / "a.npz"))
    assert str(error.value).startswith(str(tmp_path / "a.npz"))


def test_a_damaged_or_missing_file_of_arrays(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"a\.npz: no such file"):
        open_source(str(path))
    np.savez(path, **arrays())
    for broken in (path.read_bytes()[:900], b"", b"nothing"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.npz: not an \.npz file that can be read"):
            open_source(str(path))
    with path.open("wb") as file:
        np.save(file, pixels(3))
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz file that can be read"):
        open_source(str(path))


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """Five atlases of 2 x 3 training images, one of 3 x 3 test images."""
    tables = {f"train{i}": pixels(64, 96, 3) for i in range(1, 6)} | {"test": pixels(96, 96, 3)}
    for name, table in tables.items():
        Image.fromarray(table).save(tmp_path / f"{name}.webp", lossless=True)
    y_train, y_test = np.arange(30) % 10, np.arange(9)
    np.savez(tmp_path / "labels.npz", y_train=y_train, y_test=y_test, test_lossy_idx=[1, 7])
    return tmp_path


def test_an_atlas_of_cifar10_row_by_row_without_its_lossy_images(atlas):
    source = open_source(str(atlas))
    assert (len(source.train), len(source.test), source.classes) == (30, 7, 10)
    table = np.asarray(Image.open(atlas / "train3.webp"))
    picture, label = source.read(2 * 6 + 4, "train")  # second row, second column
    assert np.array_equal(picture, table[32:64, 32:64]) and label == 6
    table = np.asarray(Image.open(atlas / "test.webp"))
    assert [source.test[i][1] for i in range(7)] == [0, 2, 3, 4, 5, 6, 8]
    assert np.array_equal(source.test[1][0], table[:32, 64:])


def test_an_atlas_that_does_not_fit_its_labels(atlas):
    (atlas / "train5.webp").unlink()
    with pytest.raises(ValueError, match=r"train5\.webp: no such file"):
        open_source(str(atlas))
    Image.fromarray(pixels(64, 90, 3)).save(atlas / "train5.webp", lossless=True)
    with pytest.raises(ValueError, match=r"train5\.webp: got 90 x 64 pixels, expected multiples"):
        open_source(str(atlas))
    (atlas / "train5.webp").write_bytes((atlas / "train4.webp").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"train5\.webp: not an image that can be read"):
        open_source(str(atlas))
    Image.fromarray(pixels(64, 64, 3)).save(atlas / "train5.webp", lossless=True)
    with pytest.raises(ValueError, match=r"y_train: got \(30,\), expected \(28,\)"):
        open_source(str(atlas))


@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"no cifar10 in {DATA.name}: PSVIT_DATA")
def test_the_real_cifar10(atlas):
    for name in ("test.webp", "labels.npz"):
        shutil.copy(CIFAR / name, atlas / name)
    with np.load(CIFAR / "labels.npz") as labels:
        assert np.bincount(labels["y_train"]).tolist() == [5000] * 10
        kept = np.delete(np.arange(10000), labels["test_lossy_idx"])
        y_test = labels["y_test"][kept]
        fewer = {**labels, "y_train": labels["y_train"][:30]}
    np.savez(atlas / "labels.npz", **fewer)  # as many as the made atlases have
    source = open_source(str(atlas))
    table = np.asarray(Image.open(CIFAR / "test.webp")).reshape(100, 32, 100, 32, 3)
    images = table.transpose(0, 2, 1, 3, 4).reshape(10000, 32, 32, 3)
    assert np.array_equal(source.test.images, images[kept]) and len(source.test) == 9980
    assert np.array_equal(source.test.labels, y_test)


# --- data sets of libraries ------------------------------------------------------------------


def test_a_data_set_of_torchvision_in_a_folder(folder):
    source = open_source(f"torch/image_folder:{folder}")
    assert (len(source.train), len(source.test), source.classes) == (8, 6, 2)
    assert source.channels == 3 and source.flip


def write_mnist(root: Path, count: int) -> np.ndarray:
    images = pixels(count, 28, 28)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        head = struct.pack(">4I", 0x803, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        head = struct.pack(">2I", 0x801, count)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels)
    return images


def test_grey_digits_of_torchvision_are_not_mirrored(tmp_path):
    images = write_mnist(tmp_path, 20)
    source = open_source(f"torch/mnist:{tmp_path}")
    assert (source.classes, source.channels, source.flip) == (10, 1, False)
    assert np.array_equal(source.read(7, "train")[0], images[7]) and source.read(7, "test")[1] == 7
    found, _ = next(train_batches(source, Loading((28, 28), 10, **STRONG), epoch=0))
    assert found.shape == (10, 1, 28, 28)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch/cifar10", "expected torch/NAME:FOLDER"),
        ("torch/cifar10:nowhere", "expected torch/NAME:FOLDER"),
        ("torch/cifar10:.", "torch/cifar10:.: Dataset not found or corrupted"),
        ("torch/cifar99:.", "torch/cifar99:.: Unknown torchvision dataset cifar99"),
        ("tfds/imagenet2012", "got tfds/imagenet2012, a stream; expected images that can be read"),
        ("wds/imagenet", "got wds/imagenet, a stream; expected images that can be read"),
    ],
)
def test_a_data_set_that_can_not_be_had(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        open_source(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hugging_face_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"hfds/cifar10: datasets not installed; run: pip install"):
        open_source("hfds/cifar10")


class Table(list):
    """As much of a table of Hugging Face as is asked for."""

    features: dict

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        return {**row, "img": Image.open(io.BytesIO(row["img"]))}


@pytest.fixture
def hugging_face(monkeypatch, tmp_path) -> types.ModuleType:
    """A stand-in for their library that knows one data set."""
    made = types.ModuleType("datasets")
    made.Image, made.ClassLabel = type("Image", (), {}), type("ClassLabel", (), {})
    label = made.ClassLabel()
    label.names = ["cat", "dog"]
    made.table = Table()
    made.table.features = {"id": None, "img": made.Image(), "kind": label, "coarse": label}
    for i in range(6):
        Image.fromarray(pixels(8, 8)).save(tmp_path / "row.png")
        row = {"id": i, "img": (tmp_path / "row.png").read_bytes(), "kind": i % 2, "coarse": 0}
        made.table.append(row)
    made.get_dataset_split_names = lambda name: ["train", "test"]
    made.load_dataset = lambda name, split, cache_dir: made.table
    made.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", made)
    return made


def test_a_table_of_hugging_face_by_its_kinds_of_columns(hugging_face):
    source = open_source("hfds/someone/pets")
    assert (len(source.train), source.classes, source.channels) == (6, 2, 1)
    assert [source.read(i, "train")[1] for i in range(6)] == [0, 1] * 3
    row = dict(list.__getitem__(hugging_face.table, 3))
    hugging_face.table[3] = {**row, "img": row["img"][:60]}
    with pytest.raises(CorruptImageError, match="train image 3 of hfds/someone/pets: not an image"):
        source.read(3, "train")


def test_a_table_of_hugging_face_that_does_not_fit(hugging_face):
    hugging_face.get_dataset_split_names = lambda name: ["train", "extra"]
    with pytest.raises(ValueError, match="hfds/pets: got the splits train, extra, expected train"):
        open_source("hfds/pets")
    hugging_face.get_dataset_split_names = lambda name: ["train", "validation"]
    del hugging_face.table.features["img"]
    with pytest.raises(ValueError, match="got columns id, kind, coarse, expected one of Image"):
        open_source("hfds/pets")
