"""State dicts from files of safetensors or PyTorch, into models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict that a file holds, in float32.

    Raises:
        ValueError: missing, not such a file, or no state dict in it; the message names the file.
        ModuleNotFoundError: a file of safetensors, which isn't installed.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        state = _read(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # safetensors and pickle raise what they like on a bad file
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} can't be read: {said}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    found = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in found if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def fill(model: nn.Module, state: Mapping[str, Tensor], source: Path, name: str) -> None:
    """Loads a state dict that fits; one that doesn't changes nothing.

    Args:
        source, name: of the file and of the model, for the message.

    Raises:
        ValueError: missing or unknown tensors, or other shapes: the first of each, and how many.
    """
    own = model.state_dict()
    wrong = [
        f"{text} {names[0]} ({len(names)})"
        for text, names in (
            ("it lacks", [k for k in own if k not in state]),
            ("it has an unknown", [k for k in state if k not in own]),
            ("another shape of", [k for k in own if k in state and own[k].shape != state[k].shape]),
        )
        if names
    ]
    if wrong:
        raise ValueError(f"{source} doesn't fit {name}: {'; '.join(wrong)}")
    model.load_state_dict(state)
