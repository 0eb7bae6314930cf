"""Calls of ``token_pool``: results, magnitudes, what eager PyTorch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accuracy import Results, assert_all_accurate
from inputs import F32, described, leaf, normal
from torch import Tensor

import psvit_kernels as pk
from psvit_kernels import registry


class PoolCase(NamedTuple):
    x: Tensor
    grid: tuple[int, ...]
    grad_out: Tensor
    options: dict
    tensors: dict[str, Tensor]  # residual, weight, bias, norm_weight, norm_bias where given

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> PoolCase:
        tensors = {name: t.detach().double() for name, t in self.tensors.items()}
        return self._replace(
            x=self.x.detach().double(), grad_out=self.grad_out.double(), tensors=tensors
        )


def pool_case(
    b: int,
    grid: Sequence[int],
    channels: int,
    *,
    dtype: torch.dtype = F32,
    parameters: torch.dtype | None = None,
    prefix: int = 0,
    kind: str = "max",
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    width: int | None = None,
    groups: int = 1,
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
) -> PoolCase:
    """A case with random tensors; ``parameters`` is the dtype of weights, x's if None."""
    grid = tuple(grid)
    parameters = dtype if parameters is None else parameters
    options = dict(prefix=prefix, kind=kind, kernel=kernel, stride=stride, padding=padding)
    options |= dict(groups=groups, dims=len(grid))
    tensors = {}
    if residual:
        tensors["residual"] = normal(b, prefix + math.prod(grid), channels, dtype=dtype)
    if kind == "conv":
        width = channels if width is None else width
        shape = (width, channels // groups, *[kernel] * len(grid))
        tensors["weight"] = normal(*shape, dtype=parameters)
        if bias:
            tensors["bias"] = normal(width, dtype=parameters)
    width = channels if width is None else width
    if norm:
        tensors["norm_weight"] = 1 + normal(width, dtype=parameters) / 4
        tensors["norm_bias"] = normal(width, dtype=parameters)
    x = normal(b, prefix + math.prod(grid), channels, dtype=dtype)
    k, p = (1, 0) if kind == "stride" else (kernel, padding)
    tokens = prefix + math.prod((n + 2 * p - k) // stride + 1 for n in grid)
    return PoolCase(x, grid, normal(b, tokens, width, dtype=dtype), options, tensors)


def eager_pool(
    x, grid, *, prefix, kind, kernel, stride, padding, groups, dims, residual=None, weight=None,
    bias=None, norm_weight=None, norm_bias=None, norm_eps=1e-6,
):  # fmt: skip
    """What a person writes without this package: to images, pool, back, cat, LayerNorm."""
    if residual is not None:
        x = x + residual
    if dims == 1:
        grid, kernel, stride, padding = (1, *grid), (1, kernel), (1, stride), (0, padding)
        weight = None if weight is None else weight.unsqueeze(2)
    image = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if kind == "max":
        image = F.max_pool2d(image, kernel, stride, padding)
    elif kind == "avg":
        image = F.avg_pool2d(image, kernel, stride, padding, count_include_pad=False)
    elif kind == "stride":
        step = (stride, stride) if isinstance(stride, int) else stride
        image = image[:, :, :: step[0], :: step[1]]
    else:
        bias = None if bias is None else bias.to(x.dtype)
        image = F.conv2d(image, weight.to(x.dtype), bias, stride, padding, 1, groups)
    out = image.flatten(2).transpose(1, 2)
    if prefix:
        out = torch.cat([x[:, :prefix], out], dim=1)
    if norm_weight is None:
        return out, tuple(image.shape[4 - dims :])
    bias = None if norm_bias is None else norm_bias.to(x.dtype)
    out = F.layer_norm(out, out.shape[-1:], norm_weight.to(x.dtype), bias, norm_eps)
    return out, tuple(image.shape[4 - dims :])


def pool_results(case: PoolCase, pool: Callable = pk.token_pool) -> Results:
    x = leaf(case.x)
    tensors = {name: leaf(t) for name, t in case.tensors.items()}
    out, grid = pool(x, case.grid, **case.options, **tensors)
    assert out.shape[1] == case.options["prefix"] + math.prod(grid)
    inputs = {"dx": x} | {f"d{name}": t for name, t in tensors.items()}
    found = torch.autograd.grad(out, list(inputs.values()), case.grad_out)
    return {"out": out} | dict(zip(inputs, found, strict=True))


def pool_magnitudes(case: PoolCase) -> Results:
    """As the results, with absolute values; LayerNorm's backward is written out for that."""
    case = case.double()
    norm = [case.tensors.get(name) for name in ("norm_weight", "norm_bias")]
    bare = {name: t.abs() for name, t in case.tensors.items() if not name.startswith("norm")}
    pool = PoolCase(case.x.abs(), case.grid, case.grad_out.abs(), case.options, bare)
    if norm[0] is None:
        return _pool_magnitudes(pool, case)
    signed = {name: t for name, t in case.tensors.items() if not name.startswith("norm")}
    pooled, _ = eager_pool(case.x, case.grid, **case.options, **signed)
    size, _ = eager_pool(pool.x, case.grid, **case.options, **bare)
    size = torch.maximum(size, pooled.abs())
    rstd = ((pooled - pooled.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normal_size = (size + size.mean(-1, keepdim=True)) * rstd
    weight, bias = norm[0].abs(), 0 if norm[1] is None else norm[1].abs()
    g = pool.grad_out
    wg = g * weight
    dpooled = wg + wg.mean(-1, keepdim=True)
    dpooled = rstd * (dpooled + normal_size * (normal_size * wg).mean(-1, keepdim=True))
    found = _pool_magnitudes(pool._replace(grad_out=dpooled), case)
    found["out"] = normal_size * weight + bias
    found["dnorm_weight"] = (g * normal_size).sum((0, 1))
    found["dnorm_bias"] = g.sum((0, 1))
    return found


def _pool_magnitudes(absolute: PoolCase, signed: PoolCase) -> Results:
    """The window's own; which token wins a maximum depends on the signed values."""
    if absolute.options["kind"] != "max":
        return pool_results(absolute, eager_pool)
    tensors = {name: t for name, t in signed.tensors.items() if name == "residual"}
    found = pool_results(signed._replace(grad_out=absolute.grad_out, tensors=tensors), eager_pool)
    return {name: t.abs() for name, t in found.items()}


def check_pool(case: PoolCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = pool_results(case)
    with registry.use("reference"):
        exact = pool_results(case.double())
    eager = pool_results(case, eager_pool)
    assert_all_accurate(got, exact, eager, pool_magnitudes(case), slack)
    return got
