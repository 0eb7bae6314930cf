"""Batches of images that nothing but seed and epoch decide."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sources import STRONG, gathered, packed_source, pixels, write_pets

from psvit.train import data as batches_module
from psvit.train.augment import Augment
from psvit.train.data import Loading, steps, test_batches, train_batches
from psvit.train.packed import Packed
from psvit.train.sources import CorruptImageError, open_source

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")


def assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)}, expected {tuple(b.shape)}"
        assert torch.equal(a, b), f"{tuple(a.shape)}: differ by up to {(a - b).abs().max()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pets(tmp_path)


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


def test_large_images_are_cropped_to_parts_and_resized():
    """On images that brighten from 0 to 190 from left to right; small ones stay whole, moved."""
    ramp = np.tile(2 * np.arange(96, dtype=np.uint8), (96, 1))
    train = Packed(np.stack([ramp] * 24), np.zeros(24, int))
    source = replace(packed_source(channels=1), train=train, mean=(0.0,), std=(1 / 255,))
    large, small, narrow = (
        gathered(train_batches(source, Loading(size, 24), epoch=0))[0]
        for size in ((64, 80), (32, 32), (32, 24))
    )
    assert large.shape == (24, 1, 64, 80)
    spans = large.amax((1, 2, 3)) - large.amin((1, 2, 3))
    assert spans.min() < 100 < 150 < spans.max(), spans
    assert small.shape == (24, 1, 32, 32) and narrow.shape == (24, 1, 32, 24)
    assert small.amax((1, 2, 3)).min() > 190 * 3 / 4, small.amax((1, 2, 3))


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
