"""What the rows run: inputs, psvit's calls with their correctness, and what people use instead.

Nothing is made before it is asked for, so that what fails takes nothing else with it. All
contenders of a case run on the same sets of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from psvit_kernels import (
    AttentionMap,
    DenseMap,
    FactoredMap,
    QuantizedMap,
    apply_attention,
    attention,
    explain,
    token_pool,
    use,
)

from . import gate, layer, merging, network
from .clock import Call
from .contender import BACKENDS, QKV, Contender, Subject, Work, compiled, fused_qkv
from .gate import Oracle
from .rows import Case, split

#: Layers that share in a group.
SHARING = 2


def build(case: Case, sets: int, device: str) -> Work:
    """Makes the inputs of a case."""
    kind, _, pooling = case.kind.partition("-")
    dtype = getattr(torch, case.dtype)
    if kind == "pool":
        return _pool_work(case, pooling, dtype, sets, device)
    if case.network:
        return network.build(case, sets, device)
    if kind == "sharing":
        return layer.build(case, sets, device)
    b, h, n = case.shape
    if kind in ("merge", "follow"):
        return merging.build(case, sets, device)
    qkv = [fused_qkv(b, h, n, dtype, device) for _ in range(sets)]
    make = {"apply": _apply_work, "attention": _attention_work, "group": _group_work}[kind]
    return make(case, qkv)


def _forms(case: Case) -> dict[str, None]:
    return dict.fromkeys(split(row)[0] for row in case.rows)


# --- what people write ----------------------------------------------------------------------


def eager_map(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager_map(q, k) @ v


def eager_attention_and_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = eager_map(q, k)
    return p @ v, p


def eager_group(q: Tensor, k: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    p = eager_map(q, k)
    return tuple(p @ v for v in values)


def flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def _fused(name: str) -> tuple[Callable, Callable[[], AbstractContextManager]]:
    """A function of q, k, v that gives the output alone, and what pins it."""
    if name == "flex":
        return flex(), nullcontext
    return F.scaled_dot_product_attention, partial(sdpa_kernel, BACKENDS[name.split("/")[1]])


def _forward_baselines(
    case: Case, qkv: Sequence[QKV], eager: Callable
) -> dict[str, Callable[[], Contender]]:
    """For attention: eager as given, compiled too, and what gives the output alone."""

    def make(name: str) -> Contender:
        function, pinned = {
            "eager": lambda: (eager, nullcontext),
            "compile": lambda: (compiled(eager), nullcontext),
        }.get(name, partial(_fused, name))()
        return Contender([partial(function, *each) for each in qkv], pinned)

    return {name: partial(make, name) for name in case.baselines}


# --- apply ----------------------------------------------------------------------------------


def _apply_work(case: Case, qkv: Sequence[QKV]) -> Work:
    baselines = _forward_baselines(case, qkv, eager_attention)
    if "eager A @ v" in baselines:
        baselines["eager A @ v"] = lambda: Contender(
            [partial(torch.matmul, eager_map(q, k), v) for q, k, v in qkv]
        )

    @cache
    def maps(form: str) -> list[AttentionMap]:
        """The same for all providers."""
        return [reference_map(q, k, v, form) for q, k, v in qkv]

    def subject(form: str) -> Subject:
        return _apply_subject(maps(form), qkv)

    subjects = {form: partial(subject, form) for form in _forms(case)}
    return Work(subjects, baselines, partial(_automatic, *qkv[0]))


def _apply_subject(maps: Sequence[AttentionMap], qkv: Sequence[QKV]) -> Subject:
    calls = [partial(apply_attention, m, v) for m, (_, _, v) in zip(maps, qkv, strict=True)]
    check = partial(_check_apply, maps[0], qkv[0], calls[0])
    return Subject(calls, check=check, map_nbytes=maps[0].nbytes)


def reference_map(q: Tensor, k: Tensor, v: Tensor, form: str) -> AttentionMap:
    """Made by the reference: an error of the kernel that makes maps is not this row's."""
    with use("reference"):
        stored = attention(q, k, v, return_map=form)[1]  # type: ignore[arg-type]
    assert stored is not None
    return stored


def _check_apply(stored: AttentionMap, qkv: QKV, call: Call) -> gate.Error:
    b, h, n, _ = qkv[0].shape
    return gate.check(
        lambda: {"out": call()},  # type: ignore[dict-item]
        lambda part: _apply_oracle(stored, tuple(t[part] for t in qkv), part),  # type: ignore[arg-type]
        gate.chunk(b, h, n),
    )


