"""Calls of attention and of maps that are shared: results, magnitudes, what eager makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accuracy import Results, accumulation_eps, assert_all_accurate
from inputs import described, fused_qkv, leaf, normal, wide
from torch import Tensor

import psvit_kernels as pk
from psvit_kernels import registry

# --- attention ------------------------------------------------------------------------------


class AttentionCase(NamedTuple):
    """Inputs of one call, and the gradients that come back: of out, and of the map if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    grad_map: Tensor | None = None
    form: str | None = None

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> AttentionCase:
        return self._replace(
            **{name: wide(getattr(self, name)) for name in ("q", "k", "v", "grad_out")},
            bias=wide(self.bias),
            grad_map=wide(self.grad_map),
        )

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale


def eager_attention(q, k, v, *, scale=None, bias=None, return_map=None, reuses=0):
    """What a person writes without this package."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    p = scores.softmax(-1)
    return p @ v, p


def attention_results(case: AttentionCase, attention: Callable = pk.attention) -> Results:
    """out, the map where it is dense, and every gradient."""
    q, k, v, bias = map(leaf, (case.q, case.k, case.v, case.bias))
    out, p = attention(q, k, v, scale=case.scale, bias=bias, return_map=case.form)
    results = {"out": out}
    outputs, grads = [out], [case.grad_out]
    if case.form == "dense":
        results["map"] = p if isinstance(p, Tensor) else p.dense()
        if case.grad_map is not None:
            outputs.append(results["map"])
            grads.append(case.grad_map)
    inputs = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"dbias": bias})
    found = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return results | dict(zip(inputs, found, strict=True))


def attention_magnitudes(case: AttentionCase) -> Results:
    """The formulas of every result with absolute values in place of signed ones, in float64."""
    dtype, case = case.q.dtype, case.double()
    p = eager_attention(*case[:3], scale=case.scale, bias=case.bias)[1].nan_to_num(0.0)
    q, k, v, g = (t.abs() for t in (case.q, case.k, case.v, case.grad_out))
    scale = abs(case.factor)
    p = with_scores(p, q, k, scale, case.bias)
    found = {"out": p @ v, "map": p}
    dp = g @ v.transpose(-1, -2)
    if case.grad_map is not None:
        dp = dp + case.grad_map.abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    found["dv"] = p.transpose(-1, -2) @ g
    found["dq"], found["dk"] = ds @ k * scale, ds.transpose(-1, -2) @ q * scale
    if case.bias is not None:
        found["dbias"] = bias_magnitude(ds, case.bias, dtype)
    return found


def bias_magnitude(ds: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias that is one number for a whole row changes nothing: its gradient is zero, and what is
    found is the roundings, to the dtype of the bias, of what was summed."""
    size = ds.sum_to_size(bias.shape)
    one_for_the_row = bias.dim() == 0 or bias.shape[-1] == 1
    return size * (torch.finfo(dtype).eps / accumulation_eps(dtype) if one_for_the_row else 1)


