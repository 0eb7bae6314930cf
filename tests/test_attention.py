"""``attention``: its values, its gradients, its memory, on every provider."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, assert_all_accurate, assert_same_bits
from attention_cases import (
    AttentionCase,
    attention_magnitudes,
    attention_results,
    check_attention,
    eager_attention,
)
from inputs import BF16, F32, F64, fused_qkv, guarded, normal
from surroundings import threads

import psvit_kernels as pk

FORMS = [None, "dense", "factored"]

#: (B, H, M, N, d, d'): the odd sizes that kernels get wrong.
SHAPES = [
    (1, 1, 1, 1, 16, 16),
    (2, 3, 1, 50, 64, 64),
    (2, 2, 50, 1, 32, 32),
    (2, 3, 5, 5, 17, 17),
    (3, 2, 49, 49, 24, 24),
    (2, 3, 50, 50, 64, 64),
    (2, 1, 64, 64, 32, 32),
    (1, 2, 65, 65, 64, 80),
    (5, 1, 7, 65, 80, 64),
    (1, 2, 197, 197, 64, 64),
    (2, 2, 50, 197, 16, 48),
    (1, 1, 197, 50, 128, 1),
    (1, 2, 33, 65, 1, 128),
    (1, 1, 257, 257, 80, 80),
    (1, 1, 65, 5, 128, 128),
    (1, 2, 18, 40, 3, 127),
]


def random_case(shape, dtype, form=None, use_map=True, **more) -> AttentionCase:
    b, h, m, n, d, dv = shape
    q, k, v = normal(b, h, m, d), normal(b, h, n, d), normal(b, h, n, dv)
    grad_map = normal(b, h, m, n) if form == "dense" and use_map else None
    tensors = {"q": q, "k": k, "v": v, "grad_out": normal(b, h, m, dv), "grad_map": grad_map}
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    return AttentionCase(**tensors, form=form, **more)


# --- the reference against PyTorch and the formulas -----------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 50, 50, 64, 64), (1, 2, 7, 65, 17, 24)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_equals_sdpa_in_float64(shape, form, with_bias):
    case = random_case(shape, F64, form, use_map=False)
    if with_bias:
        case = case._replace(bias=normal(*shape[:4], dtype=F64))

    def sdpa(q, k, v, *, scale, bias, return_map):
        scores = (q @ k.transpose(-1, -2)) * case.factor
        p = torch.softmax(scores if bias is None else scores + bias, -1)
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale), p

    with pk.use("reference"), threads(1):
        got = attention_results(case)
    want = attention_results(case, sdpa)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_reference_gradients_equal_autograd_through_the_map(form):
    """The map's own gradient, and one without any gradient of out."""
    case = random_case((2, 2, 9, 13, 16, 16), F64)
    grad_map = normal(2, 2, 9, 13, dtype=F64)

    def grads(attention, dense):
        q, k, v = (t.detach().requires_grad_() for t in case[:3])
        _, p = attention(q, k, v, return_map=form)
        return torch.autograd.grad(dense(p), (q, k), grad_map)

    with pk.use("reference"), threads(1):
        got = grads(pk.attention, lambda p: p.dense())
    for a, b in zip(got, grads(eager_attention, lambda p: p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# --- the bar itself -------------------------------------------------------------------------


EPS = torch.finfo(F32).eps

#: What is done to a result, in place; ``unit`` is its magnitude.
SPOILS = {
    "one element off by few roundings": lambda t, unit: t[1, 2, 3].add_(16 * EPS * unit[1, 2, 3]),
    "all elements off by fewer": lambda t, unit: t.add_(4 * EPS * unit),
    "one element of another sign": lambda t, unit: t[1, 2, 3, 4].neg_(),
    "one element NaN": lambda t, unit: t[1, 2, 3, 4].fill_(math.nan),
    "one element infinite": lambda t, unit: t[1, 2, 3, 4].fill_(math.inf),
    "last row zero": lambda t, unit: t[..., -1, :].zero_(),
    "last column zero": lambda t, unit: t[..., -1].zero_(),
    "two heads swapped": lambda t, unit: t.copy_(t.flip(1)),
    "as if computed in bfloat16": lambda t, unit: t.copy_(t.bfloat16()),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ["out", "map", "dq", "dk", "dv", "dbias"])
def test_a_spoiled_result_misses_the_bar(name, spoil):
    case = random_case((2, 3, 21, 37, 32, 24), F32, "dense", bias=normal(2, 3, 21, 37))
    with pk.use("reference"):
        exact, got = attention_results(case.double()), attention_results(case)
    eager, magnitudes = attention_results(case, eager_attention), attention_magnitudes(case)
    assert_all_accurate(got, exact, eager, magnitudes)
    got[name] = got[name].detach().clone()
    SPOILS[spoil](got[name], magnitudes[name].float())
    with pytest.raises(AssertionError, match=rf"^{name} \("):
        assert_all_accurate(got, exact, eager, magnitudes)


def test_a_result_of_another_shape_or_dtype_misses_the_bar():
    exact, eager = normal(3, 4, dtype=F64), normal(3, 4)
    with pytest.raises(AssertionError, match=r"result: shape \(3, 1\), not \(3, 4\)"):
        assert_accurate(exact.float()[:, :1], exact, eager, exact.abs())
    with pytest.raises(AssertionError, match="bfloat16, not torch"):
        assert_accurate(exact.bfloat16(), exact, eager, exact.abs())


def test_a_missed_bar_tells_shape_place_and_sizes_of_the_error():
    exact = torch.ones(2, 3, dtype=F64)
    got = exact.float()
    got[1, 2] = 1.5
    with pytest.raises(AssertionError) as caught:
        assert_accurate(got, exact, exact.float() + 1e-4, exact, "dv")
    message = str(caught.value)
    assert message.startswith("dv (2, 3) torch.float32: 1 of 6 elements miss the bar")
    assert "the worst, at (1, 2), is 1.5, should be 1: error 0.5, allowed 0.0002" in message
    assert "(eager's here 0.0001, floor 2.98e-07)" in message


def test_fresh_memory_starts_as_nan():
    for t in (torch.empty(3), torch.empty_like(normal(2)), normal(1).new_empty(4, dtype=BF16)):
        assert bool(t.isnan().all())


# --- every provider against the bar ---------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_meet_the_bar(backend, shape, form):
    check_attention(random_case(shape, backend.dtype, form))


def test_values_and_gradients_meet_the_bar_at_577_tokens(kernel):
    check_attention(random_case((1, 1, 577, 577, 64, 64), kernel.dtype, "dense"))


@pytest.mark.parametrize("d", [*range(1, 20), 31, 33, 47, 48, 63, 72, 96, 100, 112, 120, 127])
def test_every_head_dim_meets_the_bar(kernel, d):
    check_attention(random_case((1, 2, 6, 21, d, d), kernel.dtype, "dense"))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 66, 127, 129])