def _apply_oracle(stored: AttentionMap, qkv: QKV, part: slice) -> Oracle:
    if isinstance(stored, FactoredMap):
        q, k, v = (t.double() for t in qkv)
        with use("reference"):
            exact = apply_attention(reference_map(q, k, v, "factored"), v)
        return Oracle(
            {"out": exact},
            {"out": eager_attention(*qkv)},
            {"out": _attention_magnitudes(qkv)["out"]},
        )
    exact_map, p = _wide(stored, part)
    v = qkv[2]
    with use("reference"):
        exact = apply_attention(exact_map, v.double())
    eager = stored.dense()[part] @ v
    return Oracle({"out": exact}, {"out": eager}, {"out": p.abs() @ v.double().abs()})


def _wide(stored: AttentionMap, part: slice) -> tuple[AttentionMap, Tensor]:
    """The same map for values in float64, and its probabilities."""
    wide: AttentionMap
    if isinstance(stored, QuantizedMap):
        codes, row_scale = stored.codes[part], stored.row_scale[part]
        wide = replace(stored, codes=codes, row_scale=row_scale, dtype=torch.float64, links=None)
    else:
        wide = DenseMap.from_dense(stored.dense()[part].double())
    return wide, wide.dense()


def _attention_magnitudes(qkv: QKV) -> gate.Results:
    """Of the output and the map; the gradients that come with them are of no use here."""
    cases = gate.of_tests("attention_cases")
    with torch.enable_grad():
        return cases.attention_magnitudes(cases.AttentionCase(*qkv, torch.zeros_like(qkv[2])))


