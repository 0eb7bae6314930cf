"""The model of a run, its teacher, and the loss that both make."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import init, slimming
from ..outputs import kl_divergence
from ..weights import fill, read_state
from .config import Config
from .sources import Source


def image_size(config: Config, source: Source) -> tuple[int, int]:
    """Height and width that the model gets, in pixels."""
    if config.img_size is not None:
        return config.img_size, config.img_size
    return source.size or (224, 224)


def make_model(config: Config, source: Source) -> nn.Module:
    """The model to train, initialised by ``config.seed``.

    Raises:
        ValueError, TypeError: an unknown name, arguments that don't fit, fewer classes than the
            data have, weights that don't fit.
    """
    classes = source.classes if config.num_classes is None else config.num_classes
    if classes < source.classes:
        raise ValueError(
            f"num_classes: got {classes}, expected at least {source.classes} as in {source.name}"
        )
    options = {
        "num_classes": classes,
        "img_size": image_size(config, source),
        "in_chans": source.channels,
        "drop_path_rate": config.drop_path,
        **config.model_args,
    }
    torch.manual_seed(config.seed)
    if config.schedule is not None:
        options |= {"schedule": config.schedule, "widths": config.widths}
    model = _make("model", config.model, options)
    _initialise(model, config)
    if config.weights is not None:
        fill(model, read_state(Path(config.weights)), Path(config.weights), config.model)
    model = _slimmed(model, config)
    if config.checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _initialise(model: nn.Module, config: Config) -> None:
    if config.init == "default":
        if config.init_args:
            raise ValueError(f"init_args: got {config.init_args}, expected none with init: default")
        return
    function = {"impulse": init.impulse_init_, "mimetic": init.mimetic_init_}[config.init]
    generator = torch.Generator().manual_seed(config.seed)
    options = {"model": model, "generator": generator, **config.init_args}
    _called("init_args", function, options)


def _slimmed(model: nn.Module, config: Config) -> nn.Module:
    """The model as the method says that ``config.slim`` names."""
    if config.slim == "none":
        return model
    method = {"evit": slimming.evit, "evo_vit": slimming.evo_vit, "sit": slimming.sit}[config.slim]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it must be trained
        return _called("slim_args", method, {"model": model, "inplace": True, **config.slim_args})


def make_teacher(config: Config, source: Source) -> nn.Module | None:
    """The teacher, in eval mode, without gradients; None if the run has none.

    Raises:
        ValueError: an unknown name, weights that don't fit, another number of classes.
    """
    if config.teacher is None:
        return None
    options = {"in_chans": source.channels, **config.teacher_args}
    options.setdefault("num_classes", config.num_classes or source.classes)
    if config.teacher_weights is None:
        options["pretrained"] = True
    teacher = _make("teacher", config.teacher, options)
    if config.teacher_weights is not None:
        path = Path(config.teacher_weights)
        fill(teacher, read_state(path), path, config.teacher)
    return teacher.eval().requires_grad_(False)


def _make(key: str, name: str, options: dict[str, Any]) -> nn.Module:
    """A model of timm's registry, or "psvit" with a schedule."""
    import timm

    from ..models import registration
    from ..models.vit import PSViT

    if name == "psvit":
        return _called(f"{key}_args", PSViT, options)

    registration.register()
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f'{key}: timm has no "{name}"{hint}')
    return _called(f"{key}_args", timm.create_model, {"model_name": name, **options})


def _called(key: str, function: Any, options: dict[str, Any]) -> Any:
    """The function's result; a TypeError of its arguments becomes one that names the key."""
    try:
        return function(**options)
    except TypeError as error:
        raise TypeError(f"{key}: {error}") from error


class Learner(nn.Module):
    """A model and what it learns with: images and targets in, the loss out.

    One module, so that data parallelism sees all that is trained, the projection of the features
    among it, and starts every pass at its root.

    Args:
        model: what is trained; with timm's interface.
        teacher: or None.
        config: of the loss.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, config: Config) -> None:
        super().__init__()
        self.model = model
        self.teacher = [teacher]  # in a list: no submodule, so it is neither saved nor sharded
        self.config = config
        self.projection: nn.Module = nn.Identity()
        if teacher is not None and config.distill_features:
            widths = int(model.num_features), int(teacher.num_features)  # type: ignore[arg-type]
            self.projection = nn.Linear(*widths)
        self.second_head = slimming.SecondHead(model) if config.slim == "evo_vit" else None
        self.recalibration: slimming.Recalibration | None = None
        if teacher is not None and config.distill_tokens:
            self.recalibration = slimming.Recalibration(model, teacher)

    def aids(self) -> list[nn.Parameter]:
        """What is trained beside the model."""
        own = {id(parameter) for parameter in self.model.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """The loss, one number in float32; without targets the class scores `(B, classes)`.

        Args:
            images: `(B, C, H, W)`.
            targets: class indices `(B,)`, or the part of each class `(B, classes)`.

        Source: soft distillation as in DeiT, arXiv 2012.12877, equation 2; and see
        ``psvit.slimming.SecondHead`` and ``Recalibration``.
        """
        if targets is None:
            return self.model(images)
        (teacher,) = self.teacher
        if teacher is None:
            return self._loss(images, targets)
        if self.recalibration is None:
            return self._distilled_loss(images, targets, teacher)
        with self.recalibration.watching() as tokens:
            loss = self._distilled_loss(images, targets, teacher)
        return loss + self.config.distill_tokens * self.recalibration(*tokens)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.second_head is None:
            return self._cross_entropy(self.model(images), targets)
        tokens, scores, _ = _outputs(self.model, images)
        return self._hard_loss(tokens, scores, targets)

    def _distilled_loss(self, images: Tensor, targets: Tensor, teacher: nn.Module) -> Tensor:
        tokens, scores, features = _outputs(self.model, images)
        with torch.no_grad():
            _, wanted, wanted_features = _outputs(teacher, images)
        part = self.config.distill
        loss = (1 - part) * self._hard_loss(tokens, scores, targets)
        temperature = self.config.temperature
        loss = loss + part * kl_divergence(scores.float(), wanted.float(), temperature)
        if self.config.distill_features:
            projected = self.projection(features).float()
            difference = F.mse_loss(projected, wanted_features.float())
            loss = loss + self.config.distill_features * difference
        return loss

    def _hard_loss(self, tokens: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
        loss = self._cross_entropy(scores, targets)
        if self.second_head is None:
            return loss
        return (loss + self._cross_entropy(self.second_head(tokens), targets)) / 2

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing if targets.dim() == 1 else 0.0
        return F.cross_entropy(scores.float(), targets, label_smoothing=smoothing)


def _outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the last layer, class scores, and the vector that the classifier makes them of."""
    tokens = model.forward_features(images)
    features = model.forward_head(tokens, pre_logits=True)
    return tokens, model.get_classifier()(features), features
