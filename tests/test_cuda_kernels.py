"""The CUDA kernels of attention and its maps where the tests of the operations don't reach them.

Those ask for head dims, strides and dtypes that the kernels refuse. Here: the numbers of tokens and
head dims that they serve, 8-bit maps in half precision, strides that are multiples of 16 bytes, NaN
all around, and the same bits in two runs (emulated threads run in another order each time).
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, assert_same_bits
from attention_cases import (
    ApplyCase,
    AttentionCase,
    apply_dense,
    check_apply,
    check_attention,
    eager_apply,
    eager_attention,
    with_scores,
)
from forced_providers import BACKENDS, CUDA_DEVICE, CUDA_FAMILIES, serving
from inputs import BF16, F16, F64, fused_qkv, guarded, normal, probabilities, wide

import psvit_kernels as pk
from psvit_kernels import codes

BACKENDS = [backend for backend in BACKENDS if backend.provider == "cuda"]
CODES = ["uint8", "e4m3"]


@pytest.fixture(params=BACKENDS, ids=str)
def dtype(request):
    """That of a family of kernels, which serves the test."""
    with serving("cuda", request.param.dtype, request.param.family):
        yield request.param.dtype


@pytest.fixture(params=CUDA_FAMILIES)
def family(request):
    with serving("cuda", BF16, request.param):
        yield request.param


def attention_case(b, h, rows, n, d, dv, dtype, form="dense") -> AttentionCase:
    q, k, v = (normal(b, h, *size, dtype=dtype) for size in ((rows, d), (n, d), (n, dv)))
    return AttentionCase(q, k, v, normal(b, h, rows, dv, dtype=dtype), form=form)


def apply_case(b, h, rows, n, d, dtype, **options) -> ApplyCase:
    p = probabilities(b, h, rows, n, dtype=dtype)
    grad = normal(b, h, rows, d, dtype=dtype)
    return ApplyCase(p, normal(b, h, n, d, dtype=dtype), grad, **options)


def check_coded(m: pk.QuantizedMap, v, **options) -> None:
    """Against the map's own probabilities in float64; eager has them in the dtype of v."""
    p = codes.decode(m.codes[..., : m.n], F64) * m.row_scale.double()[..., None]
    double = {name: t.double() if torch.is_tensor(t) else t for name, t in options.items()}
    absolute = {name: t.abs() if torch.is_tensor(t) else t for name, t in double.items()}
    exact, size = eager_apply(p, wide(v), **double), eager_apply(p, wide(v).abs(), **absolute)
    eager = eager_apply(p.to(v.dtype), v, **options)
    assert_accurate(pk.apply_attention(m, v, **options), exact, eager, size, "out")


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 36), *range(47, 82, 3), *range(125, 272, 7), 271, 272])
def test_every_number_of_tokens_meets_the_bar(family, n):
    check_attention(attention_case(1, 1, n, n, 64, 64, BF16))
    check_apply(apply_case(1, 1, n, n, 64, BF16))
    # Of one token the probability is 1: eager has it exactly, and a weight in bfloat16 is rounded.
    dtype = F16 if n == 1 else BF16
    check_coded(
        pk.QuantizedMap.from_dense(probabilities(1, 1, n, n, dtype=dtype)),
        normal(1, 1, n, 64, dtype=dtype),
    )


@pytest.mark.parametrize("d", range(8, 129, 8))
def test_every_head_dim_meets_the_bar(dtype, d):
    check_attention(attention_case(1, 2, 21, 37, d, 136 - d, dtype))
    check_apply(apply_case(2, 2, 21, 37, d, dtype))
    check_coded(
        pk.QuantizedMap.from_dense(probabilities(1, 2, 21, 37, dtype=dtype), "e4m3"),
        normal(1, 2, 37, d, dtype=dtype),
    )


@pytest.mark.parametrize("rows, n", [(1, 272), (272, 1), (300, 50), (50, 257), (129, 64)])
def test_rows_and_tokens_may_differ(dtype, rows, n):
    check_attention(attention_case(2, 1, rows, n, 32, 32, dtype))
    check_apply(apply_case(2, 1, rows, n, 32, dtype))


@pytest.mark.parametrize("n", [577, 1025])
def test_long_rows_of_maps_meet_the_bar(dtype, n):
    check_apply(apply_case(1, 2, 130, n, 64, dtype))
    check_coded(
        pk.QuantizedMap.from_dense(probabilities(1, 2, 130, n, dtype=dtype)),
        normal(1, 2, n, 64, dtype=dtype),
    )


def test_many_heads_of_many_sequences_meet_the_bar(dtype):
    """More pieces of work than blocks are there at once."""
    check_attention(attention_case(5, 3, 50, 50, 64, 64, dtype))
    check_apply(apply_case(5, 3, 50, 50, 64, dtype))


