"""Merging tokens, and the map of a layer that follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from psvit.bench.merging import plain_merge
from psvit_kernels import DenseMap, TokenGroups, TokenMatch, match_tokens, merge_tokens, use

from . import gate
from .contender import Contender, Subject, Work, compiled, fused_qkv
from .gate import Oracle
from .rows import HEAD_DIM, PAIRS, Case


def build(case: Case, sets: int, device: str) -> Work:
    make = _merge_work if case.kind == "merge" else _follow_work
    return make(case, getattr(torch, case.dtype), sets, device)


def _merge_work(case: Case, dtype: torch.dtype, sets: int, device: str) -> Work:
    """Tokens are held against the means of those that psvit itself found to be alike: a score that
    differs by a rounding may be another pair."""
    cases = gate.of_tests("merge_cases")
    b, h, n = case.shape

    def made() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(b, n, h * HEAD_DIM, dtype=dtype, device=device)
        sizes = torch.randint(1, 4, (b, n), device=device).float()
        return x, fused_qkv(b, h, n, dtype, device)[1], sizes

    inputs = [made() for _ in range(sets)]

    def psvit(x: Tensor, keys: Tensor, sizes: Tensor) -> Tensor:
        return merge_tokens(x, match_tokens(keys, PAIRS, prefix=1), sizes).tokens

    def eager(x: Tensor, keys: Tensor, sizes: Tensor) -> Tensor:
        return plain_merge(x, keys, sizes.to(x.dtype), PAIRS)[0]

    def oracle(part: slice) -> Oracle:
        x, keys, sizes = (t[part] for t in inputs[0])
        match = match_tokens(keys, PAIRS, prefix=1)
        with use("reference"):
            exact = merge_tokens(x.double(), match, sizes.double()).tokens
        rounded = cases.eager_merge(x, match, sizes)[0]
        magnitude = cases.eager_merge(x.double().abs(), match, sizes.double())[0]
        return Oracle({"tokens": exact}, {"tokens": rounded}, {"tokens": magnitude})

    calls = [partial(psvit, *each) for each in inputs]
    check = partial(gate.check, lambda: {"tokens": calls[0]()}, oracle, max(1, min(b, 32)))
    return _work(case, Subject(calls, check=check), eager, inputs)


def _follow_work(case: Case, dtype: torch.dtype, sets: int, device: str) -> Work:
    """Rows averaged, columns summed: in plain PyTorch two products with the matrices of that."""
    b, h, n = case.shape

    def made() -> tuple[DenseMap, TokenGroups, Tensor, Tensor]:
        p = torch.randn(b, h, n, n, dtype=dtype, device=device).softmax(-1)
        match = match_tokens(fused_qkv(b, h, n, dtype, device)[1], PAIRS, prefix=1)
        sizes = torch.ones(b, n, 1, device=device)
        sums = merge_tokens(sizes, match).sizes
        rows, columns = _matrices(match, sums, dtype)
        return DenseMap.from_dense(p), TokenGroups.of(match, None, sums), rows, columns

    inputs = [made() for _ in range(sets)]

    def psvit(stored: DenseMap, groups: TokenGroups, rows: Tensor, columns: Tensor) -> Tensor:
        return stored.reduce(groups).storage

    def eager(stored: DenseMap, groups: TokenGroups, rows: Tensor, columns: Tensor) -> Tensor:
        return rows @ stored.dense() @ columns

    def oracle(part: slice) -> Oracle:
        stored, groups, rows, columns = inputs[0]
        p, r, c = stored.dense()[part], rows[part], columns[part]
        with use("reference"):
            means = groups.means[part].double()
            of_part = TokenGroups(groups.order[part], groups.starts[part], means)
            exact = DenseMap.from_dense(p.double()).reduce(of_part).dense()
        return Oracle({"map": exact}, {"map": r @ p @ c}, {"map": exact})

    calls = [partial(psvit, *each) for each in inputs]
    left = inputs[0][1].tokens
    check = partial(
        gate.check, lambda: {"map": calls[0]()[..., :left]}, oracle, gate.chunk(b, h, n)
    )
    return _work(case, Subject(calls, check=check), eager, inputs)


def _matrices(match: TokenMatch, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, 1, M, N) of means and (B, 1, N, M) of members."""
    members = F.one_hot(match.into, match.tokens).unsqueeze(1)
    means = members.transpose(2, 3) / sums[:, None, :, None]
    return means.to(dtype), members.to(dtype)


def _work(case: Case, subject: Subject, eager: Callable, inputs: Sequence[tuple]) -> Work:
    functions = {"eager": lambda: eager, "compile": lambda: compiled(eager)}

    def baseline(name: str) -> Contender:
        function = functions[name]()
        return Contender([partial(function, *each) for each in inputs])

    baselines = {name: partial(baseline, name) for name in case.baselines}
    return Work({"fused": lambda: subject}, baselines)
