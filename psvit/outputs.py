"""What a model's outputs are, whichever library it is from, and how far apart those of two are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def logits_of(output: Any) -> Tensor:
    """Class scores, or features where a model has no classes, `[B, n]`, from any host's output."""
    for name in ("logits", "pooler_output", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            output = value
            break
    if isinstance(output, (tuple, list)):
        output = output[0]
    return output.mean(1) if output.dim() == 3 else output


def kl_divergence(scores: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(reference || scores) of the classes, nats, mean over the images: one number.

    Args:
        scores, reference: class scores `(B, classes)`.
        temperature: that both are divided by. The result is multiplied by its square, so that
            gradients stay as large (arXiv 1503.02531, section 2).
    """
    each = kl_divergences(scores / temperature, reference / temperature)
    return temperature**2 * each.mean()


def kl_divergences(scores: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || scores) of each image, nats, `(B,)`; class scores `(B, classes)`."""
    log_q, log_p = (x.log_softmax(1) for x in (scores, reference))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)


def distance_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """How far outputs are from the original's: KL, or where a model has no classes the squared
    error relative to them; called with the outputs and the original's, `(B, n)`."""
    return kl_divergence if has_classes(model) else _relative_error


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().sum() / wanted.square().sum()


def has_classes(model: nn.Module) -> bool:
    """Whether the outputs of a host's model, or of what stands around one, are class scores."""
    if hasattr(model, "num_classes"):  # timm; torchvision has it too, and always classes
        return int(model.num_classes) > 0  # type: ignore[arg-type]
    hub = type(model).__module__.startswith("transformers.")
    return not hub or "ForImageClassification" in type(model).__name__
