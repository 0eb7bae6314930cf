"""How every kernel is launched: with which configuration, found how, and on which device.

Each kernel has a short list of documented configurations (``configs.py``), the likeliest first. The
first call of a kernel with a new bucket of shapes lets ``triton.autotune`` time them all and keeps
the best. Timing waits for the device, so nothing is timed while a CUDA graph is captured (the first
of the list serves, or what an earlier call found), in deterministic mode (always the first, so that
two processes give the same bits) and in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import interpreting

Grid = Callable[[dict[str, Any]], tuple[int, ...]]

#: What timing found, by kernel, key and kinds of arguments.
_best: dict[Hashable, triton.Config] = {}


def bucket(n: int) -> int:
    """Sizes that share a configuration: the power of two at or above, from 16 to 4096."""
    return min(4096, max(16, triton.next_power_of_2(n)))


def launch(
    kernel: Any,
    grid: Grid,
    arguments: dict[str, Any],
    configs: Sequence[triton.Config],
    key: Hashable,
) -> None:
    """Runs a kernel on the device of its first tensor.

    Args:
        kernel: a ``triton.jit`` function.
        grid: from the meta-parameters (block sizes) to the number of programs.
        arguments: all of the kernel's but the configuration's, by name. None is a tensor that is
            absent, which the kernel sees at compile time.
        configs: the configurations to choose from, the likeliest first.
        key: what the best of them depends on, besides kernel and dtypes: buckets of shapes.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    with _on(tensor.device):
        run(kernel, grid, arguments, configs, key)


def run(
    kernel: Any,
    grid: Grid,
    arguments: dict[str, Any],
    configs: Sequence[triton.Config],
    key: Hashable,
) -> None:
    """As ``launch``. Tests that compile for other machines put their own function here."""
    config = configs[0]
    if len(configs) > 1 and not torch.are_deterministic_algorithms_enabled():
        kinds = tuple(a.dtype if isinstance(a, Tensor) else a is None for a in arguments.values())
        name = (kernel, key, kinds)
        if name not in _best and _may_time():
            tuner = triton.autotune(configs=list(configs), key=[])(kernel)
            tuner[grid](**arguments)
            _best[name] = tuner.best_config
            return
        config = _best.get(name, config)
    kernel[grid](**arguments, **config.all_kwargs())


def _may_time() -> bool:
    return not (interpreting() or torch.cuda.is_current_stream_capturing())


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; another one must be made current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
