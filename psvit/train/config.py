"""``Config``: everything that a training run depends on, from a YAML file, flags or Python."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import checkpoint


class Option(NamedTuple):
    """What a key is for people, its range, and whether a resumed run may have another value."""

    help: str
    least: float | None = None
    most: float | None = None
    free: bool = False


#: What each key of ``Config`` is.
OPTIONS = {
    # What to train, on what
    "data": Option("digits, a folder of images, an .npz file, torch/NAME:FOLDER or hfds/NAME"),
    "output": Option("folder for checkpoints, weights and metrics", free=True),
    "model": Option('a model of timm or psvit, or "psvit" with a schedule'),
    "schedule": Option('of the model "psvit": one character a layer'),
    "widths": Option('of the model "psvit": channels of each stage'),
    "model_args": Option("more arguments of the model, as {patch_size: 4}"),
    "img_size": Option("pixels of a side; none: of the images in arrays, else 224", least=1),
    "num_classes": Option("none: as many as the data have", least=1),
    "weights": Option("file of weights to start from"),
    "init": Option("structured initialisation"),
    "init_args": Option("arguments of the initialisation, as {pos_scale: 18}"),
    "slim": Option("method that slims the tokens of a model of timm"),
    "slim_args": Option("arguments of that method, as {keep: 0.7} or {tokens: [98, 49, 24]}"),
    # Recipe
    "epochs": Option("passes over the training images", least=1),
    "batch": Option("images of one step, over all processes and accumulated parts", least=1),
    "accumulate": Option("parts that a batch is computed in", least=1),
    "lr": Option("highest learning rate; none: 5e-4 x batch / 512", least=0),
    "min_lr": Option("learning rate at the end of the cosine", least=0),
    "warmup_epochs": Option("epochs of linear warm-up", least=0),
    "weight_decay": Option("of AdamW; none on biases, norms, embeddings", least=0),
    "clip_grad": Option("largest norm of the gradient", least=0),
    "drop_path": Option("stochastic depth of the last layer", least=0, most=0.99),
    "label_smoothing": Option("part of a label that goes to all classes", least=0, most=1),
    "mixup": Option("alpha; 0: none", least=0),
    "cutmix": Option("alpha; 0: none", least=0),
    "auto_augment": Option("policy, as timm spells it"),
    "random_erasing": Option("probability for an image", least=0, most=1),
    "ema": Option("decay of the averaged weights, less at first; 0: none", least=0),
    # Distillation
    "teacher": Option("a model of timm to learn from"),
    "teacher_weights": Option("its file of weights; none: timm downloads them"),
    "teacher_args": Option("more arguments of the teacher"),
    "distill": Option("part of the loss that the teacher's scores make", least=0, most=1),
    "temperature": Option("of both models' scores in distillation", least=1e-3),
    "distill_features": Option("factor of the features' squared difference", least=0),
    "distill_tokens": Option("of slim: sit, factor of the recovered patches' difference", least=0),
    # How it runs
    "seed": Option("of weights, order and augmentation", least=0),
    "device": Option("auto: cuda where there is one"),
    "amp": Option("autocast; auto: bfloat16 on cuda, none elsewhere"),
    "compile": Option("torch.compile the model"),
    "checkpointing": Option("recompute activations: less memory, more time"),
    "fsdp": Option("shard parameters over the processes (FSDP2) instead of DDP"),
    "workers": Option("processes that load images, at most one a processor", least=0, free=True),
    "save_every": Option("steps between checkpoints; 0: epochs only", least=0, free=True),
    "skip_corrupt": Option("warn of an image that can't be read, and take the next"),
    "tensorboard": Option("write events for TensorBoard too, where it is installed", free=True),
}


@dataclass(frozen=True)
class Config:
    """What ``psvit train`` is to do. The defaults are DeiT's recipe (arXiv 2012.12877, table 9).

    Every field is a key of the YAML file and, with dashes, a flag.

    Raises:
        ValueError: a value out of its range or of another type; the message names its key.
    """

    # What to train, on what
    data: str = ""
    output: str = "psvit-train"
    model: str = "psvit_2d_tiny"
    schedule: str | None = None
    widths: int | list[int] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    num_classes: int | None = None
    weights: str | None = None
    init: Literal["default", "impulse", "mimetic"] = "default"
    init_args: dict[str, Any] = field(default_factory=dict)
    slim: Literal["none", "evit", "evo_vit", "sit"] = "none"
    slim_args: dict[str, Any] = field(default_factory=dict)

    # Recipe
    epochs: int = 300
    batch: int = 1024
    accumulate: int = 1
    lr: float | None = None
    min_lr: float = 1e-5
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    clip_grad: float | None = 1.0
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    ema: float = 0.99996

    # Distillation
    teacher: str | None = None
    teacher_weights: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    distill: float = 0.5
    temperature: float = 1.0
    distill_features: float = 0.0
    distill_tokens: float = 0.0

    # How it runs
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "none", "bfloat16", "float16"] = "auto"
    compile: bool = False
    checkpointing: bool = False
    fsdp: bool = False
    workers: int = 4
    save_every: int = 0
    skip_corrupt: bool = False
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for key, option in OPTIONS.items():
            object.__setattr__(self, key, _checked(key, option, getattr(self, key)))
        if not self.data:
            raise ValueError(f"data: missing; expected {OPTIONS['data'].help}")
        if (self.model == "psvit") != (self.schedule is not None):
            raise ValueError(
                f'schedule: got {self.schedule} with the model "{self.model}", expected a schedule '
                f'with the model "psvit" and only there'
            )
        if (self.schedule is None) != (self.widths is None):
            raise ValueError(f"widths: got {self.widths}, expected them where a schedule is")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: got {self.warmup_epochs}, expected fewer than the "
                f"{self.epochs} epochs"
            )
        if self.slim == "none" and self.slim_args:
            raise ValueError(f"slim_args: got {self.slim_args}, expected none with slim: none")
        if self.distill_tokens and (self.slim != "sit" or self.teacher is None):
            raise ValueError(
                f"distill_tokens: got {self.distill_tokens}, expected 0 without slim: sit and a "
                f"teacher"
            )
        if self.ema >= 1:
            raise ValueError(f"ema: got {self.ema}, expected a decay below 1")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """From keys and values, as a YAML file has them.

        Raises:
            ValueError: an unknown key, or what ``Config`` refuses.
        """
        for key in values:
            if key not in OPTIONS:
                near = difflib.get_close_matches(str(key), OPTIONS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected of: {', '.join(OPTIONS)}"
                raise ValueError(f'unknown key "{key}"; {hint}')
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML, JSON and checkpoints."""
        return dataclasses.asdict(self)

    def differences(self, other: Config) -> list[str]:
        """What of it two runs may not differ in if one is to go on where the other stopped."""
        was, now = (
            {key: getattr(config, key) for key, option in OPTIONS.items() if not option.free}
            for config in (self, other)
        )
        return checkpoint.differences(was, now)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return 5e-4 * self.batch / 512 if self.lr is None else self.lr


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        ValueError: no such file, not YAML, or something else than keys and values.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected lines such as `epochs: 100`")
    return found


