"""What psvit train reads: sources by name, and batches that nothing but seed and epoch decide."""

from __future__ import annotations

import importlib.machinery
import io
import os
import random
import shutil
import signal
import struct
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from psvit.digits import Digits
from psvit.train import data as batches_module
from psvit.train.augment import Augment
from psvit.train.data import Loading, steps, test_batches, train_batches
from psvit.train.packed import Packed, statistics
from psvit.train.sources import EXPECTED, CorruptImageError, Source, open_source

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

DATA = Path(os.environ.get("PSVIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
CIFAR = DATA / "cifar10"

#: DeiT's changes.
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


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)}, expected {tuple(b.shape)}"
        assert torch.equal(a, b), f"{tuple(a.shape)}: differ by up to {(a - b).abs().max()}"


def write_images(folder: Path, count: int, side: int = 16) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(pixels(side, side, 3)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 4 training images and 3 test images of each."""
    for split, count in (("train", 4), ("val", 3)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "pets" / split / name, count)
    return tmp_path / "pets"


# --- sources --------------------------------------------------------------------------------


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


# --- batches: what decides them -------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_normalised_images_with_their_own_labels(channels):
    source = packed_source(channels=channels)
    loading = Loading((16, 16), 8)
    images, labels = gathered(train_batches(source, loading, epoch=3))
    assert images.shape == (24, channels, 16, 16) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and sorted(labels.tolist()) == list(range(24))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (source.mean, source.std))
    for image, label in zip(images, labels.tolist(), strict=True):
        picture = torch.from_numpy(source.train.images[label].reshape(16, 16, channels))
        padded = torch.nn.functional.pad(picture.permute(2, 0, 1) / 255, [2] * 4)
        padded = torch.stack([padded, padded.flip(2)])
        moved = padded.unfold(2, 16, 1).unfold(3, 16, 1)  # (2, C, 5, 5, 16, 16)
        moved = (moved.permute(0, 2, 3, 1, 4, 5).flatten(0, 2) - mean) / std
        error = (moved - image).abs().amax((1, 2, 3)).min()
        assert error < 1e-5, f"image {label} differs from each of its moves by {error} or more"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_pixel(workers):
    source, loading = packed_source(), Loading((16, 16), 6, **STRONG)
    want = gathered(train_batches(source, loading, epoch=1))
    assert_same(gathered(train_batches(source, replace(loading, workers=workers), epoch=1)), want)
    want = gathered(test_batches(source, loading))
    assert_same(gathered(test_batches(source, replace(loading, workers=workers))), want)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch_of_one_process(world):
    source, loading = packed_source(), Loading((16, 16), 6, **STRONG)
    shares = [train_batches(source, loading, epoch=2, rank=r, world=world) for r in range(world)]
    for want, *got in zip(train_batches(source, loading, epoch=2), *shares, strict=True):
        assert_same(gathered(got), want)
        assert all(len(labels) == 6 // world for _, labels in got)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_an_epoch_goes_on_where_it_stopped(start):
    source, loading = packed_source(), Loading((16, 16), 6, **STRONG)
    whole = list(train_batches(source, loading, epoch=2))
    rest = list(train_batches(source, loading, epoch=2, start=start))
    assert len(rest) == len(whole) - start
    for got, want in zip(rest, whole[start:], strict=True):
        assert_same(got, want)


def test_batches_before_the_start_are_not_read(monkeypatch):
    read = []
    monkeypatch.setattr(Packed, "__getitem__", record_reads(Packed.__getitem__, read))
    _, labels = gathered(train_batches(packed_source(), Loading((16, 16), 6), epoch=0, start=3))
    assert sorted(read) == sorted(labels.tolist()) and len(read) == 6


def record_reads(original, read):
    def recorded(self, index):
        read.append(index)
        return original(self, index)

    return recorded


def test_epochs_and_seeds_have_their_own_order_and_changes():
    source, loading = packed_source(), Loading((16, 16), 24, **STRONG)
    first, again, second, other = (
        gathered(train_batches(source, at, epoch=epoch))
        for at, epoch in ((loading, 0), (loading, 0), (loading, 1), (replace(loading, seed=1), 0))
    )
    assert_same(again, first)
    for images, labels in (second, other):
        assert not torch.equal(labels, first[1])
        both = images[labels.argsort()], first[0][first[1].argsort()]
        same = [torch.equal(a, b) for a, b in zip(*both, strict=True)]
        assert sum(same) < 6, f"{sum(same)} of 24 images are the same"


def test_the_same_picture_is_changed_in_another_way_under_each_index():
    picture = pixels(16, 16, 3)
    train = Packed(np.stack([picture] * 24), np.arange(24))
    source = replace(packed_source(), train=train)
    images, _ = gathered(train_batches(source, Loading((16, 16), 24, **STRONG), epoch=0))
    assert len(torch.unique(images.flatten(1), dim=0)) > 20


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_caller_are_left_alone(workers):
    source, loading = packed_source(), Loading((16, 16), 12, workers, **STRONG)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in train_batches(source, loading, epoch=0):
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    list(test_batches(source, loading))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_does_not_fill_a_batch_is_left_out_for_an_epoch():
    source, loading = packed_source(), Loading((16, 16), 10)
    assert steps(source, loading, 1) == steps(source, loading, 5) == 2
    _, labels = gathered(train_batches(source, loading, epoch=0))
    assert len(set(labels.tolist())) == 20


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (25, 1, "batch: got 25, expected at most 24, the training images of made"),
        (10, 4, "batch: got 10, expected a multiple of 4, the number of processes"),
    ],
)
def test_a_batch_that_does_not_fit(batch, world, message):
    with pytest.raises(ValueError, match=message):
        steps(packed_source(), Loading((16, 16), batch), world)
    with pytest.raises(ValueError, match=message):  # before anything is read
        train_batches(packed_source(), Loading((16, 16), batch), epoch=0, world=world)


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_each_test_image_comes_once(world):
    source, loading = packed_source(), Loading((16, 16), 4)
    shares = [list(test_batches(source, loading, rank=r, world=world)) for r in range(world)]
    labels = [label for share in shares for _, found in share for label in found.tolist()]
    assert sorted(labels) == list(range(11))


# --- changes --------------------------------------------------------------------------------


def test_test_images_that_fit_are_not_resized_and_others_are_cropped():
    source = packed_source(side=16)
    images, _ = gathered(test_batches(source, Loading((16, 16), 4)))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (source.mean, source.std))
    want = torch.from_numpy(source.test.images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images, (want - mean) / std)
    for side in (8, 24):
        images, _ = gathered(test_batches(source, Loading((side, side), 4)))
        assert images.shape == (11, 3, side, side)


POLICIES = [None, "rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m3-w3"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_policy_takes_grey_and_colour(policy, channels):
    source = packed_source(channels=channels)
    loading = Loading((16, 16), 24, auto_augment=policy, random_erasing=0.5)
    for epoch in range(3):
        images, _ = gathered(train_batches(source, loading, epoch=epoch))
        assert images.shape == (24, channels, 16, 16) and images.isfinite().all()


def test_a_policy_at_its_highest_magnitude_leaves_an_image():
    augment = Augment(
        (16, 16), (0.5,) * 3, (0.5,) * 3, flip=True,
        auto_augment="rand-m10-n1-inc1", random_erasing=0.0,
    )  # fmt: skip
    picture = Image.fromarray(pixels(16, 16, 3))
    black = [bool((augment(picture, i) == -1).all()) for i in range(100)]
    assert not any(black), f"{sum(black)} of 100 images are black"


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-x3", "augmix-q1", "none"])
def test_an_unknown_policy_is_refused_before_anything_is_read(policy):
    loading = Loading((16, 16), 8, auto_augment=policy)
    with pytest.raises(ValueError, match=f'auto_augment: got "{policy}", expected a policy'):
        train_batches(packed_source(), loading, epoch=0)


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("flip", [False, True])
def test_pictures_are_mirrored_only_where_that_means_the_same(side, flip):
    half = np.zeros((side, side), np.uint8)
    half[:, : side // 2] = 255
    train = Packed(np.stack([half] * 32), np.zeros(32, int))
    source = replace(packed_source(side=side, channels=1), train=train, flip=flip)
    images, _ = gathered(train_batches(source, Loading((side, side), 32), epoch=0))
    mirrored = images[..., : side // 2].mean((1, 2, 3)) < images[..., side // 2 :].mean((1, 2, 3))
    assert bool(mirrored.any()) == flip, f"{int(mirrored.sum())} of 32 are mirrored"


def test_large_images_are_cropped_to_parts_and_resized(tmp_path):
    source = packed_source(count=8, side=96)
    images, _ = gathered(train_batches(source, Loading((64, 80), 8), epoch=0))
    assert images.shape == (8, 3, 64, 80)
    small, _ = gathered(train_batches(source, Loading((32, 24), 8), epoch=0))
    assert small.shape == (8, 3, 32, 24)


# --- corrupt images -------------------------------------------------------------------------


@pytest.fixture
def damaged(folder: Path) -> Path:
    """One training image and one test image can't be read."""
    for file in (folder / "train" / "dog" / "1.png", folder / "val" / "cat" / "2.png"):
        file.write_bytes(file.read_bytes()[:100])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_in_one_line(damaged, workers):
    source, loading = open_source(str(damaged)), Loading((16, 16), 4, workers)
    with pytest.raises(CorruptImageError) as error:
        list(train_batches(source, loading, epoch=0))
    file = damaged / "train" / "dog" / "1.png"
    assert str(error.value) == f"{file}: not an image that can be read"
    with pytest.raises(CorruptImageError) as error:
        list(test_batches(source, loading))
    file = damaged / "val" / "cat" / "2.png"
    assert str(error.value) == f"{file}: not an image that can be read"


def test_a_file_that_is_gone_is_named_with_the_reason(folder):
    source = open_source(str(folder))
    (folder / "train" / "cat" / "0.png").unlink()
    with pytest.raises(CorruptImageError, match=r"0\.png: No such file or directory"):
        source.read(0, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_skipped_with_a_warning_if_asked(damaged, workers):
    source = open_source(str(damaged))
    loading = Loading((16, 16), 4, workers, skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"dog/1\.png: not an image .*; skipped"):
        _, labels = gathered(train_batches(source, loading, epoch=0))
    assert labels.bincount().tolist() == [4, 4]  # the next dog in its place
    with pytest.warns(UserWarning, match=r"cat/2\.png: not an image .*; skipped"):
        _, labels = gathered(test_batches(source, loading))
    assert labels.tolist() == [0, 0, 1, 1, 1]  # none in its place: no image counts twice


def test_the_last_image_is_replaced_by_the_first(folder):
    (folder / "train" / "dog" / "3.png").write_bytes(b"")
    source = open_source(str(folder))
    with pytest.warns(UserWarning, match=r"dog/3\.png"):
        loading = Loading((16, 16), 4, skip_corrupt=True)
        _, labels = gathered(train_batches(source, loading, epoch=0))
    assert labels.bincount().tolist() == [5, 3]


def test_many_corrupt_images_in_a_row_are_an_error_after_all(folder, monkeypatch):
    monkeypatch.setattr(batches_module, "MOST_UNREADABLE", 3)
    for i in (0, 1, 2):
        (folder / "train" / "cat" / f"{i}.png").write_bytes(b"")
    source, loading = open_source(str(folder)), Loading((16, 16), 8, skip_corrupt=True)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(CorruptImageError, match=r"cat/2\.png: .*; neither were the 2 images before"),
    ):
        list(train_batches(source, loading, epoch=0))


# --- Ctrl-C ---------------------------------------------------------------------------------


class Interrupting(Packed):
    """The terminal's Ctrl-C, which every process gets, while an image is read."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_workers_leave_ctrl_c_to_the_process_that_trains():
    source = packed_source()
    source = replace(source, train=Interrupting(source.train.images, source.train.labels))
    _, labels = gathered(train_batches(source, Loading((16, 16), 8, workers=1), epoch=0))
    assert len(labels) == 24