def test_every_remainder_of_tokens_meets_the_bar(kernel, n):
    check_attention(random_case((1, 2, n, n, 16, 16), kernel.dtype, "dense"))
    check_attention(random_case((1, 1, 3, n, 20, 12), kernel.dtype, "factored"))


def test_rows_of_the_map_sum_to_one(provider):
    q, k, v = (normal(2, 3, 65, 32) for _ in range(3))
    for form in ("dense", "factored"):
        p = pk.attention(q, k, v, return_map=form)[1].dense()
        assert p.shape == (2, 3, 65, 65)
        assert bool((p >= 0).all())
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 65), rtol=0, atol=1e-5)


def test_scale_is_one_over_root_d_unless_given(provider):
    q, k, v = (normal(1, 2, 20, 16) for _ in range(3))
    default, _ = pk.attention(q, k, v)
    given, _ = pk.attention(q, k, v, scale=0.25)
    assert torch.equal(default, given)
    check_attention(AttentionCase(q, k, v, normal(1, 2, 20, 16), scale=1.7, form="dense"))
    check_attention(AttentionCase(q, k, v, normal(1, 2, 20, 16), scale=-0.3, form="factored"))
    check_attention(AttentionCase(q, k, v, normal(1, 2, 20, 16), scale=0.0, form="dense"))


