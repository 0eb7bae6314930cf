"""``token_pool``: its values, its gradients, its edges, on every provider."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits, bits
from forced_providers import skip_unless_available
from inputs import BF16, F32, F64, guarded, normal
from pool_cases import check_pool, eager_pool, pool_case, pool_results
from surroundings import threads

import psvit_kernels as pk
from psvit_kernels.triton import interpreting

WINDOWS = [
    (kernel, stride, padding)
    for kernel in (1, 2, 3, 5)
    for stride in (1, 2, 3)
    for padding in (0, 1, 2)
    if 2 * padding <= kernel
]
GRIDS = [(1, 1), (1, 7), (5, 6), (7, 7), (14, 14), (9, 2)]
CHANNELS = [1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 65, 100, 384]
STRIDES = [1, 2, 3, 20]
DEIT = 384
if interpreting():  # each program takes a while: sizes that still cross the edges of every block
    GRIDS, CHANNELS, STRIDES, DEIT = [(1, 1), (5, 6)], [1, 17, 33, 100], [1, 2, 7], 72


def fits(grid, kernel, padding) -> bool:
    return all(n + 2 * padding >= kernel for n in grid)


# --- the reference against PyTorch ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("grid", [(5, 6), (11,)], ids=str)
def test_reference_equals_pytorch_in_float64(kind, norm, residual, grid):
    case = pool_case(
        2, grid, 6, dtype=F64, prefix=1, kind=kind, norm=norm, residual=residual, bias=True,
        groups=3,
    )  # fmt: skip
    with pk.use("reference"):
        got = pool_results(case)
    want = pool_results(case, eager_pool)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=name)


# --- every provider against the bar ---------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "k{}s{}p{}".format(*w))
@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
def test_every_window_meets_the_bar(kernel, kind, window):
    size, stride, padding = window
    for grid in GRIDS:
        if fits(grid, size, padding):
            check_pool(
                pool_case(
                    2, grid, 3, dtype=kernel.dtype, prefix=1, kind=kind, kernel=size,
                    stride=stride, padding=padding, groups=3,
                )
            )  # fmt: skip


@pytest.mark.parametrize("stride", STRIDES)
def test_every_stride_keeps_tokens_as_they_are(backend, stride):
    for grid in GRIDS:
        got = check_pool(pool_case(2, grid, 5, dtype=backend.dtype, kind="stride", stride=stride))
        rows, columns = (-(-n // stride) for n in grid)
        assert got["out"].shape == (2, rows * columns, 5)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_every_number_of_channels_meets_the_bar(kernel, kind, channels, norm):
    groups = channels if kind == "conv" else 1
    check_pool(
        pool_case(
            2, (5, 6), channels, dtype=kernel.dtype, prefix=1, kind=kind, groups=groups,
            bias=True, norm=norm,
        )
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_prefix_tokens_pass_beside_the_pool(backend, kind, prefix, norm):
    case = pool_case(
        3, (7, 5), 24, dtype=backend.dtype, prefix=prefix, kind=kind, groups=24, norm=norm
    )
    got = check_pool(case)
    if not norm:
        assert torch.equal(got["out"][:, :prefix], case.x[:, :prefix])
        assert torch.equal(got["dx"][:, :prefix], case.grad_out[:, :prefix])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_sequences_meet_the_bar(backend, kind, prefix, norm):
    """dims=1; without a prefix, a cls token is inside the sequence and is pooled."""
    for tokens in (3, 4, 17, 50):
        check_pool(
            pool_case(
                2, (tokens,), 12, dtype=backend.dtype, prefix=prefix, kind=kind, groups=12,
                norm=norm, bias=True,
            )
        )  # fmt: skip


@pytest.mark.parametrize("norm", [False, True])
def test_deit_size_meets_the_bar(backend, norm):
    for kind in ("max", "avg", "conv"):
        check_pool(
            pool_case(
                2, (14, 14), DEIT, dtype=backend.dtype, prefix=1, kind=kind, groups=DEIT, norm=norm
            )
        )


@pytest.mark.parametrize("parameters", [F32, None], ids=["float32 weights", "weights as x"])
def test_depthwise_convolution_with_fused_norm_meets_the_bar(backend, parameters):
    check_pool(
        pool_case(
            2, (7, 7), 48, dtype=backend.dtype, parameters=parameters, prefix=1, kind="conv",
            groups=48, bias=True, norm=True,
        )
    )  # fmt: skip


# A convolution that is not depthwise: the CPU provider leaves it to PyTorch's own.
@pytest.mark.parametrize("grid", [(7, 6), (13,)], ids=str)
@pytest.mark.parametrize(
    "channels, width, groups", [(8, 8, 1), (8, 24, 1), (8, 16, 8), (8, 8, 2), (6, 3, 3), (3, 7, 1)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_other_convolutions_meet_the_bar(backend, channels, width, groups, grid, norm):
    case = pool_case(
        2, grid, channels, dtype=backend.dtype, kind="conv", width=width, groups=groups, norm=norm,
        bias=True, prefix=2 if width == channels else 0, residual=norm,
    )  # fmt: skip
    with pk.use("auto" if backend.provider == "cpu" else backend.provider):
        assert check_pool(case)["out"].shape[-1] == width


@pytest.mark.parametrize("grid", [(17, 9), (40,)], ids=str)
def test_convolutions_of_many_tokens_and_channels_meet_the_bar(backend, grid):
    """More than one block of each side of the product, none of them full."""
    case = pool_case(3, grid, 70, dtype=backend.dtype, kind="conv", width=150, bias=True, stride=1)
    with pk.use("auto" if backend.provider == "cpu" else backend.provider):
        check_pool(case)


@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
def test_windows_of_more_than_256_tokens_meet_the_bar(kernel, kind):
    case = pool_case(
        1, (17, 18), 3, dtype=kernel.dtype, kind=kind, kernel=17, stride=9, padding=8, groups=3,
        prefix=1, bias=True, norm=True,
    )  # fmt: skip
    check_pool(case)


@pytest.mark.parametrize("norm", [False, True])
def test_depthwise_convolution_of_many_tokens_meets_the_bar(kernel, norm):
    case = pool_case(
        257, (4, 4), 4, dtype=kernel.dtype, kind="conv", groups=4, bias=True, norm=norm
    )
    check_pool(case)


def test_convolution_to_as_many_channels_keeps_prefix_tokens(provider):
    case = pool_case(2, (5, 5), 8, kind="conv", groups=8, prefix=2, bias=True)
    out, _ = pk.token_pool(case.x, case.grid, **case.options, **case.tensors)
    assert torch.equal(out[:, :2], case.x[:, :2])


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_residual_is_added_before_the_pool(backend, kind, norm):
    case = pool_case(
        2, (7, 5), 40, dtype=backend.dtype, prefix=2, kind=kind, groups=40, norm=norm, residual=True
    )
    got = check_pool(case)
    assert torch.equal(got["dx"], got["dresidual"])
    if not norm:
        assert torch.equal(got["out"][:, :2], (case.x + case.tensors["residual"])[:, :2])


def test_gradient_of_the_residual_alone(provider):
    case = pool_case(2, (5, 6), 12, norm=True, residual=True)
    want = pool_results(case)["dresidual"]
    residual = case.tensors.pop("residual").requires_grad_()
    out, _ = pk.token_pool(case.x, case.grid, **case.options, **case.tensors, residual=residual)
    (got,) = torch.autograd.grad(out, residual, case.grad_out)
    assert torch.equal(got, want)


def test_norm_without_a_bias_meets_the_bar(backend):
    case = pool_case(2, (5, 6), 20, dtype=backend.dtype, prefix=1, kind="max", norm=True)
    del case.tensors["norm_bias"]
    check_pool(case)


def test_norm_eps_is_the_one_given(provider):
    case = pool_case(2, (5, 6), 20, kind="avg", norm=True)
    out, _ = pk.token_pool(case.x, case.grid, **case.options, **case.tensors, norm_eps=0.5)
    pooled, _ = pk.token_pool(case.x, case.grid, **case.options)
    want = F.layer_norm(pooled, (20,), *case.tensors.values(), 0.5)
    torch.testing.assert_close(out, want)


# --- what pooling means ---------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "k{}s{}p{}".format(*w))
def test_constants_stay_constant_under_an_average(provider, window):
    kernel, stride, padding = window
    for grid in [*GRIDS, (5,), (14,)]:
        if fits(grid, kernel, padding):
            x = torch.full((1, math.prod(grid), 3), 0.7)
            out, _ = pk.token_pool(
                x, grid, kind="avg", kernel=kernel, stride=stride, padding=padding, dims=len(grid)
            )
            torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=3e-7, atol=0)


def test_new_grid_is_returned(provider):
    x = normal(2, 1 + 14 * 9, 8)
    out, grid = pk.token_pool(x, (14, 9), prefix=1)
    assert grid == (7, 5) and out.shape == (2, 36, 8)
    out, grid = pk.token_pool(x, [127], dims=1)
    assert grid == (64,) and out.shape == (2, 64, 8)
    out, grid = pk.token_pool(x, torch.Size((14, 9)), prefix=1, kind="stride", stride=3)
    assert grid == (5, 3) and out.shape == (2, 16, 8)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "k{}s{}p{}".format(*w))
def test_of_equal_maxima_the_first_gets_the_gradient(provider, dtype, window):
    skip_unless_available(provider, dtype)
    kernel, stride, padding = window
    case = pool_case(
        2, (7, 6), 19, dtype=dtype, prefix=1, kernel=kernel, stride=stride, padding=padding
    )
    values = torch.randint(0, 3, case.x.shape).to(dtype)
    case = case._replace(x=values, grad_out=torch.randint(1, 5, case.grad_out.shape).to(dtype))
    got, want = pool_results(case), pool_results(case, eager_pool)
    assert torch.equal(got["out"], want["out"])
    assert torch.equal(got["dx"], want["dx"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (5, 1, 2)], ids=str)
def test_nan_and_infinity_propagate_as_in_pytorch(provider, kind, value, window):
    kernel, stride, padding = window
    case = pool_case(
        2, (7, 6), 37, prefix=1, kind=kind, groups=37, kernel=kernel, stride=stride, padding=padding
    )
    for _ in range(9):
        at = [int(torch.randint(n, ())) for n in case.x.shape]
        case.x[tuple(at)] = value
    with torch.no_grad():
        got = pk.token_pool(case.x, case.grid, **case.options, **case.tensors)[0]
        want = eager_pool(case.x, case.grid, **case.options, **case.tensors)[0]
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)
    if kind == "max":
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_window_of_nan_alone_and_of_minus_infinity_alone(provider):
    case = pool_case(1, (3, 3), 20)
    case.x[:] = -math.inf
    case.x[:, :, 5] = math.nan
    got, want = pool_results(case), pool_results(case, eager_pool)
    torch.testing.assert_close(got["out"], want["out"], equal_nan=True)
    assert torch.equal(got["dx"], want["dx"])


def test_maxima_with_nan_have_the_gradient_of_pytorch(provider):
    case = pool_case(2, (9, 8), 21, prefix=1)
    case.x[torch.rand_like(case.x) < 0.1] = math.nan
    case.x[torch.rand_like(case.x) < 0.05] = math.inf
    assert torch.equal(pool_results(case)["dx"], pool_results(case, eager_pool)["dx"])


# --- strides and memory ---------------------------------------------------------------------


def strided_tokens(x: torch.Tensor) -> dict[str, torch.Tensor]:
    b, n, c = x.shape
    return {
        "with gaps": guarded(x, 3, (5, 7, 0)),
        "some channels of more": torch.cat([x, x], -1)[..., :c].copy_(x),
        "tokens outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "one image for all": x[:1].expand(b, n, c),
    }


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_strided_inputs_meet_the_bar(backend, kind, norm):
    case = pool_case(
        2, (5, 6), 21, dtype=backend.dtype, prefix=1, kind=kind, groups=21, bias=True, norm=norm
    )
    for x in strided_tokens(case.x).values():
        check_pool(case._replace(x=x))


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_any_strides_of_the_incoming_gradient_meet_the_bar(backend, kind, norm):
    case = pool_case(
        2, (5, 6), 21, dtype=backend.dtype, prefix=1, kind=kind, groups=21, bias=True, norm=norm
    )
    b, n, c = case.grad_out.shape
    for g in (
        normal(1, dtype=backend.dtype).expand(b, n, c),
        normal(b, c, n, dtype=backend.dtype).transpose(1, 2),
        normal(n, b, c, dtype=backend.dtype).transpose(0, 1),
        normal(b, n, 2 * c, dtype=backend.dtype)[..., ::2],
        guarded(case.grad_out, 5, (3, 2, 0)),
        normal(b, 1, c, dtype=backend.dtype).expand(b, n, c),
    ):
        check_pool(case._replace(grad_out=g))


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
def test_strided_inputs_give_the_bits_of_contiguous_ones(cpu_provider, kind):
    case = pool_case(2, (5, 6), 40, prefix=1, kind=kind, groups=40, bias=True, norm=True)
    views = case._replace(x=guarded(case.x, 1, (2, 3, 0)))
    assert_same_bits(pool_results(case), pool_results(views))


@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
def test_strided_residuals_meet_the_bar(backend, kind):
    case = pool_case(
        2, (5, 6), 21, dtype=backend.dtype, prefix=1, kind=kind, groups=21, norm=True, residual=True
    )
    for residual in strided_tokens(case.tensors["residual"]).values():
        check_pool(case._replace(tensors=case.tensors | {"residual": residual}))


def test_strided_weights_meet_the_bar(backend):
    case = pool_case(
        2, (5, 6), 12, dtype=backend.dtype, kind="conv", groups=12, bias=True, norm=True
    )
    weight = normal(3, 3, 12, dtype=backend.dtype).permute(2, 0, 1).unsqueeze(1)
    tensors = case.tensors | {"weight": weight, "norm_bias": normal(1).to(backend.dtype).expand(12)}
    tensors["bias"] = normal(24, dtype=backend.dtype)[::2]
    check_pool(case._replace(tensors=tensors))


def test_inputs_are_left_as_they_were(backend):
    case = pool_case(2, (5, 6), 12, dtype=backend.dtype, kind="conv", groups=12, norm=True)
    before = [case.x, case.grad_out, *case.tensors.values()]
    copies = [t.clone() for t in before]
    pool_results(case)
    for now, then in zip(before, copies, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_no_image_gives_nothing(provider, kind, norm):
    case = pool_case(0, (5, 6), 12, kind=kind, groups=12, norm=norm)
    got = pool_results(case)
    assert got["out"].shape[0] == 0 and got["dx"].shape == case.x.shape
    for name, t in case.tensors.items():
        assert torch.equal(got[f"d{name}"], torch.zeros_like(t))


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_same_bits_in_two_runs(backend, kind, norm):
    case = pool_case(
        3, (9, 7), 40, dtype=backend.dtype, prefix=1, kind=kind, groups=40, bias=True, norm=norm,
        residual=True,
    )  # fmt: skip
    assert_same_bits(pool_results(case), pool_results(case))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("channels", [19, 384])
@pytest.mark.parametrize("norm", [False, True])
def test_same_bits_in_every_run_and_with_any_number_of_threads(
    cpu_provider, dtype, kind, channels, norm
):
    case = pool_case(
        3, (9, 7), channels, dtype=dtype, prefix=1, kind=kind, groups=channels, bias=True, norm=norm
    )
    with threads(1):
        first = pool_results(case)
        assert_same_bits(first, pool_results(case))
    for count in (2, 3):
        with threads(count):
            got = pool_results(case)
        if norm:  # the gradient of the normalisation is PyTorch's own, with its own order of sums
            assert torch.equal(bits(got["out"]), bits(first["out"]))
        else:
            assert_same_bits(first, got)


def test_autocast_does_not_narrow_what_the_reference_computes():
    x, weight = torch.randn(2, 16, 8), torch.randn(12, 8, 3, 3)
    with pk.use("reference"):
        want, _ = pk.token_pool(x, (4, 4), kind="conv", weight=weight)
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = pk.token_pool(x, (4, 4), kind="conv", weight=weight)
    assert torch.equal(got, want)
