"""From the name that a person types to a model with its weights and the images it expects."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import progress
from ..weights import fill, read_state
from .common import BadInputError, bad_input, need, numbers, one_line, span

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..images import Preprocess

MODEL_HELP = (
    "a name of timm (vit_tiny_patch16_224), torchvision:NAME (torchvision:vit_b_16), or "
    "hf:FOLDER, a model saved by transformers"
)


@dataclass
class Loaded:
    """A model in eval mode, on the CPU, in float32.

    Args:
        name: as it was typed.
        model: the host library's own module.
        preprocess: what its images need.
        weights: where its weights came from, for people; None if they are random.
        depth: number of layers.
    """

    name: str
    model: nn.Module
    preprocess: Preprocess
    weights: str | None
    depth: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and everything that says which weights and images it gets."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="its state dict: .safetensors, .pt or .pth"
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="let timm or torchvision download its weights"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR|FILE", help="images to run, or one image"
    )
    parser.add_argument(
        "--select", type=span, metavar="START:STOP", help="only these of the sorted images"
    )
    parser.add_argument(
        "--mean",
        type=numbers,
        metavar="X",
        help="subtracted from the pixels (0 to 1): 0.5 or R,G,B",
    )
    parser.add_argument("--std", type=numbers, metavar="X", help="what pixels are divided by")
    parser.add_argument(
        "--crop", type=float, metavar="X", help="part of the resized image that is kept (0 to 1)"
    )


def load(args: argparse.Namespace) -> Loaded:
    """The model that the arguments describe.

    Raises:
        BadInputError: no such model, one that psvit can't convert, weights that don't fit or can't
            be read, a missing extra.
    """
    from .. import adapters
    from ..images import preprocess_of

    state = None if args.weights is None else _read(args.weights)
    kind, colon, rest = args.model.partition(":")
    if kind == "hf" and colon:
        model, preprocess = _from_transformers(Path(rest))
        weights: str | None = rest
    elif kind == "torchvision" and colon:
        model, weights = _from_torchvision(rest, args.pretrained), None
        preprocess = preprocess_of(model)
    elif colon:
        raise BadInputError(f"model: got {args.model}, expected {MODEL_HELP}")
    else:
        model, weights = _from_timm(args.model, args.pretrained, state), None
        preprocess = preprocess_of(model)
    if args.pretrained and weights is None:
        weights = "pretrained"
    if state is not None:
        with _weights_option():
            fill(model, state, args.weights, args.model)
        weights = str(args.weights)
    with bad_input():
        depth = len(adapters.find(model).layers)
    preprocess = _overridden(preprocess, args)
    return Loaded(args.model, model.float().eval(), preprocess, weights, depth)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        need("demo", "safetensors")
    with _weights_option():
        return read_state(path)


@contextmanager
def _weights_option() -> Iterator[None]:
    """Turns the ValueError of weights that don't fit into bad input."""
    try:
        yield
    except ValueError as error:
        raise BadInputError(f"--weights: {error}") from error


def _overridden(preprocess: Preprocess, args: argparse.Namespace) -> Preprocess:
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is not None:
            if name == "std" and min(values) <= 0:
                raise BadInputError(f"--std: got {min(values):g}, expected more than 0")
            preprocess = replace(preprocess, **{name: values * (3 // len(values))})
    if args.crop is not None:
        if not 0 < args.crop <= 1:
            raise BadInputError(f"--crop: got {args.crop}, expected more than 0 and at most 1")
        preprocess = replace(preprocess, crop=args.crop)
    return preprocess


def select_images(args: argparse.Namespace) -> list[Path]:
    """The image files that the arguments name."""
    from ..images import find_images

    need("demo", "PIL")
    with bad_input():
        files = find_images(args.images)
    chosen = files[args.select] if args.select else files
    if not chosen:
        raise BadInputError(f"--select: leaves none of the {len(files)} images in {args.images}")
    return chosen


def read_batches(
    files: Sequence[Path],
    preprocess: Preprocess,
    size: int,
    step: Callable[[int], object] = lambda count: None,
) -> Iterator[Tensor]:
    """Batches of images, each told to ``step``; a file that can't be read is bad input."""
    from ..images import batches

    stream = batches(files, preprocess, size)
    while True:
        with bad_input():
            batch = next(stream, None)
        if batch is None:
            return
        yield batch
        step(len(batch))


def read_all(args: argparse.Namespace, preprocess: Preprocess) -> Tensor:
    """All images that the arguments name, `(B, channels, height, width)`."""
    import torch

    files = select_images(args)
    with progress("reading images", len(files)) as step:
        return torch.cat(list(read_batches(files, preprocess, 32, step)))


# --- the host libraries ---------------------------------------------------------------------


def _from_timm(name: str, pretrained: bool, state: Mapping[str, Tensor] | None) -> nn.Module:
    need("timm", "timm")
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise BadInputError(f"model: timm has no {name}{_like(name, timm.list_models())}")
    options: dict[str, Any] = {}
    if state is not None and "head.weight" in state:
        options["num_classes"] = len(state["head.weight"])
    return _made(name, lambda: timm.create_model(name, pretrained=pretrained, **options))


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    need("torchvision", "torchvision")
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise BadInputError(f"model: torchvision has no {name}{_like(name, names)}")
    weights = "DEFAULT" if pretrained else None
    return _made(name, lambda: models.get_model(name, weights=weights))


def _made(name: str, make: Any) -> nn.Module:
    try:
        return make()
    except Exception as error:  # what a download raises differs with the host and its version
        raise BadInputError(f"model: {name} can't be made: {one_line(error)}") from error


def _like(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


#: Models of transformers whose usual class has a text half too; the vision half is meant.
VISION_HALVES = {"CLIPModel": "CLIPVisionModel", "SiglipModel": "SiglipVisionModel"}


def _from_transformers(folder: Path) -> tuple[nn.Module, Preprocess]:
    need("hf", "transformers")
    if not (folder / "config.json").is_file():
        raise BadInputError(f"model: {folder} is not a model folder (it has no config.json)")
    import transformers

    transformers.logging.set_verbosity_error()
    with bad_input():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["AutoModelForImageClassification"])[0]
    architecture = VISION_HALVES.get(architecture, architecture)
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise BadInputError(f"model: transformers has no {architecture}, named in {folder}")
    model = _made(str(folder), lambda: cls.from_pretrained(folder, local_files_only=True))
    return model, _preprocess_of_folder(folder, config)


def _preprocess_of_folder(folder: Path, config: Mapping[str, Any]) -> Preprocess:
    from ..images import Preprocess

    file = folder / "preprocessor_config.json"
    said: dict[str, Any] = {}
    if file.is_file():
        with bad_input():
            said = json.loads(file.read_text(encoding="utf-8"))
    side = int(config.get("vision_config", config).get("image_size", 224))
    half = (0.5, 0.5, 0.5)
    return Preprocess(
        size=(side, side),
        mean=tuple(said.get("image_mean") or half),
        std=tuple(said.get("image_std") or half),
        crop=1.0,
    )