def test_large_scores_do_not_overflow(backend):
    case = random_case((1, 2, 33, 50, 32, 32), backend.dtype, "dense")
    check_attention(case._replace(q=case.q * 30, k=case.k * 30 if backend.dtype == F32 else case.k))


def test_scores_far_below_the_largest_become_zero(provider):
    q = torch.ones(1, 1, 4, 16)
    k = torch.zeros(1, 1, 40, 16)
    k[:, :, 7] = 1000.0
    v = normal(1, 1, 40, 16)
    out, p = pk.attention(q, k, v, return_map="dense")
    torch.testing.assert_close(out, v[:, :, 7:8].expand(1, 1, 4, 16), rtol=1e-6, atol=0)
    assert float(p.dense().sum()) == 4.0


# --- bias -----------------------------------------------------------------------------------


def key_mask(b: int, n: int) -> torch.Tensor:
    """(B, 1, 1, N): the last few keys of each sequence are padding."""
    lengths = torch.randint(1, n + 1, (b, 1, 1, 1))
    return torch.where(torch.arange(n) < lengths, 0.0, -math.inf)


BIASES = {
    "scalar": lambda b, h, m, n: normal(1).squeeze(0),
    "one key bias for all, (N,)": lambda b, h, m, n: normal(n),
    "rows, (M, N)": lambda b, h, m, n: normal(m, n),
    "column, (M, 1)": lambda b, h, m, n: normal(m, 1),
    "key mask, (B, 1, 1, N)": lambda b, h, m, n: key_mask(b, n),
    "relative positions, (1, H, M, N)": lambda b, h, m, n: normal(1, h, m, n),
    "full, (B, H, M, N)": lambda b, h, m, n: normal(b, h, m, n),
    "per head, (H, 1, 1)": lambda b, h, m, n: normal(h, 1, 1),
    "expanded": lambda b, h, m, n: normal(h, 1, n).expand(b, h, m, n),
    "transposed": lambda b, h, m, n: normal(h, n, m).transpose(1, 2),
    "sliced": lambda b, h, m, n: guarded(normal(b, 1, m, n), 5, (3, 0, 2, 7)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BIASES)
def test_bias_and_its_gradient_meet_the_bar(backend, name, form):
    shape = (2, 3, 21, 37, 32, 24)
    bias = BIASES[name](*shape[:4])
    keep = bias.to(backend.dtype)  # keeps the strides of dense and expanded tensors alike
    check_attention(random_case(shape, backend.dtype, form, bias=keep))


def test_causal_mask_meets_the_bar(backend):
    n = 65
    mask = torch.where(torch.ones(n, n).tril().bool(), 0.0, -math.inf).to(backend.dtype)
    for form in FORMS:
        check_attention(random_case((1, 2, n, n, 32, 32), backend.dtype, form, bias=mask))


def test_masked_keys_get_no_weight_and_no_gradient(provider):
    q, k, v = (normal(2, 2, 20, 16, dtype=F32).requires_grad_() for _ in range(3))
    mask = torch.zeros(20).index_fill(0, torch.tensor([3, 19]), -math.inf)
    out, p = pk.attention(q, k, v, bias=mask, return_map="dense")
    assert not p.dense()[..., [3, 19]].any()
    for grad in torch.autograd.grad(out, (k, v), normal(2, 2, 20, 16)):
        assert not grad[:, :, [3, 19]].any()
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_row_of_minus_infinity_alone_is_nan_and_stays_in_its_row(provider, form):
    q, k, v = (normal(1, 2, 10, 16) for _ in range(3))
    mask = torch.zeros(10, 10)
    mask[4] = -math.inf
    out, p = pk.attention(q, k, v, bias=mask, return_map=form)
    want, _ = eager_attention(q, k, v, bias=mask)
    assert torch.equal(out.isnan(), want.isnan())
    assert bool(out[:, :, 4].isnan().all()) and not bool(out[:, :, 5].isnan().any())
    if p is not None:
        assert bool(p.dense()[:, :, 4].isnan().all())
        assert not bool(p.dense()[:, :, 5].isnan().any())


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_propagate_as_in_pytorch(provider, where, value):
    tensors = {name: normal(1, 2, 18, 16) for name in "qkv"}
    tensors[where][0, 1, 5, 3] = value
    out, p = pk.attention(**tensors, return_map="dense")
    want, want_p = eager_attention(**tensors)
    for got, expected in ((out, want), (p.dense(), want_p)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


# --- strides --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_views_of_a_fused_projection_meet_the_bar(backend, form):
    q, k, v = fused_qkv(2, 50, 3, 64, backend.dtype)
    case = AttentionCase(q, k, v, normal(2, 3, 50, 64, dtype=backend.dtype), form=form)
    check_attention(case)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """Inside a larger tensor of NaN: every second token, an odd offset."""
    b, h, n, d = t.shape
    big = torch.full((b + 1, h + 2, 2 * n + 1, d + 5), math.nan, dtype=t.dtype)
    view = big[1:, 1:-1, 1::2, 3 : 3 + d]
    return view.copy_(t)


def swapped(t: torch.Tensor) -> torch.Tensor:
    """Tokens outermost in memory, as models that keep (N, B, C) have it."""
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def one_batch_for_all(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand_as(t)


def one_head_for_all(t: torch.Tensor) -> torch.Tensor:
    return t[:, :1].expand_as(t)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("view", [sliced, swapped, one_batch_for_all, one_head_for_all])
def test_strided_inputs_meet_the_bar(backend, view, form):
    case = random_case((2, 3, 21, 50, 32, 40), backend.dtype, form)
    check_attention(case._replace(q=view(case.q), k=view(case.k), v=view(case.v)))


def test_strided_inputs_give_the_bits_of_contiguous_ones(cpu_provider):
    case = random_case((2, 3, 21, 50, 40, 40), F32, "dense")
    views = case._replace(q=sliced(case.q), k=swapped(case.k), v=guarded(case.v, 1, (1, 2, 3, 0)))
    assert_same_bits(attention_results(case), attention_results(views))


def test_one_value_per_head_may_have_any_stride(provider):
    """A last dimension of one element has no stride that could be wrong."""
    q = normal(1, 2, 9, 4)[..., :1]
    v = normal(1, 2, 1, 9).transpose(-1, -2)
    check_attention(AttentionCase(q, q, v, normal(1, 2, 9, 1), form="dense"))


GRADS = {
    "expanded from a sum": lambda b, h, m, d: normal(1).expand(b, h, m, d),
    "transposed": lambda b, h, m, d: normal(b, h, d, m).transpose(2, 3),
    "heads apart": lambda b, h, m, d: normal(b, h, m, d),
    "heads merged": lambda b, h, m, d: normal(b, m, h, d).transpose(1, 2),
    "sliced": lambda b, h, m, d: guarded(normal(b, h, m, d), 3, (0, 5, 0, 2)),
    "every second": lambda b, h, m, d: normal(b, h, m, 2 * d)[..., ::2],
}


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("name", GRADS)
def test_any_strides_of_the_incoming_gradient_meet_the_bar(backend, name, form):
    case = random_case((2, 3, 21, 37, 32, 24), backend.dtype, form)
    grad_out = GRADS[name](2, 3, 21, 24).to(backend.dtype)
    check_attention(case._replace(grad_out=grad_out))


def test_sum_of_the_output_can_be_differentiated(provider):
    q, k, v = (normal(2, 2, 20, 16).requires_grad_() for _ in range(3))
    pk.attention(q, k, v)[0].sum().backward()
    want = torch.autograd.grad(eager_attention(q, k, v)[0].sum(), (q, k, v))
    for got, expected in zip((q.grad, k.grad, v.grad), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- gradients that are partly absent -------------------------------------------------------


def test_gradient_of_the_map_alone_meets_the_bar(backend):
    case = random_case((2, 2, 21, 37, 16, 16), backend.dtype, "dense")
    case = case._replace(grad_out=torch.zeros_like(case.grad_out))

    def grads(attention, case):
        q, k = (t.detach().requires_grad_() for t in case[:2])
        p = attention(q, k, case.v, return_map="dense")[1]
        dense = p if isinstance(p, torch.Tensor) else p.dense()
        return torch.autograd.grad(dense, (q, k), case.grad_map)

    magnitudes = attention_magnitudes(case)
    got, eager = grads(pk.attention, case), grads(eager_attention, case)
    with pk.use("reference"):
        exact = grads(pk.attention, case.double())
    for name, *three in zip(("dq", "dk"), got, exact, eager, strict=True):
        assert_accurate(*three, magnitudes[name], name)


def test_gradients_are_only_given_where_asked_for(provider):
    q, k, v, grad_out = (normal(1, 2, 9, 16) for _ in range(4))
    bias = normal(9, 9)
    for chosen in ("q", "k", "v", "bias"):
        tensors = {"q": q, "k": k, "v": v, "bias": bias}
        tensors[chosen] = tensors[chosen].detach().requires_grad_()
        out, _ = pk.attention(**tensors, return_map="dense")
        (got,) = torch.autograd.grad(out, tensors[chosen], grad_out)
        out, _ = eager_attention(**tensors)
        (want,) = torch.autograd.grad(out, tensors[chosen], grad_out)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_is_differentiable_without_need(provider):
    q, k, v = (normal(1, 2, 9, 16) for _ in range(3))
    out, p = pk.attention(q, k, v, return_map="dense")
    assert not out.requires_grad and not p.storage.requires_grad and p.links is None
    out, p = pk.attention(q.requires_grad_(), k, v, return_map="factored")
    assert out.requires_grad and p.lse.requires_grad and p.links is not None


# --- memory and repeatability ---------------------------------------------------------------


def test_merging_the_heads_of_the_output_copies_nothing(backend):
    q, k, v = (normal(2, 3, 21, 24, dtype=backend.dtype) for _ in range(3))
    for form in FORMS:
        out, _ = pk.attention(q, k, v, return_map=form)
        assert out.shape == (2, 3, 21, 24)
        merged = out.transpose(1, 2)
        assert merged.is_contiguous()
        assert merged.reshape(2, 21, 72).data_ptr() == out.data_ptr()


def test_output_without_a_map_equals_output_with_one(provider):
    q, k, v = (normal(1, 3, 65, 64) for _ in range(3))
    bare, nothing = pk.attention(q, k, v)
    assert nothing is None
    for form in ("dense", "factored"):
        torch.testing.assert_close(pk.attention(q, k, v, return_map=form)[0], bare)


def test_inputs_are_left_as_they_were(backend):
    case = random_case((2, 2, 21, 37, 32, 24), backend.dtype, "dense")
    case = case._replace(bias=normal(21, 37, dtype=backend.dtype))
    before = [None if not torch.is_tensor(t) else t.clone() for t in case]
    attention_results(case)
    for now, then in zip(case, before, strict=True):
        assert then is None or torch.equal(now, then)


@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
def test_no_sequence_or_no_head_gives_nothing(provider, batch, heads):
    q, k, v = (normal(batch, heads, 5, 16).requires_grad_() for _ in range(3))
    out, p = pk.attention(q, k, v, return_map="dense")
    assert out.shape == (batch, heads, 5, 16)
    assert p.shape == (batch, heads, 5, 5)
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3, 65, 65, 64, 64), (1, 1, 197, 197, 64, 64)], ids=str)
def test_same_bits_in_every_run_and_with_any_number_of_threads(cpu_provider, dtype, form, shape):
    case = random_case(shape, dtype, form, bias=normal(shape[3]).to(dtype))
    with threads(1):
        first = attention_results(case)
        assert_same_bits(first, attention_results(case))
    for count in (2, 3):
        with threads(count):
            assert_same_bits(first, attention_results(case))
