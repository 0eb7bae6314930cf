"""The operations alone: attention, applying a map, pooling, and a group with its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psvit_kernels import DenseMap, apply_attention, attention, token_pool

from .cases import Bar, Case, Work

Shape = tuple[int, int, int, int]  # (B, H, N, d)

EAGER_APPLY = "eager A @ v"
EAGER_ATTENTION = "eager attention"
SDPA = "SDPA"
EAGER_POOL = "permute, pool, cat"
EAGER_GROUP = "eager autograd"
COPY = "copy of as many bytes"

#: DeiT-S in a batch, DeiT-B alone, and stages after a pool.
SHAPES: tuple[Shape, ...] = ((8, 6, 197, 64), (1, 12, 197, 64), (8, 6, 65, 64), (8, 3, 50, 64))


def core_cases(dtype: torch.dtype) -> list[Case]:
    """Every operation in one dtype; those with targets first."""
    base = SHAPES[0]
    return [
        *(apply_case(shape, dtype) for shape in SHAPES),
        *(attention_case(shape, dtype) for shape in SHAPES),
        *(pool_case(kind, dtype) for kind in ("max", "avg")),
        group_case(base, dtype),
        group_case(base, dtype, form="factored"),
        factored_case(base, dtype),
        head_index_case(base, dtype),
        correction_case(base, dtype),
    ]


def _name(family: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{family}/{'x'.join(map(str, shape))}/{str(dtype).removeprefix('torch.')}"


def _with_bars(dtype: torch.dtype, bars: dict[str, Bar]) -> dict[str, Bar]:
    """Only float32 has targets."""
    return bars if dtype == torch.float32 else {name: Bar() for name in bars}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- what people write ----------------------------------------------------------------------


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) to (B, N, H d): free for what psvit_kernels returns, a copy for A @ v."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def split_qkv(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, N, 3, H, d) to three views of (B, H, N, d)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def eager_map(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    a = eager_map(q, k)
    return merge_heads(a @ v), a


def eager_apply(a: Tensor, v: Tensor) -> Tensor:
    return merge_heads(a @ v)


def eager_pool(x: Tensor, kind: str, side: int, prefix: int) -> Tensor:
    """Split the cls token, to NCHW, pool, back to tokens, and put the cls token in front."""
    cls, tokens = x[:, :prefix], x[:, prefix:]
    image = tokens.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
    if kind == "max":
        image = F.max_pool2d(image, 3, 2, 1)
    else:
        image = F.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
    return torch.cat([cls, image.flatten(2).transpose(1, 2)], dim=1)


# --- attention ------------------------------------------------------------------------------


def _fused_qkv(shape: Shape, dtype: torch.dtype) -> Tensor:
    b, h, n, d = shape
    return torch.randn(b, n, 3, h, d, generator=_seeded()).to(dtype)


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def _sizes(shape: Shape) -> tuple[int, int]:
    """Elements of one of q, k, v, O, and of the map."""
    b, h, n, d = shape
    return b * h * n * d, b * h * n * n


def apply_case(shape: Shape, dtype: torch.dtype) -> Case:
    """``apply_attention`` of a dense map on the v view of a fused qkv, heads merged."""

    def build() -> Work:
        q, k, v = split_qkv(_fused_qkv(shape, dtype))
        a = eager_map(q.float(), k.float()).to(dtype).contiguous()
        stored = DenseMap.from_dense(a)
        core, full = _sizes(shape)
        return Work(
            psvit=lambda: merge_heads(apply_attention(stored, v)),
            baselines={
                EAGER_APPLY: lambda: eager_apply(a, v),
                EAGER_ATTENTION: lambda: eager_attention(q, k, v)[0],
                SDPA: lambda: merge_heads(F.scaled_dot_product_attention(q, k, v)),
            },
            exact=lambda: eager_apply(*_double(a, v)),
            eager=lambda: eager_apply(a, v),
            flops=2.0 * full * shape[3],
            nbytes=float((full + 2 * core) * dtype.itemsize),
        )

    large = shape[2] >= 197
    bars = {
        EAGER_APPLY: Bar(1.1, 1.5) if large else Bar(1.4, 2.0),
        EAGER_ATTENTION: Bar(4.0, 5.5) if large else Bar(4.0, 6.0),
        SDPA: Bar(2.7, 4.0),
    }
    return Case(_name("apply", shape, dtype), dtype, _with_bars(dtype, bars), build)


def attention_case(shape: Shape, dtype: torch.dtype) -> Case:
    """``attention(return_map="dense")``; SDPA returns no map."""

    def psvit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, stored = attention(q, k, v, return_map="dense")
        assert stored is not None
        return merge_heads(out), stored.dense()

    def build() -> Work:
        q, k, v = split_qkv(_fused_qkv(shape, dtype))
        core, full = _sizes(shape)
        return Work(
            psvit=partial(psvit, q, k, v),
            baselines={
                EAGER_ATTENTION: partial(eager_attention, q, k, v),
                SDPA: lambda: merge_heads(F.scaled_dot_product_attention(q, k, v)),
            },
            exact=lambda: eager_attention(*_double(q, k, v)),
            eager=partial(eager_attention, q, k, v),
            flops=4.0 * full * shape[3],
            nbytes=float((full + 4 * core) * dtype.itemsize),
        )

    bars = {EAGER_ATTENTION: Bar(1.6), SDPA: Bar(1.0, 1.5)}
    return Case(_name("attention", shape, dtype), dtype, _with_bars(dtype, bars), build)


def factored_case(shape: Shape, dtype: torch.dtype) -> Case:
    """``apply_attention`` of a factored map: P is rebuilt, never stored."""

    def build() -> Work:
        q, k, v = split_qkv(_fused_qkv(shape, dtype))
        factors = attention(q, k, v, return_map="factored")[1]
        assert factors is not None
        core, full = _sizes(shape)
        return Work(
            psvit=lambda: merge_heads(apply_attention(factors, v)),
            baselines={
                EAGER_ATTENTION: lambda: eager_attention(q, k, v)[0],
                SDPA: lambda: merge_heads(F.scaled_dot_product_attention(q, k, v)),
            },
            exact=lambda: eager_attention(*_double(q, k, v))[0],
            eager=lambda: eager_attention(q, k, v)[0],
            flops=4.0 * full * shape[3],
            nbytes=float(4 * core * dtype.itemsize + prod(shape[:3]) * 4),
        )

    bars = {EAGER_ATTENTION: Bar(), SDPA: Bar()}
    return Case(_name("apply-factored", shape, dtype), dtype, bars, build)


def _variant_case(
    family: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any], eager: Callable
) -> Case:
    def build() -> Work:
        q, k, v = split_qkv(_fused_qkv(shape, dtype))
        a = eager_map(q.float(), k.float()).to(dtype).contiguous()
        stored = DenseMap.from_dense(a)
        core, full = _sizes(shape)
        return Work(
            psvit=lambda: merge_heads(apply_attention(stored, v, **options)),
            baselines={EAGER_APPLY: lambda: eager(a, v)},
            exact=lambda: eager(*_double(a, v)),
            eager=lambda: eager(a, v),
            flops=2.0 * full * shape[3],
            nbytes=float((full + 2 * core) * dtype.itemsize),
        )

    return Case(_name(family, shape, dtype), dtype, {EAGER_APPLY: Bar()}, build)


def head_index_case(shape: Shape, dtype: torch.dtype) -> Case:
    """Head h of the receiver uses another head of the donor."""
    index = [(h + 1) % shape[1] for h in range(shape[1])]

    def eager(a: Tensor, v: Tensor) -> Tensor:
        return merge_heads(a[:, index] @ v)

    return _variant_case("apply-head-index", shape, dtype, {"head_index": index}, eager)


def correction_case(shape: Shape, dtype: torch.dtype) -> Case:
    """alpha (P V) + beta V + gamma mean(V)."""
    correction = torch.randn(shape[1], 3, generator=_seeded())

    def eager(a: Tensor, v: Tensor) -> Tensor:
        alpha, beta, gamma = correction.to(v.dtype)[:, :, None, None].unbind(1)
        return merge_heads(alpha * (a @ v) + beta * v + gamma * v.mean(2, keepdim=True))

    return _variant_case("apply-correction", shape, dtype, {"correction": correction}, eager)


# --- a group of layers, forward and backward ---------------------------------------------------


def group_case(shape: Shape, dtype: torch.dtype, *, form: str = "dense", sharing: int = 2) -> Case:
    """Attention cores of one layer that attends and ``sharing`` that apply its map, with gradients.

    Leaves are the fused qkv of the first and the v of the others, (B, N, H, d).
    """

    def outputs(leaves: Sequence[Tensor], fused: bool) -> list[Tensor]:
        q, k, v = split_qkv(leaves[0])
        shared = [t.transpose(1, 2) for t in leaves[1:]]
        if fused:
            out, stored = attention(q, k, v, return_map=form, reuses=sharing)  # type: ignore[arg-type]
            assert stored is not None
            return [merge_heads(t) for t in (out, *(apply_attention(stored, v) for v in shared))]
        out, a = eager_attention(q, k, v)
        return [out, *(eager_apply(a, v) for v in shared)]

    def run(leaves: Sequence[Tensor], grads: Sequence[Tensor], fused: bool) -> tuple[Tensor, ...]:
        outs = outputs(leaves, fused)
        return (*outs, *torch.autograd.grad(outs, leaves, grads))

    def build() -> Work:
        b, h, n, d = shape
        rand = partial(torch.randn, generator=_seeded())
        leaves = [rand(b, n, 3, h, d).to(dtype)]
        leaves += [rand(b, n, h, d).to(dtype) for _ in range(sharing)]
        grads = [rand(b, n, h * d).to(dtype) for _ in range(1 + sharing)]
        exact = [t.double().requires_grad_() for t in leaves]
        leaves = [t.requires_grad_() for t in leaves]
        core, full = _sizes(shape)
        layers = 1 + sharing
        return Work(
            psvit=lambda: run(leaves, grads, True),
            baselines={EAGER_GROUP: lambda: run(leaves, grads, False)},
            exact=lambda: run(exact, _double(*grads), False),
            eager=lambda: run(leaves, grads, False),
            # Q K^T, dQ and dK once; P V, P^T dO and dO V^T in each layer.
            flops=2.0 * full * d * (3 + 3 * layers),
            nbytes=float(core * (2 * (2 + layers) + 2 * layers) * dtype.itemsize),
        )

    bars = _with_bars(dtype, {EAGER_GROUP: Bar(1.5, 2.5)})
    family = "group" if form == "dense" else f"group-{form}"
    if form != "dense":
        bars = {EAGER_GROUP: Bar()}
    return Case(_name(family, shape, dtype), dtype, bars, build, grad=True)


# --- token pooling --------------------------------------------------------------------------


def pool_case(
    kind: str, dtype: torch.dtype, shape: tuple[int, int, int] = (8, 197, 384), prefix: int = 1
) -> Case:
    """``token_pool`` 3x3, stride 2. Memory-bound: at least 0.8 of the speed of a plain copy."""
    batch, tokens, channels = shape
    side = round((tokens - prefix) ** 0.5)
    kept = prefix + ((side - 1) // 2 + 1) ** 2

    def build() -> Work:
        x = torch.randn(shape, generator=_seeded()).to(dtype)
        elements = batch * channels * (tokens + kept)
        source = torch.randn(elements // 2, generator=_seeded()).to(dtype)
        target = torch.empty_like(source)
        pool = partial(token_pool, x, (side, side), prefix=prefix, kind=kind)  # type: ignore[arg-type]
        return Work(
            psvit=lambda: pool()[0],
            baselines={
                EAGER_POOL: lambda: eager_pool(x, kind, side, prefix),
                COPY: lambda: target.copy_(source),
            },
            exact=lambda: eager_pool(x.double(), kind, side, prefix),
            eager=lambda: eager_pool(x, kind, side, prefix),
            flops=None,
            nbytes=float(elements * dtype.itemsize),
        )

    bars = _with_bars(dtype, {EAGER_POOL: Bar(3.0), COPY: Bar(None, 0.8)})
    return Case(_name(f"pool-{kind}", shape, dtype), dtype, bars, build)
