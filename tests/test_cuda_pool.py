"""The CUDA kernel of ``token_pool``: every width and window it serves."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_same_bits
from forced_providers import serving
from inputs import BF16, F16, F32, guarded, normal
from pool_cases import check_pool, eager_pool, pool_case

import psvit_kernels as pk

KINDS = ["max", "avg", "stride", "conv"]
# One thread a token and 32; 3, 4 and 8 vectors a thread, with threads and vectors left over.
CHANNELS = [8, 24, 32, 40, 56, 64, 96, 192, 328, 384, 768, 776, 1024, 1032, 1280, 1536, 2048]
WINDOWS = [
    (kernel, stride, padding)
    for kernel in (1, 2, 3, 4, 5)
    for stride in (1, 2, 3)
    for padding in range(kernel // 2 + 1)
]


@pytest.fixture(params=[BF16, F16], ids=str)
def dtype(request):
    with serving("cuda", request.param, "sm_80"):
        yield request.param


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_width_meets_the_bar(dtype, kind, channels, norm, residual):
    kernel = 3 if channels <= 1536 else 2
    case = pool_case(
        2, (5, 4), channels, dtype=dtype, prefix=1, kind=kind, kernel=kernel, groups=channels,
        bias=True, norm=norm, residual=residual,
    )  # fmt: skip
    check_pool(case)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "k{}s{}p{}".format(*w))
@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
def test_every_window_meets_the_bar(dtype, kind, window):
    kernel, stride, padding = window
    for grid in [(1, 1), (1, 7), (5, 6), (7, 7), (9, 2), (13,)]:
        if any(n + 2 * padding < kernel for n in grid):
            continue
        for residual in (False, True):
            case = pool_case(
                2, grid, 24, dtype=dtype, prefix=2, kind=kind, kernel=kernel, stride=stride,
                padding=padding, groups=24, residual=residual,
            )  # fmt: skip
            check_pool(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, channels", [(1, 384), (40, 384), (300, 8), (17, 768)])
def test_any_number_of_tokens_meets_the_bar(dtype, kind, batch, channels):
    """Blocks with one token, with many in turn, and with the end of one image and a whole next."""
    case = pool_case(
        batch, (7, 6), channels, dtype=dtype, prefix=1, kind=kind, groups=channels, norm=True
    )
    check_pool(case)


@pytest.mark.parametrize("parameters", [F32, None], ids=["float32 weights", "weights as x"])
@pytest.mark.parametrize("norm_bias", [False, True])
def test_parameters_of_either_dtype_meet_the_bar(dtype, parameters, norm_bias):
    case = pool_case(
        2, (7, 7), 48, dtype=dtype, parameters=parameters, prefix=1, kind="conv", groups=48,
        bias=True, norm=True,
    )  # fmt: skip
    if not norm_bias:
        del case.tensors["norm_bias"]
    check_pool(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
def test_strided_tokens_give_the_bits_of_contiguous_ones(dtype, kind, norm):
    case = pool_case(
        2, (5, 6), 48, dtype=dtype, prefix=1, kind=kind, groups=48, bias=True, norm=norm,
        residual=True,
    )  # fmt: skip
    other = case.tensors.pop("residual")
    want, _ = pk.token_pool(case.x, case.grid, **case.options, **case.tensors, residual=other)
    for x, residual in zip(views(case.x), views(other), strict=True):
        for pair in ((x, other), (case.x, residual), (x, residual)):
            got, _ = pk.token_pool(
                pair[0], case.grid, **case.options, **case.tensors, residual=pair[1]
            )
            assert_same_bits({"out": got}, {"out": want})


def views(x: torch.Tensor) -> list[torch.Tensor]:
    """The same tokens with other strides, all multiples of 16 bytes."""
    c = x.shape[-1]
    return [
        guarded(x, 8, (24, 16, 0)),
        torch.cat([x, x], -1)[..., c:],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]


@pytest.mark.parametrize("kind", ["avg", "stride"])
def test_kept_tokens_are_kept_to_the_bit(dtype, kind):
    x = normal(2, 1 + 30, 64, dtype=dtype)
    x[0, :, :5], x[1, :, 7] = -0.0, math.inf
    out, _ = pk.token_pool(x, (5, 6), prefix=1, kind=kind, kernel=1, stride=2, padding=0)
    kept = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (5, 6))[:, ::2, ::2].flatten(1, 2)], 1)
    assert_same_bits({"out": out}, {"out": kept})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (5, 1, 2)], ids=str)
def test_nan_and_infinity_propagate_as_in_pytorch(dtype, kind, value, window, norm):
    kernel, stride, padding = window
    case = pool_case(
        2, (7, 6), 72, dtype=dtype, prefix=1, kind=kind, groups=72, kernel=kernel, stride=stride,
        padding=padding, norm=norm,
    )  # fmt: skip
    for _ in range(9):
        case.x[tuple(int(torch.randint(n, ())) for n in case.x.shape)] = value
    got, _ = pk.token_pool(case.x, case.grid, **case.options, **case.tensors)
    want, _ = eager_pool(case.x, case.grid, **case.options, **case.tensors)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0).isinf(), want.nan_to_num(0.0).isinf())
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0.05, atol=0.1)
