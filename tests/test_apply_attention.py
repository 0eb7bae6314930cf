"""``apply_attention``: a map applied to other values, alone and in a group of layers."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, assert_same_bits
from attention_cases import (
    ApplyCase,
    apply_dense,
    apply_results,
    check_apply,
    check_group,
    eager_apply,
    eager_attention,
    eager_group,
    group_case,
    group_results,
    with_scores,
)
from inputs import BF16, F32, F64, fused_qkv, guarded, normal, probabilities, wide
from surroundings import threads

import psvit_kernels as pk

#: (batch of the map, B, H, M, N, d)
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 2, 3, 1, 50, 64),
    (2, 2, 2, 50, 1, 32),
    (2, 2, 3, 5, 5, 17),
    (1, 3, 2, 49, 49, 24),
    (2, 2, 3, 50, 50, 64),
    (2, 2, 1, 64, 64, 32),
    (1, 2, 2, 65, 65, 80),
    (5, 5, 1, 7, 65, 64),
    (1, 1, 2, 197, 197, 64),
    (2, 2, 2, 50, 197, 48),
    (1, 4, 1, 197, 50, 1),
    (1, 1, 1, 257, 257, 80),
    (2, 2, 1, 65, 5, 128),
    (1, 2, 2, 18, 40, 127),
]


def random_case(shape, dtype, **more) -> ApplyCase:
    batch, b, h, m, n, d = shape
    p = probabilities(batch, h, m, n, dtype=dtype)
    return ApplyCase(p, normal(b, h, n, d, dtype=dtype), normal(b, h, m, d, dtype=dtype), **more)


# --- dense maps -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_values_and_gradients_meet_the_bar(backend, shape):
    check_apply(random_case(shape, backend.dtype))


def test_dense_values_and_gradients_meet_the_bar_at_577_tokens(kernel):
    check_apply(random_case((1, 1, 1, 577, 577, 64), kernel.dtype))


@pytest.mark.parametrize("d", [*range(1, 20), 31, 33, 47, 63, 72, 96, 100, 112, 120, 127])
def test_every_head_dim_meets_the_bar(kernel, d):
    check_apply(random_case((2, 2, 2, 6, 21, d), kernel.dtype))


@pytest.mark.parametrize("n", [2, 3, 4, 6, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 63, 66, 127, 129])
def test_every_remainder_of_tokens_meets_the_bar(kernel, n):
    check_apply(random_case((1, 2, 1, n, n, 20), kernel.dtype))


def test_map_of_ones_adds_all_values(provider):
    """The map is applied as given: nothing normalises it a second time."""
    v = normal(2, 2, 9, 16)
    out = apply_dense(torch.ones(1, 2, 4, 9), v)
    torch.testing.assert_close(out, v.sum(2, keepdim=True).expand(2, 2, 4, 16))


def test_identity_map_returns_the_values_themselves(provider):
    v = normal(2, 3, 50, 24)
    assert torch.equal(apply_dense(torch.eye(50).expand(1, 3, 50, 50), v), v)


def test_map_that_is_not_padded_serves_too(provider):
    """Storage with a pitch of exactly N: rows are not aligned, and results are the same."""
    p, v = probabilities(2, 3, 21, 37), normal(2, 3, 37, 24)
    torch.testing.assert_close(pk.apply_attention(pk.DenseMap(p, 37), v), apply_dense(p, v))


def test_part_of_a_map_serves_too(provider):
    """A batch, some heads or some rows of a stored map, as views."""
    q, k, v = (normal(3, 4, 21, 24) for _ in range(3))
    m = pk.attention(q, k, v, return_map="dense")[1]
    p = m.dense()
    every = slice(None)
    for index in ((slice(1, 2),), (every, slice(1, 3)), (every, every, slice(5, 9))):
        part = pk.DenseMap(m.storage[index], m.n)
        values = v[index[:2]]
        torch.testing.assert_close(pk.apply_attention(part, values), p[index] @ values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_propagate_as_in_pytorch(provider, value):
    p, v = probabilities(1, 2, 18, 18), normal(1, 2, 18, 16)
    v[0, 1, 5, 3] = value
    p[0, 0, 2, 7] = value
    got, want = apply_dense(p, v), eager_apply(p, v)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


# --- head index -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "donor_heads, index",
    [(3, [2, 0, 1]), (3, [0, 0, 0]), (3, [2, 2, 1, 0, 1, 2]), (6, [5, 1]), (1, [0, 0]), (4, [3])],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_head_index_meets_the_bar(backend, donor_heads, index, batch):
    dtype, heads = backend.dtype, len(index)
    case = ApplyCase(
        probabilities(batch, donor_heads, 21, 37, dtype=dtype),
        normal(2, heads, 37, 24, dtype=dtype),
        normal(2, heads, 21, 24, dtype=dtype),
        head_index=index,
    )
    got = check_apply(case)
    unused = sorted(set(range(donor_heads)) - set(index))
    assert not got["dmap"][:, unused].any()


def test_head_index_in_order_gives_the_bits_of_none(cpu_provider):
    case = random_case((2, 2, 3, 21, 37, 24), F32)
    assert_same_bits(apply_results(case), apply_results(case._replace(head_index=[0, 1, 2])))


def test_head_index_may_be_a_tuple_or_a_tensor(provider):
    p, v = probabilities(1, 3, 9, 9), normal(1, 2, 9, 16)
    want = p[:, [2, 1]] @ v
    for index in ((2, 1), torch.tensor([2, 1])):
        torch.testing.assert_close(apply_dense(p, v, head_index=index), want)


# --- correction -----------------------------------------------------------------------------


@pytest.mark.parametrize("scalars", [F32, None], ids=["float32 scalars", "scalars as v"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == s[4]], ids=str)
def test_correction_meets_the_bar(backend, shape, scalars):
    correction = normal(shape[2], 3, dtype=scalars or backend.dtype)
    check_apply(random_case(shape, backend.dtype, correction=correction))


def test_correction_with_a_head_index_meets_the_bar(backend):
    dtype = backend.dtype
    check_apply(
        ApplyCase(
            probabilities(1, 2, 50, 50, dtype=dtype),
            normal(2, 4, 50, 32, dtype=dtype),
            normal(2, 4, 50, 32, dtype=dtype),
            head_index=[1, 0, 1, 1],
            correction=normal(4, 3, dtype=F32),
        )
    )


def test_correction_is_alpha_pv_plus_beta_v_plus_gamma_mean_v(provider):
    p, v = probabilities(2, 3, 20, 20), normal(2, 3, 20, 16)
    for column, want in enumerate((p @ v, v, v.mean(2, keepdim=True).expand_as(v))):
        correction = torch.zeros(3, 3)
        correction[:, column] = torch.tensor([1.0, -2.0, 0.5])
        want = want * correction[:, column, None, None]
        torch.testing.assert_close(apply_dense(p, v, correction=correction), want)


def test_mean_of_many_equal_tokens_is_their_value(provider):
    """Where every rounding has the same sign, a plain sum would be off by hundreds of them."""
    v = torch.full((1, 1, 1025, 16), 0.7)
    mean_alone = torch.tensor([[0.0, 0.0, 1.0]])
    out = apply_dense(torch.zeros(1, 1, 1025, 1025), v, correction=mean_alone)
    torch.testing.assert_close(out, v, rtol=4e-6, atol=0)


def test_correction_that_does_nothing_changes_nothing(provider):
    p, v = probabilities(2, 3, 20, 20), normal(2, 3, 20, 16)
    nothing = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    torch.testing.assert_close(apply_dense(p, v, correction=nothing), apply_dense(p, v))


# --- strides and memory ---------------------------------------------------------------------


def test_values_from_a_fused_projection_meet_the_bar(backend):
    _, _, v = fused_qkv(2, 50, 3, 64, backend.dtype)
    p = probabilities(2, 3, 50, 50, dtype=backend.dtype)
    check_apply(ApplyCase(p, v, normal(2, 3, 50, 64, dtype=backend.dtype)))


def test_strided_inputs_meet_the_bar(backend):
    dtype = backend.dtype
    case = random_case((2, 2, 3, 21, 37, 24), dtype)
    check_apply(case._replace(v=guarded(case.v, 3, (1, 7, 0, 5))))
    check_apply(case._replace(v=case.v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)))
    check_apply(case._replace(v=case.v[:1].expand(2, 3, 37, 24)))
    check_apply(case._replace(v=case.v[:, :1].expand(2, 3, 37, 24)))
    check_apply(case._replace(p=case.p[:, :1].expand(2, 3, 21, 37)))


@pytest.mark.parametrize("corrected", [False, True])
def test_any_strides_of_the_incoming_gradient_meet_the_bar(backend, corrected):
    dtype = backend.dtype
    case = random_case((2, 2, 3, 21, 21, 24), dtype)
    if corrected:
        case = case._replace(correction=normal(3, 3, dtype=F32))
    for grad_out in (
        normal(1, dtype=dtype).expand(2, 3, 21, 24),
        normal(2, 3, 24, 21, dtype=dtype).transpose(2, 3),
        normal(2, 21, 3, 24, dtype=dtype).transpose(1, 2),
        guarded(normal(2, 3, 21, 24, dtype=dtype), 3, (0, 5, 0, 2)),
        normal(2, 3, 21, 48, dtype=dtype)[..., ::2],
    ):
        check_apply(case._replace(grad_out=grad_out))


def test_strided_values_give_the_bits_of_contiguous_ones(cpu_provider):
    case = random_case((2, 2, 3, 50, 50, 40), F32, correction=normal(3, 3))
    views = case._replace(v=guarded(case.v, 1, (1, 2, 3, 0)))
    assert_same_bits(apply_results(case), apply_results(views))


def test_merging_the_heads_of_the_output_copies_nothing(backend):
    p, v = probabilities(1, 3, 21, 37, dtype=backend.dtype), normal(2, 3, 37, 24)
    out = apply_dense(p, v.to(backend.dtype))
    assert out.shape == (2, 3, 21, 24)
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).reshape(2, 21, 72).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
def test_no_sequence_or_no_head_gives_nothing(provider, batch, heads):
    v = normal(batch, heads, 5, 16).requires_grad_()
    out = apply_dense(torch.ones(1, heads, 5, 5), v)
    assert out.shape == (batch, heads, 5, 16)
    out.sum().backward()
    assert v.grad.shape == v.shape


def test_inputs_are_left_as_they_were(backend):
    case = random_case((2, 2, 3, 21, 21, 24), backend.dtype, correction=normal(3, 3))
    before = [t.clone() if torch.is_tensor(t) else None for t in case]
    apply_results(case)
    for now, then in zip(case, before, strict=True):
        assert then is None or torch.equal(now, then)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [65, 197])
def test_same_bits_in_every_run_and_with_any_number_of_threads(cpu_provider, dtype, batch, tokens):
    shape = (batch, 2, 2, tokens, tokens, 64)
    case = random_case(shape, dtype, head_index=[1, 1], correction=normal(2, 3))
    with threads(1):
        first = apply_results(case)
        assert_same_bits(first, apply_results(case))
    for count in (2, 3):
        with threads(count):
            assert_same_bits(first, apply_results(case))


# --- groups: one layer attends, others share ------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 16), (2, 3, 50, 64), (1, 2, 65, 17), (1, 1, 197, 64), (2, 1, 49, 128)],
    ids=str,
)  # fmt: skip
def test_group_of_layers_meets_the_bar(backend, form, shape):
    check_group(group_case(*shape, backend.dtype, form))


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("sharing, reuses", [(1, 0), (2, 1), (1, 3), (5, 5), (7, 6)])
def test_group_meets_the_bar_whatever_number_of_reuses_was_told(backend, form, sharing, reuses):
    """Gradients come back by links as far as those go, then by way of one of the map's size."""
    case = group_case(2, 2, 21, 32, backend.dtype, form, sharing=sharing)
    check_group(case._replace(reuses=reuses))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_group_with_mixed_heads_meets_the_bar(backend, form):
    case = group_case(2, 3, 21, 32, backend.dtype, form)
    check_group(case._replace(head_index=[2, 0, 2]))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_group_whose_map_the_user_differentiates_too_meets_the_bar(backend, form):
    check_group(group_case(2, 2, 21, 32, backend.dtype, form, differentiate_map=True))


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize(
    "bias",
    [
        lambda b, h, n: normal(n),
        lambda b, h, n: normal(1, h, n, n),
        lambda b, h, n: torch.where(torch.arange(n) < n - 3, 0.0, -math.inf).expand(b, 1, 1, n),
        lambda b, h, n: torch.where(torch.ones(n, n).tril().bool(), 0.0, -math.inf),
    ],
    ids=["(N,)", "(1, H, N, N)", "key mask", "causal"],
)
def test_group_with_a_bias_meets_the_bar(backend, form, bias):
    check_group(group_case(2, 2, 33, 32, backend.dtype, form, bias=bias(2, 2, 33)))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_cross_attention_map_with_head_index_equals_autograd(provider, form):
    """M != N, another number of heads, another width of values; the map's form makes no odds."""
    q, k, v = normal(2, 3, 9, 16), normal(2, 3, 20, 16), normal(2, 3, 20, 8)
    values, index = normal(2, 5, 20, 24), [2, 0, 0, 1, 2]
    g, g2 = normal(2, 3, 9, 8), normal(2, 5, 9, 24)

    def run(attention, apply):
        t = [x.detach().requires_grad_() for x in (q, k, v, values)]
        out, p = attention(*t[:3], return_map=form)
        other = apply(p, t[3], head_index=index)
        return (out, other, *torch.autograd.grad((out, other), t, (g, g2)))

    got = run(pk.attention, pk.apply_attention)
    for a, b in zip(got, run(eager_attention, eager_apply), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_corrected_group_equals_autograd(provider, form):
    tensors = [normal(2, 2, 20, 16) for _ in range(4)] + [normal(2, 3)]
    grads = [normal(2, 2, 20, 16) for _ in range(2)]

    def run(attention, apply):
        t = [x.detach().requires_grad_() for x in tensors]
        out, p = attention(*t[:3], return_map=form)
        other = apply(p, t[3], correction=t[4])
        return (out, other, *torch.autograd.grad((out, other), t, grads))

    got = run(pk.attention, pk.apply_attention)
    for a, b in zip(got, run(eager_attention, eager_apply), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_factored_map_without_gradients_meets_the_bar(backend):
    dtype = backend.dtype
    q, k = normal(2, 3, 50, 64, dtype=dtype), normal(2, 3, 50, 64, dtype=dtype)
    v = normal(2, 3, 50, 64, dtype=dtype)
    m = pk.attention(q, k, v, return_map="factored")[1]
    exact_p = eager_attention(wide(q), wide(k), wide(v))[1]
    eager = eager_apply(eager_attention(q, k, v)[1], v)
    size = with_scores(exact_p, wide(q), wide(k), 1 / 8, None)
    got = pk.apply_attention(m, v)
    assert_accurate(got, exact_p @ wide(v), eager, size @ wide(v).abs(), "out")


def test_part_of_a_factored_map_serves_too(provider):
    """Some heads or rows of it, as views: lse is then in pieces too."""
    q, k, v, values = (normal(2, 4, 21, 24) for _ in range(4))
    m = pk.attention(q, k, v, return_map="factored")[1]
    whole = m.dense()
    every = slice(None)
    for heads, rows in ((slice(1, 3), every), (every, slice(5, 9)), (slice(0, 4, 2), slice(1, 2))):
        part = pk.FactoredMap(q[:, heads, rows], k[:, heads], m.lse[:, heads, rows], m.scale)
        got = pk.apply_attention(part, values[:, heads])
        torch.testing.assert_close(got, whole[:, heads, rows] @ values[:, heads])


def test_both_forms_of_a_map_give_the_same_output(provider):
    q, k, v, values = (normal(2, 3, 65, 32) for _ in range(4))
    outs = [
        pk.apply_attention(pk.attention(q, k, v, return_map=form)[1], values)
        for form in ("dense", "factored")
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_group_gives_the_same_bits_with_any_number_of_threads(cpu_provider, form):
    case = group_case(2, 2, 65, 64, F32, form, bias=normal(65))
    with threads(1):
        first = group_results(case)
    for count in (1, 2, 3):
        with threads(count):
            assert_same_bits(first, group_results(case))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_reference_group_equals_autograd_in_float64(form):
    case = group_case(2, 2, 20, 16, F64, form, bias=normal(20), differentiate_map=True)
    want = eager_group(case)
    with pk.use("reference"):
        got = group_results(case)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12, msg=name)
