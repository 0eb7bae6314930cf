"""Calls of ``merge_tokens``: results, magnitudes, what eager PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accuracy import Results, assert_all_accurate
from inputs import F32, F64, described, leaf, normal
from torch import Tensor

import psvit_kernels as pk
from psvit_kernels import registry
from psvit_kernels.merging import TokenMatch


class MergeCase(NamedTuple):
    x: Tensor
    match: TokenMatch
    grads: tuple[Tensor, Tensor, Tensor | None]  # of tokens, sizes, normed tokens
    tensors: dict[str, Tensor]  # weights, residual, norm_weight, norm_bias where given

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> MergeCase:
        tensors = {name: t.detach().double() for name, t in self.tensors.items()}
        grads = tuple(None if g is None else g.double() for g in self.grads)
        return self._replace(x=self.x.detach().double(), grads=grads, tensors=tensors)


def random_match(b: int, n: int, m: int, dropped: int = 0) -> TokenMatch:
    """Each of m tokens is made of at least one; some of the n are dropped."""
    into = torch.cat([torch.arange(m), torch.randint(m, (n - m,))]).repeat(b, 1)
    into[:, n - dropped :] = -1
    into = torch.stack([row[torch.randperm(n)] for row in into])
    return table_match(into, m)


def table_match(into: Tensor, m: int) -> TokenMatch:
    """The tables of what each token becomes, written out in Python."""
    orders, starts = [], []
    for row in into.tolist():
        of = [[n for n, at in enumerate(row) if at == one] for one in (*range(m), -1)]
        orders.append([n for group in of for n in group])
        starts.append([sum(map(len, of[:one])) for one in range(m + 1)])
    return TokenMatch(into, torch.tensor(orders), torch.tensor(starts))


def merge_case(
    b: int, n: int, m: int, channels: int, *, dtype: torch.dtype = F32, dropped: int = 0,
    weights: bool = False, residual: bool = False, norm: bool = False,
) -> MergeCase:  # fmt: skip
    wide = F64 if dtype == F64 else F32
    tensors = {}
    if weights:
        tensors["weights"] = 0.5 + 3 * torch.rand(b, n, dtype=wide)
    if residual:
        tensors["residual"] = normal(b, n, channels, dtype=dtype)
    if norm:
        tensors["norm_weight"] = 1 + normal(channels, dtype=wide) / 4
        tensors["norm_bias"] = normal(channels, dtype=wide)
    grad = normal(b, m, channels, dtype=dtype)
    grads = (grad, normal(b, m, dtype=wide), normal(b, m, channels, dtype=dtype) if norm else None)
    x = normal(b, n, channels, dtype=dtype)
    return MergeCase(x, random_match(b, n, m, dropped), grads, tensors)


def eager_merge(x, match, weights=None, *, residual=None, norm_weight=None, norm_bias=None):
    """What a person writes without this package: a product with a matrix of parts."""
    if residual is not None:
        x = x + residual
    w = x.new_ones(x.shape[:2]) if weights is None else weights
    mine = match.into.unsqueeze(1) == torch.arange(match.tokens, device=x.device).unsqueeze(
        1
    )  # (B, M, N)
    parts = mine * w.unsqueeze(1)
    sizes = parts.sum(2)
    tokens = (parts / sizes.unsqueeze(2)).to(x.dtype) @ x
    if norm_weight is None:
        return tokens, sizes, None
    shape, parameters = tokens.shape[-1:], (norm_weight.to(x.dtype), norm_bias.to(x.dtype))
    return tokens, sizes, F.layer_norm(tokens, shape, *parameters, 1e-6)


def merge_results(case: MergeCase, merge: Callable = pk.merge_tokens) -> Results:
    x, tensors = leaf(case.x), {name: leaf(t) for name, t in case.tensors.items()}
    found = merge(x, case.match, **tensors)
    wanted = [
        (out, grad)
        for out, grad in zip(found, case.grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    inputs = {"dx": x} | {f"d{name}": t for name, t in tensors.items()}
    grads = torch.autograd.grad([o for o, _ in wanted], list(inputs.values()),
                                [g.to(o.dtype) for o, g in wanted])  # fmt: skip
    results = {"tokens": found[0], "sizes": found[1].to(case.grads[1].dtype)}
    if found[2] is not None:
        results["normed"] = found[2]
    return results | dict(zip(inputs, grads, strict=True))


def merge_magnitudes(case: MergeCase) -> Results:
    """As the results, with absolute values; LayerNorm's backward is written out for that."""
    case = case.double()
    x = case.x.abs()
    if "residual" in case.tensors:
        x = x + case.tensors["residual"].abs()
    weights = case.tensors.get("weights", torch.ones_like(x[..., 0]))
    tokens, sizes, _ = eager_merge(x, case.match, weights)
    g = case.grads[0].abs()
    found = {"tokens": tokens, "sizes": sizes}
    if case.grads[2] is not None:
        signed = {k: t for k, t in case.tensors.items() if not k.startswith("norm")}
        y, _, _ = eager_merge(case.x, case.match, **signed)
        rstd = ((y - y.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        size = (tokens + tokens.mean(-1, keepdim=True)) * rstd
        weight, bias = case.tensors["norm_weight"].abs(), case.tensors["norm_bias"].abs()
        gn = case.grads[2].abs()
        wg = gn * weight
        through = wg + wg.mean(-1, keepdim=True) + size * (size * wg).mean(-1, keepdim=True)
        g = g + rstd * through
        found |= {"normed": size * weight + bias, "dnorm_weight": (gn * size).sum((0, 1))}
        found["dnorm_bias"] = gn.sum((0, 1))
    mine = (case.match.into.unsqueeze(1) == torch.arange(case.match.tokens).unsqueeze(1)).double()
    of_input = mine.transpose(1, 2)
    found["dx"] = found["dresidual"] = weights.unsqueeze(2) * (of_input @ (g / sizes[..., None]))
    spread = (x + of_input @ tokens) * (of_input @ (g / sizes[..., None]))
    found["dweights"] = spread.sum(2) + (of_input @ case.grads[1].abs().unsqueeze(2)).squeeze(2)
    return found


def check_merge(case: MergeCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = merge_results(case)
    with registry.use("reference"):
        exact = merge_results(case.double())
    eager, magnitudes = merge_results(case, eager_merge), merge_magnitudes(case)
    assert_all_accurate(got, exact, eager, {name: magnitudes[name] for name in got}, slack)
    return got
