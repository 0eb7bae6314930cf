"""Images from files, prepared as a model expects them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: What a folder is searched for, below it too; a single file may have any ending.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preprocess:
    """From a picture to numbers: resize, crop the centre, scale to 0..1, normalise.

    Args:
        size: height and width of the crop, in pixels.
        mean: subtracted from each channel (values from 0 to 1).
        std: each channel is divided by it.
        crop: the crop's part of the resized picture: the shorter side is brought to
            ``size / crop`` before the crop. A picture smaller than that is enlarged no more than
            the crop needs, and not at all if the crop fits already.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    crop: float = 0.875

    def __call__(self, picture: Any) -> Tensor:
        """A picture of Pillow as `[C, height, width]`, float32."""
        channels = len(self.mean)
        picture = self._cropped(picture.convert("L" if channels == 1 else "RGB"))
        values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255
        values = values.reshape(*self.size, channels).permute(2, 0, 1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((values - mean) / std).contiguous()

    def _cropped(self, picture: Any) -> Any:
        from PIL import Image

        height, width = self.size
        fill = max(height / picture.height, width / picture.width)
        scale = min(fill / self.crop, max(fill, 1.0))
        if scale != 1:
            new = (
                max(width, round(picture.width * scale)),
                max(height, round(picture.height * scale)),
            )
            picture = picture.resize(new, Image.Resampling.BICUBIC)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))


def preprocess_of(model: nn.Module) -> Preprocess:
    """What timm's configuration of a model says about its images, or ImageNet's usual values."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return Preprocess()
    size = config.get("input_size") or (3, 224, 224)
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return Preprocess(
        size=tuple(patches or size[-2:]),  # type: ignore[arg-type]
        mean=tuple(config.get("mean") or IMAGENET[0]),
        std=tuple(config.get("std") or IMAGENET[1]),
        crop=config.get("crop_pct") or 0.875,
    )


def find_images(path: Path) -> list[Path]:
    """The image files of a folder and the folders below it, sorted, or the file itself.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        raise ValueError(f"{path}: no images in this folder (looked for {', '.join(ENDINGS)})")
    return found


def load_image(path: Path, preprocess: Preprocess) -> Tensor:
    """One prepared image, `[C, height, width]`.

    Raises:
        ValueError: not an image, or a damaged one; the message names the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return preprocess(picture)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read") from error


def batches(files: Sequence[Path], preprocess: Preprocess, size: int) -> Iterator[Tensor]:
    """Prepared images, ``size`` at a time, `[B, C, height, width]`."""
    for start in range(0, len(files), size):
        yield torch.stack([load_image(file, preprocess) for file in files[start : start + size]])


def read_labels(path: Path, files: Sequence[Path]) -> list[int]:
    """The class index of each file, from a CSV file with the columns ``file`` and ``label``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a CSV file, or a file without a label.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = {row["file"]: int(row["label"]) for row in csv.DictReader(stream)}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}: expected a CSV file with the columns file and label (a class index)"
        ) from error
    missing = [file.name for file in files if file.name not in rows]
    if missing:
        raise ValueError(f"{path}: no label for {missing[0]} ({len(missing)} files without one)")
    return [rows[file.name] for file in files]
