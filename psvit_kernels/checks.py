"""Checks that several operations share. Each message names the argument, what it was, what fits."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def is_tensor(name: str, value: object, dims: int, shape: str) -> None:
    """Raises unless ``value`` is a floating-point tensor with ``dims`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor of shape {shape}")
    if value.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point dtype")


def integer(name: str, value: object) -> int:
    """The value as an int; whole numbers of any integer type will do, 1.0 will not."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None


def number(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, expected a number") from None


def integers(name: str, values: object) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)  # type: ignore[attr-defined]
    except TypeError:
        raise TypeError(f"{name}: got {values!r}, expected a sequence of integers") from None


def parameter(name: str, value: Tensor, dtype: torch.dtype, other_name: str, other: Tensor) -> None:
    """Raises unless a small tensor beside ``other`` is float32 or of ``dtype``, on its device."""
    if value.dtype not in (torch.float32, dtype):
        expected = " or ".join(str(t) for t in dict.fromkeys((torch.float32, dtype)))
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
    if value.device != other.device:
        raise ValueError(
            f"{name}: is on device {value.device}, expected {other.device} as {other_name}"
        )


def unit_last_stride(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: got stride {value.stride(-1)} on the last dimension, expected 1; "
            f"call .contiguous() on it"
        )


def same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless both tensors have one dtype and live on one device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype} as {other_name}")
    if value.device != other.device:
        raise ValueError(
            f"{name}: is on device {value.device}, expected {other.device} as {other_name}"
        )


def size(name: str, value: Tensor, dim: int, meaning: str, expected: int, source: str) -> None:
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} with {meaning} {value.shape[dim]}, "
            f"expected {expected} as {source}"
        )


def not_empty(name: str, value: Tensor, dim: int, meaning: str) -> None:
    if value.shape[dim] == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected at least one {meaning}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype to cast to where autocast is on, as PyTorch's own attention does."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
