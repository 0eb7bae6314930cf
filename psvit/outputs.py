"""What a model's outputs are, whichever library it is from, and how far apart those of two are."""

from __future__ import annotations

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
    log_q, log_p = ((x / temperature).log_softmax(1) for x in (scores, reference))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of each image's outputs, relative to the mean square of what is wanted.

    Steadier than KL, of which a few images, where a model is sure of what the other one isn't, are
    the most.

    Args:
        found, wanted: class scores or features, `(B, n)`.

    Returns:
        `(B,)`; the mean is 1 where the outputs are all 0.
    """
    return (found - wanted).square().sum(1) / wanted.square().sum(1).mean()


def has_classes(model: nn.Module) -> bool:
    """Whether the outputs of a host's model, or of what stands around one, are class scores."""
    if hasattr(model, "num_classes"):  # timm; torchvision has it too, and always classes
        return int(model.num_classes) > 0  # type: ignore[arg-type]
    hub = type(model).__module__.startswith("transformers.")
    return not hub or "ForImageClassification" in type(model).__name__