# --- types ----------------------------------------------------------------------------------

_NOT = object()


def _checked(key: str, option: Option, value: Any) -> Any:
    """The value with one of its key's types, in its range."""
    expected = _types()[key]
    fitting = [found for kind in expected if (found := _as(kind, value)) is not _NOT]
    if fitting and _within(option, fitting[0]):
        return fitting[0]
    names = " or ".join(_name(kind) for kind in expected)
    span = "" if option.least is None else f" from {option.least:g}"
    span += "" if option.most is None else f" to {option.most:g}"
    raise ValueError(f"{key}: got {value!r}, expected {names}{span}")


def _within(option: Option, value: Any) -> bool:
    if type(value) not in (int, float):
        return True
    return (option.least is None or value >= option.least) and (
        option.most is None or value <= option.most
    )


@functools.cache
def _types() -> dict[str, tuple[Any, ...]]:
    """The types that each key may have."""
    unions = (typing.Union, types.UnionType)
    return {
        key: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
        for key, hint in typing.get_type_hints(Config).items()
    }


def _as(kind: Any, value: Any) -> Any:
    """The value as that type, or ``_NOT``. YAML reads 1e-3 as a text; a float takes it."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value if value in typing.get_args(kind) else _NOT
    if kind is types.NoneType:
        return value if value is None else _NOT
    if kind is float:
        return _NOT if isinstance(value, bool) else _number(value)
    if origin is list:
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value):  # as flags have it
            return [int(part) for part in value.split(",")]
        whole = isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
        return list(value) if whole else _NOT
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else _NOT
    return value if type(value) is kind else _NOT


def _number(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _NOT
    return number if math.isfinite(number) else _NOT


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' for value in typing.get_args(kind))
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    named |= {types.NoneType: "nothing", list[int]: "whole numbers"}
    return named.get(kind, "keys and values")
