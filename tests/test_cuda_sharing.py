"""The kernel of a whole sharing layer, an experiment of the benchmark: right before it is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate
from forced_providers import cuda_kernels
from inputs import BF16, F16, F64
from torch import Tensor, nn

import psvit_kernels as pk
from psvit_kernels import cuda

sys.path.append(str(Path(__file__).parent.parent))  # bench is no part of what is installed

from bench.gpu.sharing_layer import fold, sharing_layer

EPS = 1e-6


@pytest.fixture(params=[BF16, F16], ids=str)
def dtype(request):
    with cuda_kernels("sm_90a"), torch.device("cpu" if cuda._cuda.emulated else "cuda"):
        yield request.param


def layer(channels: int, width: int, dtype: torch.dtype) -> tuple[nn.LayerNorm, nn.Linear]:
    norm, projection = nn.LayerNorm(channels, EPS), nn.Linear(channels, width)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias, 0, 0.2)
    return norm.to(dtype), projection.to(dtype)


def values(x: Tensor, norm: nn.LayerNorm, projection: nn.Linear, heads: int) -> Tensor:
    return projection(norm(x)).unflatten(2, (heads, -1)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "channels", "dim"),
    [
        (2, 3, 197, 192, 64),
        (3, 8, 256, 64, 64),  # a warpgroup could be a head ahead of the other
        (1, 2, 50, 384, 32),
        (3, 2, 5, 72, 64),
        (1, 1, 256, 64, 8),
        (2, 2, 130, 200, 56),
        (1, 1, 1, 8, 16),
        (4, 2, 64, 128, 64),
    ],
)
@pytest.mark.parametrize("shared_map", [False, True])
def test_meets_the_bar(dtype, batch, heads, tokens, channels, dim, shared_map):
    wide = torch.randn(batch, tokens + 3, channels + 8) + 0.5
    x = wide.to(dtype)[:, 1 : tokens + 1, 8:]
    norm, projection = layer(channels, heads * dim, dtype)
    maps = 1 if shared_map else batch
    p = torch.softmax(2 * torch.randn(maps, heads, tokens, tokens), -1).to(dtype)
    attn_map = pk.DenseMap.from_dense(p)
    got = sharing_layer(x, EPS, fold(norm, projection), attn_map).transpose(1, 2)
    eager = p @ values(x, norm, projection, heads)
    exact_v = values(x.to(F64), norm.to(F64), projection.to(F64), heads)
    magnitude_v = nn.functional.linear(
        norm(x.to(F64)).abs(), projection.weight.abs(), projection.bias.abs()
    )
    magnitude = p.to(F64) @ magnitude_v.unflatten(2, (heads, -1)).transpose(1, 2)
    assert_accurate(got, p.to(F64) @ exact_v, eager, magnitude)


def test_refuses_what_does_not_fit_in_words(dtype):
    x = torch.zeros(1, 257, 64, dtype=dtype)
    attn_map = pk.DenseMap.from_dense(torch.zeros(1, 1, 257, 257, dtype=dtype))
    with pytest.raises(ValueError, match="x: got 257 tokens of 64 channels"):
        sharing_layer(x, EPS, fold(*layer(64, 64, dtype)), attn_map)
