"""Handwritten digits and a small vision transformer for them: what ``psvit demo`` works on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .outputs import kl_divergence


class Digits(NamedTuple):
    """scikit-learn's 1,797 digits, 8 x 8 grey values from -1 to 1, split by a fixed seed.

    A quarter is held out for the test, with as many of each digit as in the rest. Source: UCI
    Machine Learning Repository, Optical Recognition of Handwritten Digits (Alpaydin, Kaynak).
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(data.target)
        train, test = train_test_split(
            range(len(labels)), test_size=0.25, random_state=0, stratify=data.target
        )
        return cls(images[train], labels[train], images[test], labels[test])


def small_vit(width: int, depth: int, heads: int) -> nn.Module:
    """timm's VisionTransformer with one token a pixel: 64 tokens on a grid of 8 x 8, and a class.

    A single pixel says nothing about a digit, so the patch embedding sees its neighbours too (a
    convolution of 5), as in overlapping patch embeddings (arXiv 2204.12143); and the position
    embedding starts as sines and cosines, since 1,347 images are too few to learn where things are.
    """
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
        weight_init="jax",
    )
    model.patch_embed.proj = nn.Conv2d(1, width, kernel_size=5, padding=2)
    places = build_sincos2d_pos_embed([8, 8], dim=width, temperature=20)
    assert model.pos_embed is not None
    model.pos_embed.data[0, 1:] = places / 2
    return model


def jittered(images: Tensor) -> Tensor:
    """Each image turned by up to 11 degrees, scaled by 10 % and moved by half a pixel or so."""
    n = len(images)
    angle, scale = 0.2 * _uniform(n), 1 + 0.1 * _uniform(n)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    shift = 0.15 * _uniform(n, 2, 1)
    where = F.affine_grid(
        torch.cat([scale.view(n, 1, 1) * matrix, shift], 2), list(images.shape), align_corners=False
    )
    return F.grid_sample(images + 1, where, align_corners=False) - 1  # outside is paper, -1


def _uniform(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape) - 1


@dataclass(frozen=True)
class Training:
    """AdamW, one warm-up and decay of the learning rate, gradients clipped at norm 1."""

    epochs: int
    rate: float
    batch: int = 64

    def steps(self, digits: Digits) -> int:
        return self.epochs * math.ceil(len(digits.images) / self.batch)

    def run(
        self,
        model: nn.Module,
        digits: Digits,
        step: Callable[[], object],
        teacher: nn.Module | None = None,
    ) -> None:
        """Trains on the labels, and on the class probabilities of ``teacher`` if there is one.

        In one thread: layers this small gain little from a second one, and on a busy machine
        threads spend more time waiting for each other than computing.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._run(model, digits, step, teacher)
        finally:
            torch.set_num_threads(threads)

    def _run(
        self,
        model: nn.Module,
        digits: Digits,
        step: Callable[[], object],
        teacher: nn.Module | None,
    ) -> None:
        used = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(used, lr=self.rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=max(1, self.steps(digits)), pct_start=0.15
        )
        model.train()
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(digits.images)).split(self.batch):
                images, labels = jittered(digits.images[chosen]), digits.labels[chosen]
                loss = _loss(model(images), labels, _taught(teacher, images))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(used, 1.0)
                optimizer.step()
                schedule.step()
                step()
        model.eval()


def _taught(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    if teacher is None:
        return None
    with torch.no_grad():
        return teacher(images)


def _loss(scores: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    """Cross-entropy, and half of it distillation: KL at a temperature (arXiv 1503.02531)."""
    hard = F.cross_entropy(scores, labels)
    if taught is None:
        return hard
    return (hard + kl_divergence(scores, taught, temperature=2)) / 2


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Part of the held-out test images that the model gets right."""
    with torch.inference_mode():
        found = model(digits.test_images).argmax(1)
    return float((found == digits.test_labels).double().mean())
