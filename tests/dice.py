"""A run of an experiment that costs nothing; in a file of its own, as processes import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def throw(log: Path, arm: str, seed: int) -> dict[str, Any]:
    """Depends on the seed alone, and leaves a trace."""
    with open(log, "a") as stream:
        stream.write(f"{arm} {seed}\n")
    torch.manual_seed(seed)
    return {"accuracy": [float(torch.rand(()))], "threads": torch.get_num_threads(), "arm": arm}