# --- 8-bit maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", [1, 5, 16, 49, 50, 65, 197, 272])
def test_coded_rows_are_padded_with_zeros_and_sum_to_one(dtype, n, code):
    q, k, v = fused_qkv(2, n, 3, 32, dtype)
    _, m = pk.attention(q, k, v, return_map=code)
    assert m.codes.dtype == codes.CODES[code] and m.codes.shape[-1] == -(-n // 16) * 16
    assert not m.codes[..., n:].float().any()
    weights = codes.decode(m.codes[..., :n], F64).sum(-1)
    torch.testing.assert_close(m.row_scale.double() * weights, torch.ones_like(weights))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", [65, 197])
def test_stored_codes_are_those_of_the_definition(dtype, n, code):
    """At most one step off, where rounding in another order changes the code."""
    q, k, v = fused_qkv(2, n, 3, 32, dtype)
    q = q * torch.tensor([0.1, 1.0, 4.0], dtype=dtype).view(1, 3, 1, 1)  # from flat to peaked
    out, m = pk.attention(q, k, v, return_map=code)
    exact, p = eager_attention(wide(q), wide(k), wide(v))
    want = pk.QuantizedMap.from_dense(p, code)
    bits = [t[..., :n].contiguous().view(torch.uint8).int() for t in (m.codes, want.codes)]
    assert int((bits[0] - bits[1]).abs().max()) <= 1
    other = bits[0] != bits[1]
    assert float(other.float().mean()) < 0.01
    same = ~other.any(-1)
    torch.testing.assert_close(m.row_scale[same], want.row_scale[same], rtol=1e-5, atol=0)
    size = with_scores(p, wide(q), wide(k), 32**-0.5, None) @ wide(v).abs()
    assert_accurate(out, exact, eager_attention(q, k, v)[0], size, "out")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_coded_maps_with_every_option_meet_the_bar(dtype, code, batch):
    m = pk.QuantizedMap.from_dense(probabilities(batch, 3, 50, 50, dtype=dtype), code)
    v, correction = normal(3, 4, 50, 64, dtype=dtype), normal(4, 3)
    check_coded(m, v, head_index=[2, 0, 0, 1], correction=correction)


# --- strides ----------------------------------------------------------------------------------


def surrounded(t: torch.Tensor) -> torch.Tensor:
    """In memory that is NaN before, between rows, heads and sequences, and after."""
    return guarded(t, 8, (24, 16, 8, 0)[::-1] if t.dim() == 3 else (16, 24, 40, 8))


def test_what_lies_around_the_tensors_is_not_read(dtype):
    plain = attention_case(2, 3, 21, 50, 32, 40, dtype)
    check_attention(
        plain._replace(q=surrounded(plain.q), k=surrounded(plain.k), v=surrounded(plain.v))
    )
    q, k, v = fused_qkv(2, 50, 3, 64, dtype)
    stored = surrounded(pk.attention(q, k, v, return_map="dense")[1].storage)
    want = pk.apply_attention(pk.DenseMap(stored.contiguous(), 50), v)
    got = pk.apply_attention(pk.DenseMap(stored, 50), surrounded(v))
    assert_same_bits({"out": got}, {"out": want})


def test_part_of_a_map_serves_too(dtype):
    """A batch, some heads or some rows of a stored map, as views."""
    q, k, v = fused_qkv(3, 50, 4, 24, dtype)
    for form in ("dense", *CODES):
        m = pk.attention(q, k, v, return_map=form)[1]
        whole = pk.apply_attention(m, v)
        every = slice(None)
        for index in ((slice(1, 2),), (every, slice(1, 3)), (every, every, slice(5, 9))):
            if form == "dense":
                part = pk.DenseMap(m.storage[index], m.n)
            else:
                part = pk.QuantizedMap(m.codes[index], m.row_scale[index], m.n, dtype)
            got = pk.apply_attention(part, v[index[:2]])
            torch.testing.assert_close(got, whole[index], rtol=1e-2, atol=1e-2)


def test_one_map_or_one_head_for_all(dtype):
    case = apply_case(1, 1, 50, 50, 64, dtype)
    p, v = case.p.expand(1, 3, 50, 50), normal(4, 3, 50, 64, dtype=dtype)
    check_apply(ApplyCase(p, v, normal(4, 3, 50, 64, dtype=dtype)))
    storage = pk.DenseMap.from_dense(case.p).storage.expand(4, 3, 50, 56)
    assert torch.equal(pk.apply_attention(pk.DenseMap(storage, 50), v), apply_dense(p, v))


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_propagate_through_attention(dtype, where, value):
    tensors = {name: normal(1, 2, 18, 16, dtype=dtype) for name in "qkv"}
    tensors[where][0, 1, 5, 3] = value
    out, p = pk.attention(**tensors, return_map="dense")
    want, want_p = eager_attention(*(wide(tensors[name]) for name in "qkv"))
    for got, expected in ((out, want), (p.dense(), want_p)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("n", [18, 65])
def test_nan_and_infinity_propagate_through_a_map(dtype, value, n):
    p, v = probabilities(1, 2, n, n, dtype=dtype), normal(1, 2, n, 16, dtype=dtype)
    p.clamp_min_(1e-3)  # 0 times infinity would be NaN, and where p rounds to 0 is not the question
    v[0, 1, n - 1, 3] = value
    p[0, 0, 2, 7] = value
    got, want = apply_dense(p, v), eager_apply(wide(p), wide(v))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("form", CODES)
def test_row_of_nan_stays_in_its_row_of_a_coded_map(dtype, form):
    q, k, v = (normal(1, 2, 18, 16, dtype=dtype) for _ in range(3))
    q[:, :, 4] = math.nan
    out, m = pk.attention(q, k, v, return_map=form)
    for t in (out, m.dense(), pk.apply_attention(m, v)):
        assert bool(t[:, :, 4].isnan().all()) and not bool(t[:, :, [0, 3, 5, 17]].isnan().any())


def test_identity_map_returns_the_values_themselves(dtype):
    v = normal(2, 3, 50, 24, dtype=dtype)
    assert torch.equal(apply_dense(torch.eye(50, dtype=dtype).expand(1, 3, 50, 50), v), v)


def test_large_scores_do_not_overflow(dtype):
    case = attention_case(1, 2, 20, 33, 16, 16, dtype)
    check_attention(case._replace(q=case.q * 50, k=case.k * 50))


# --- calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", *CODES])
def test_same_bits_in_two_runs(dtype, form):
    q, k, v = fused_qkv(2, 197, 2, 64, dtype)

    def run() -> dict:
        out, m = pk.attention(q, k, v, return_map=form)
        stored = m.storage if form == "dense" else m.codes.view(torch.uint8).short()
        return {"out": out, "map": stored, "applied": pk.apply_attention(m, v)}

    first = run()
    for _ in range(2):
        assert_same_bits(first, run())


@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
def test_no_sequence_or_no_head_gives_nothing(dtype, batch, heads):
    q = normal(batch, heads, 9, 16, dtype=dtype)
    for form in ("dense", *CODES):
        out, m = pk.attention(q, q, q, return_map=form)
        assert out.shape == q.shape and m.shape == (batch, heads, 9, 9)
        assert pk.apply_attention(m, q).shape == q.shape
    assert pk.token_pool(normal(0, 9, 16, dtype=dtype), (3, 3))[0].shape == (0, 4, 16)


def test_inputs_are_left_as_they_were(dtype):
    q, k, v = fused_qkv(1, 50, 2, 64, dtype)
    before = [t.clone() for t in (q, k, v)]
    _, m = pk.attention(q, k, v, return_map="uint8")
    stored = m.codes.clone()
    pk.apply_attention(m, v)
    for t, copy in zip((q, k, v, m.codes), (*before, stored), strict=True):
        assert torch.equal(t, copy)


# --- GPU --------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(CUDA_DEVICE != "cuda", reason="no CUDA device")


def forward(q, k, v):
    out, m = pk.attention(q, k, v, return_map="dense")
    coded = pk.attention(q, k, v, return_map="uint8")[1]
    other = pk.apply_attention(m, out) + pk.apply_attention(coded, v, head_index=[1, 0, 2])
    return pk.token_pool(other.transpose(1, 2).flatten(2), (7, 7), prefix=1)[0]


@pytest.mark.gpu
@needs_gpu
def test_kernels_are_captured_in_a_graph(family):
    tensors = [normal(2, 3, 50, 64, dtype=BF16) for _ in range(3)]
    forward(*tensors)  # copies the head index once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(*tensors)
    for t in tensors:
        t.copy_(torch.randn_like(t))
    graph.replay()
    assert torch.equal(captured, forward(*tensors))


@pytest.mark.gpu
@needs_gpu
def test_kernels_run_on_the_current_stream_and_nothing_waits(family):
    tensors = [normal(2, 3, 50, 64, dtype=BF16) for _ in range(3)]
    want = forward(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = forward(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_tensors_of_another_device_are_served_there(family):
    with torch.device("cuda:1"):
        tensors = [normal(2, 3, 50, 64, dtype=BF16) for _ in range(3)]
        out = forward(*tensors)
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    assert bool(out.isfinite().all())
