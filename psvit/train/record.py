"""What a run writes for people: weights, metrics, curves, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import whole_file
from ..plots import draw_training
from .config import Config


def write_epoch(
    folder: Path,
    config: Config,
    history: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor],
) -> None:
    """``model.safetensors``, ``metrics.jsonl`` and ``config.yaml``, each whole.

    Raises:
        OSError: one of them can't be written.
    """
    import yaml
    from safetensors.torch import save_file

    with whole_file(folder / "model.safetensors") as work:
        save_file({name: value.contiguous() for name, value in weights.items()}, work)
    with whole_file(folder / "metrics.jsonl") as work:
        work.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    with whole_file(folder / "config.yaml") as work:
        work.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def write_curves(folder: Path, config: Config, history: Sequence[Mapping[str, Any]]) -> None:
    """``curves.png``, whole.

    Raises:
        OSError: it can't be written.
    """
    with whole_file(folder / "curves.png") as work:
        draw_training(history, work, title=f"{config.model} on {Path(config.data).name}")


class Events:
    """TensorBoard's events of a run; nothing where it isn't wanted or not installed.

    Args:
        folder: of the run; events go into ``tensorboard`` in it.
        wanted: whether to write any.
        updates: steps that a resumed run has behind it; later events of before are dropped.
    """

    def __init__(self, folder: Path, *, wanted: bool, updates: int) -> None:
        self._writer: Any = None
        if wanted and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=updates or None)

    def add(self, updates: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after so many steps."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, updates)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