def with_scores(p: Tensor, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Magnitude of P = exp(score - lse): a score is off by its own rounding, and P with it."""
    score = scale * q.abs() @ k.abs().transpose(-1, -2)
    if bias is not None:
        score = score + torch.where(bias.isfinite(), bias.abs(), 0.0)
    return p * (1 + score)


def check_attention(case: AttentionCase, slack: float = 1.0) -> Results:
    """Runs a case through the provider in use, and holds it against the bar."""
    __tracebackhide__ = True
    got = attention_results(case)
    with registry.use("reference"):
        exact = attention_results(case.double())
    eager = attention_results(case, eager_attention)
    assert_all_accurate(got, exact, eager, attention_magnitudes(case), slack)
    return got


# --- apply_attention ------------------------------------------------------------------------


class ApplyCase(NamedTuple):
    """Inputs of ``apply_attention`` on a dense map, and the gradient of its output."""

    p: Tensor
    v: Tensor
    grad_out: Tensor
    head_index: Sequence[int] | None = None
    correction: Tensor | None = None

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> ApplyCase:
        p, v, grad_out = (t.detach().double() for t in self[:3])
        return ApplyCase(p, v, grad_out, self.head_index, wide(self.correction))


def eager_apply(p, v, *, head_index=None, correction=None):
    """What a person writes without this package: O = alpha P V + beta V + gamma mean(V)."""
    if head_index is not None:
        p = p[:, list(head_index)]
    out = p @ v
    if correction is None:
        return out
    alpha, beta, gamma = correction.to(v.dtype)[:, :, None, None].unbind(1)
    return alpha * out + beta * v + gamma * v.mean(2, keepdim=True)


def apply_dense(p, v, *, head_index=None, correction=None):
    return pk.apply_attention(
        pk.DenseMap.from_dense(p), v, head_index=head_index, correction=correction
    )


def apply_results(case: ApplyCase, apply: Callable = apply_dense) -> Results:
    p, v, correction = map(leaf, (case.p, case.v, case.correction))
    out = apply(p, v, head_index=case.head_index, correction=correction)
    inputs = {"dmap": p, "dv": v} | ({} if correction is None else {"dcorrection": correction})
    found = torch.autograd.grad(out, list(inputs.values()), case.grad_out)
    return {"out": out} | dict(zip(inputs, found, strict=True))


def apply_magnitudes(case: ApplyCase) -> Results:
    absolute = ApplyCase(
        *(t.detach().double().abs() for t in case[:3]),
        case.head_index,
        None if case.correction is None else case.correction.detach().double().abs(),
    )
    return apply_results(absolute, eager_apply)


def check_apply(case: ApplyCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = apply_results(case)
    with registry.use("reference"):
        exact = apply_results(case.double())
    eager = apply_results(case, eager_apply)
    assert_all_accurate(got, exact, eager, apply_magnitudes(case), slack)
    return got


# --- groups: one layer attends, others share -------------------------------------------------


class GroupCase(NamedTuple):
    """``tensors``: q, k, v of the layer that attends, v0, v1, .. of those that share its map, and
    bias where there is one. ``grads``: of each layer's output, and of the map if ``grad_map``."""

    tensors: Results
    grads: list[Tensor]
    form: str
    grad_map: Tensor | None = None
    head_index: Sequence[int] | None = None
    reuses: int = 2

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> GroupCase:
        tensors = {name: t.detach().double() for name, t in self.tensors.items()}
        grads = [g.double() for g in self.grads]
        return self._replace(tensors=tensors, grads=grads, grad_map=wide(self.grad_map))


def group_case(
    b: int,
    h: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    form: str,
    *,
    sharing: int = 2,
    bias: Tensor | None = None,
    differentiate_map: bool = False,
) -> GroupCase:
    q, k, v = fused_qkv(b, n, h, d, dtype)
    tensors = {"q": q, "k": k, "v": v}
    tensors |= {f"v{i}": normal(b, h, n, d, dtype=dtype) for i in range(sharing)}
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    grads = [normal(b, h, n, d, dtype=dtype) for _ in range(1 + sharing)]
    grad_map = normal(b, h, n, n, dtype=dtype) if differentiate_map else None
    return GroupCase(tensors, grads, form, grad_map)


def eager_group(case: GroupCase) -> Results:
    return group_results(case, eager_attention, eager_apply)


def group_results(
    case: GroupCase, attention: Callable = pk.attention, apply: Callable = pk.apply_attention
) -> Results:
    """Outputs of one ``A`` and its ``S`` layers, and the gradients of every tensor."""
    t = {name: leaf(value) for name, value in case.tensors.items()}
    options = {"bias": t.get("bias"), "return_map": case.form, "reuses": case.reuses}
    out, p = attention(t["q"], t["k"], t["v"], **options)
    sharing = [name for name in t if name.startswith("v") and name != "v"]
    outs = [out] + [apply(p, t[name], head_index=case.head_index) for name in sharing]
    results = {f"out{i}": o for i, o in enumerate(outs)}
    grads = list(case.grads)
    if case.grad_map is not None:
        outs.append(p if isinstance(p, Tensor) else p.dense())
        grads.append(case.grad_map)
    found = torch.autograd.grad(outs, list(t.values()), grads)
    return results | {f"d{name}": g for name, g in zip(t, found, strict=True)}


def group_magnitudes(case: GroupCase) -> Results:
    dtype, case = case.grads[0].dtype, case.double()
    t, bias = case.tensors, case.tensors.get("bias")
    q, k = t["q"].abs(), t["k"].abs()
    scale = 1 / math.sqrt(q.shape[-1])
    p = eager_attention(t["q"], t["k"], t["v"], bias=bias)[1]
    p = with_scores(p, q, k, scale, bias)
    dp = torch.zeros_like(p) if case.grad_map is None else case.grad_map.abs()
    found = {}
    for i, (name, g) in enumerate(zip([n for n in t if n[0] == "v"], case.grads, strict=True)):
        index = range(p.shape[1]) if name == "v" else case.head_index or range(p.shape[1])
        index = torch.tensor(list(index), device=p.device)
        g, v = g.abs(), t[name].abs()
        found[f"out{i}"] = p[:, index] @ v
        found[f"d{name}"] = p[:, index].transpose(-1, -2) @ g
        dp = dp.index_add(1, index, g @ v.transpose(-1, -2))
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    found["dq"], found["dk"] = ds @ k * scale, ds.transpose(-1, -2) @ q * scale
    if bias is not None:
        found["dbias"] = bias_magnitude(ds, bias, dtype)
    return found


def check_group(case: GroupCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = group_results(case)
    with registry.use("reference"):
        exact = group_results(case.double())
    assert_all_accurate(got, exact, eager_group(case), group_magnitudes(case), slack)
    return got
