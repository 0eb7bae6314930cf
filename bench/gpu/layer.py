"""A sharing layer up to its output projection: LayerNorm, V and the map applied to it.

As the package does it, in three launches; and, "fused", by the kernel of ``sharing_layer``, which
stays only if it wins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from psvit_kernels import DenseMap, apply_attention, cuda

from . import gate
from .contender import Contender, Subject, Work, compiled
from .gate import Oracle
from .rows import HEAD_DIM, Case
from .sharing_layer import fold, sharing_layer

EPS = 1e-6


def build(case: Case, sets: int, device: str) -> Work:
    b, h, n = case.shape
    width, dtype = h * HEAD_DIM, getattr(torch, case.dtype)
    random = partial(torch.randn, dtype=dtype, device=device)
    norm, projection = _parameters(width, dtype, device)
    folded = fold(norm, projection)
    inputs = [
        (random(b, n, width), DenseMap.from_dense(torch.softmax(2 * random(b, h, n, n), -1)))
        for _ in range(sets)
    ]

    def values(x: Tensor) -> Tensor:
        return projection(norm(x)).unflatten(2, (h, -1)).transpose(1, 2)

    def three(x: Tensor, stored: DenseMap) -> Tensor:
        return apply_attention(stored, values(x))

    def fused(x: Tensor, stored: DenseMap) -> Tensor:
        _refuse(x)
        return sharing_layer(x, EPS, folded, stored).transpose(1, 2)

    def eager(x: Tensor, stored: DenseMap) -> Tensor:
        return stored.dense() @ values(x)

    def oracle(part: slice) -> Oracle:
        x, stored = inputs[0]
        return _oracle(x[part], stored.dense()[part], norm, projection, eager(x, stored)[part])

    def subject(layer: Callable) -> Subject:
        calls = [partial(layer, *each) for each in inputs]
        check = partial(gate.check, lambda: {"out": calls[0]()}, oracle, gate.chunk(b, h, n))
        return Subject(calls, check=check, map_nbytes=inputs[0][1].nbytes)

    def baseline(name: str) -> Contender:
        function = {"eager": lambda: eager, "compile": lambda: compiled(eager)}[name]()
        return Contender([partial(function, *each) for each in inputs])

    return Work(
        {"dense": partial(subject, three), "fused": partial(subject, fused)},
        {name: partial(baseline, name) for name in case.baselines},
    )


def _parameters(width: int, dtype: torch.dtype, device: str) -> tuple[nn.LayerNorm, nn.Linear]:
    norm, projection = nn.LayerNorm(width, EPS), nn.Linear(width, width)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias, 0, 0.2)
    return norm.to(device, dtype), projection.to(device, dtype)


def _refuse(x: Tensor) -> None:
    """In the words of the registry, which knows nothing of this kernel."""
    reason = cuda.missing()
    if reason is None and cuda.family(x.device) not in cuda._cuda.families["sharing"]:
        reason = f"no kernel for {cuda.family(x.device)} in this build"
    if reason is not None:
        raise ValueError(f'provider "cuda" was forced but cannot serve a sharing layer: {reason}')


def _oracle(
    x: Tensor, p: Tensor, norm: nn.LayerNorm, projection: nn.Linear, eager: Tensor
) -> Oracle:
    h = p.shape[1]
    wide_norm, wide = copy.deepcopy(norm).double(), copy.deepcopy(projection).double()
    y, p = wide_norm(x.double()), p.double()
    v = wide(y)
    v_size = nn.functional.linear(y.abs(), wide.weight.abs(), wide.bias.abs())
    exact, size = (p @ t.unflatten(2, (h, -1)).transpose(1, 2) for t in (v, v_size))
    return Oracle({"out": exact}, {"out": eager}, {"out": size})