def _automatic(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The form that the cost model picks, by how many layers will apply the map, and why."""
    picked = {}
    for reuses in (1, 2, 5):
        stored = attention(q, k, v, return_map="auto", reuses=reuses)[1]  # type: ignore[arg-type]
        picked[str(reuses)] = _form(stored)
    explained = explain(tuple(q.shape), 2, dtype=q.dtype, device=q.device)
    return {"picked": picked, "explained": explained.splitlines()}


def _form(stored: AttentionMap | None) -> str:
    if isinstance(stored, QuantizedMap):
        return "uint8" if stored.codes.dtype == torch.uint8 else "e4m3"
    return "factored" if isinstance(stored, FactoredMap) else "dense"


# --- attention with its map -----------------------------------------------------------------


def _attention_work(case: Case, qkv: Sequence[QKV]) -> Work:
    baselines = _forward_baselines(case, qkv, eager_attention_and_map)
    subjects = {form: partial(_attention_subject, form, qkv) for form in _forms(case)}
    return Work(subjects, baselines)


def _attention_subject(form: str, qkv: Sequence[QKV]) -> Subject:
    calls = [partial(attention, *each, return_map=form) for each in qkv]  # type: ignore[arg-type]
    b, h, n, _ = qkv[0][0].shape

    def run() -> gate.Results:
        out, stored = calls[0]()
        assert stored is not None
        return {"out": out, "map": stored.dense()}

    def oracle(part: slice) -> Oracle:
        some = tuple(t[part] for t in qkv[0])
        with use("reference"):
            exact, p = attention(*(t.double() for t in some), return_map="dense")
        assert p is not None
        out, eager = eager_attention_and_map(*some)
        if form != "dense":
            eager = QuantizedMap.from_dense(eager, form).dense()
        magnitudes = _attention_magnitudes(some)  # type: ignore[arg-type]
        return Oracle(
            {"out": exact, "map": p.dense()},
            {"out": out, "map": eager},
            {name: magnitudes[name] for name in ("out", "map")},
        )

    stored = calls[0]()[1]
    check = partial(gate.check, run, oracle, gate.chunk(b, h, n))
    return Subject(calls, check=check, map_nbytes=None if stored is None else stored.nbytes)


# --- a group of layers, forward and backward ------------------------------------------------

Layers = Callable[..., tuple[Tensor, ...]]


@dataclass
class _Group:
    """One layer that attends and SHARING that share its map, and the gradients of the outputs."""

    tensors: list[Tensor]  # q, k, v, then v of each layer that shares
    grads: list[Tensor]

    def run(self, layers: Layers, tensors: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Outputs, and the gradients of every tensor."""
        leaves = [t.detach().requires_grad_() for t in tensors or self.tensors]
        with torch.enable_grad():
            outs = layers(*leaves)
        found = torch.autograd.grad(outs, leaves, self.grads)
        return (*(out.detach() for out in outs), *found)

    def part(self, part: slice, dtype: torch.dtype | None = None) -> _Group:
        both = (self.tensors, self.grads)
        return _Group(*([t[part].to(dtype or t.dtype) for t in some] for some in both))


def psvit_group(form: str, q: Tensor, k: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    first, *others = values
    out, stored = attention(q, k, first, return_map=form, reuses=len(others))  # type: ignore[arg-type]
    assert stored is not None
    return (out, *(apply_attention(stored, v) for v in others))


def _group_work(case: Case, qkv: Sequence[QKV]) -> Work:
    groups = [
        _Group(
            [q, k, v, *(torch.randn_like(v) for _ in range(SHARING))],
            [torch.randn_like(v) for _ in range(1 + SHARING)],
        )
        for q, k, v in qkv
    ]
    subjects = {form: partial(_group_subject, form, groups) for form in _forms(case)}
    baselines = {name: partial(_group_baseline, name, groups) for name in case.baselines}
    return Work(subjects, baselines)


def _group_subject(form: str, groups: Sequence[_Group]) -> Subject:
    layers = partial(psvit_group, form)
    calls = [partial(group.run, layers) for group in groups]
    names = [f"out{i}" for i in range(1 + SHARING)]
    names += ["dq", "dk", "dv", *(f"dv{i}" for i in range(SHARING))]

    def named(results: Sequence[Tensor]) -> gate.Results:
        return dict(zip(names, results, strict=True))

    def oracle(part: slice) -> Oracle:
        some, wide = groups[0].part(part), groups[0].part(part, torch.float64)
        with use("reference"):
            exact = wide.run(layers)
        cases = gate.of_tests("attention_cases")
        inputs = dict(zip(("q", "k", "v", *names[-SHARING:]), some.tensors, strict=True))
        tensors = {name.removeprefix("d"): t for name, t in inputs.items()}
        magnitudes = cases.group_magnitudes(cases.GroupCase(tensors, some.grads, form))
        return Oracle(named(exact), named(some.run(eager_group)), magnitudes)

    b, h, n, _ = groups[0].tensors[0].shape
    check = partial(gate.check, lambda: named(calls[0]()), oracle, gate.chunk(b, h, n))
    return Subject(calls, check=check)


def _group_baseline(name: str, groups: Sequence[_Group]) -> Contender:
    """Eager code may share the map; fused attention can't, and runs once for each layer, with q
    and k of its own."""
    if name in ("eager", "compile"):
        layers = eager_group if name == "eager" else compiled(eager_group)
        return Contender([partial(group.run, layers) for group in groups])
    function, pinned = _fused(name)

    def three(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(*tensors[i : i + 3]) for i in range(0, len(tensors), 3))

    calls = []
    for group in groups:
        q, k, *values = group.tensors
        tensors = [t for v in values for t in (torch.randn_like(q), torch.randn_like(k), v)]
        calls.append(partial(group.run, three, tensors))
    return Contender(calls, pinned)


# --- pooling --------------------------------------------------------------------------------


def _pool_work(case: Case, pooling: str, dtype: torch.dtype, sets: int, device: str) -> Work:
    cases = gate.of_tests("pool_cases")
    b, side, channels = case.shape
    random = partial(torch.randn, dtype=dtype, device=device)
    options = {"prefix": 1, "kind": pooling, "kernel": 3, "stride": 2, "padding": 1}
    tensors = {"norm_weight": 1 + random(channels) / 4, "norm_bias": random(channels)}
    groups = 1
    if pooling == "depthwise":
        options["kind"], groups = "conv", channels
        tensors["weight"] = random(channels, 1, 3, 3)
    inputs = [random(b, 1 + side * side, channels) for _ in range(sets)]
    grid = (side, side)

    def eager(x: Tensor) -> Tensor:
        return cases.eager_pool(x, grid, **options, groups=groups, dims=2, **tensors)[0]

    def psvit(x: Tensor) -> Tensor:
        return token_pool(x, grid, **options, groups=groups, **tensors)[0]  # type: ignore[arg-type]

    def oracle(part: slice) -> Oracle:
        x = inputs[0][part]
        wide = {name: t.double() for name, t in tensors.items()}
        with use("reference"):
            exact, _ = token_pool(x.double(), grid, **options, groups=groups, **wide)  # type: ignore[arg-type]
        described = options | {"groups": groups, "dims": 2}
        case = cases.PoolCase(x, grid, torch.zeros_like(exact, dtype=dtype), described, tensors)
        with torch.enable_grad():
            magnitude = cases.pool_magnitudes(case)["out"]
        return Oracle({"out": exact}, {"out": eager(x)}, {"out": magnitude.detach()})

    calls = [partial(psvit, x) for x in inputs]
    check = partial(gate.check, lambda: {"out": calls[0]()}, oracle, max(1, min(b, 32)))
    functions = {"eager": lambda: eager, "compile": lambda: compiled(eager)}

    def baseline(name: str) -> Contender:
        function = functions[name]()
        return Contender([partial(function, x) for x in inputs])

    baselines = {name: partial(baseline, name) for name in case.baselines}
    return Work({"fused": lambda: Subject(calls, check=check)}, baselines)
