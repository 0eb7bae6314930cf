"""Attention maps: how they are stored, what they cost, and that they can be kept and sent."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from inputs import BF16, F16, F32, F64, normal, probabilities

import psvit_kernels as pk

PITCHES = {F64: 2, F32: 4, BF16: 8, F16: 8}  # elements in 16 bytes


@pytest.mark.parametrize("n", [1, 2, 5, 8, 49, 50, 64, 65, 197, 257])
def test_rows_start_on_multiples_of_16_bytes_and_padding_is_zero(backend, n):
    q, k, v = (normal(2, 2, t, 16, dtype=backend.dtype) for t in (3, n, n))
    m = pk.attention(q, k, v, return_map="dense")[1]
    assert isinstance(m, pk.DenseMap)
    unit = PITCHES[backend.dtype]
    pitch = -(-n // unit) * unit
    assert m.storage.shape == (2, 2, 3, pitch)
    assert m.storage.is_contiguous()
    assert m.shape == (2, 2, 3, n) and m.dtype == backend.dtype and m.device.type == "cpu"
    assert m.dense().shape == m.shape
    assert m.dense().data_ptr() == m.storage.data_ptr()
    assert torch.equal(m.storage[..., n:], torch.zeros(2, 2, 3, pitch - n, dtype=backend.dtype))
    assert m.nbytes == 2 * 2 * 3 * pitch * backend.dtype.itemsize
    assert m.nbytes % 16 == 0


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_examples_of_the_row_pitch(dtype):
    m = pk.DenseMap.from_dense(probabilities(1, 1, 2, 197, dtype=dtype))
    assert m.storage.shape[-1] == {F64: 198, F32: 200, BF16: 200, F16: 200}[dtype]


def test_from_dense_keeps_the_values_and_pads_with_zeros():
    p = probabilities(2, 3, 5, 7)
    m = pk.DenseMap.from_dense(p)
    assert torch.equal(m.dense(), p)
    assert not m.storage[..., 7:].any()
    assert torch.equal(pk.DenseMap.from_dense(p.transpose(2, 3)).dense(), p.transpose(2, 3))


def test_from_dense_passes_gradients_on():
    p = probabilities(2, 3, 5, 7).requires_grad_()
    weights = normal(2, 3, 5, 7)
    (pk.DenseMap.from_dense(p).dense() * weights).sum().backward()
    assert torch.equal(p.grad, weights)


def test_factored_map_costs_what_its_parts_cost():
    q, k, v = (normal(2, 3, 50, 16) for _ in range(3))
    m = pk.attention(q, k, v, return_map="factored")[1]
    assert isinstance(m, pk.FactoredMap)
    assert m.shape == (2, 3, 50, 50) and m.dtype == F32
    assert m.lse.shape == (2, 3, 50) and m.lse.dtype == F32
    parts = 4 * (2 * 2 * 3 * 50 * 16 + 2 * 3 * 50)
    assert m.nbytes == parts
    with_bias = pk.attention(q, k, v, bias=normal(50), return_map="factored")[1]
    assert with_bias.nbytes == parts + 4 * 50  # expanded, not copied


def test_lse_is_float32_but_float64_for_float64():
    for dtype, wide in ((BF16, F32), (F16, F32), (F32, F32), (F64, F64)):
        q = normal(1, 1, 4, 8, dtype=dtype)
        m = pk.attention(q, q, q, return_map="factored")[1]
        assert m.lse.dtype == wide
        torch.testing.assert_close(
            m.lse, torch.logsumexp(q.to(wide) @ q.to(wide).transpose(-1, -2) / 8**0.5, -1)
        )


def test_factored_map_shows_the_probabilities_of_the_dense_one(backend):
    q, k, v = (normal(2, 3, 21, 16, dtype=backend.dtype) for _ in range(3))
    bias = normal(3, 21, 21, dtype=backend.dtype)
    dense, factored = (
        pk.attention(q, k, v, bias=bias, return_map=form)[1].dense()
        for form in ("dense", "factored")
    )
    assert dense.dtype == factored.dtype == backend.dtype
    torch.testing.assert_close(dense, factored)


def some_maps() -> list[pk.AttentionMap]:
    q, k, v = (normal(2, 3, 9, 16) for _ in range(3))
    return [
        pk.attention(q, k, v, return_map="dense")[1],
        pk.attention(q, k, v, return_map="factored")[1],
        pk.attention(q, k, v, bias=normal(9), return_map="factored")[1],
    ]


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved_and_loaded(m),
}


def _saved_and_loaded(m: pk.AttentionMap) -> pk.AttentionMap:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_map_serve_as_the_map_does(provider, how):
    v = normal(2, 3, 9, 24)
    for m in some_maps():
        other = COPIES[how](m)
        assert type(other) is type(m) and other.shape == m.shape and other.nbytes == m.nbytes
        assert torch.equal(pk.apply_attention(other, v), pk.apply_attention(m, v))


def test_deepcopy_shares_no_memory():
    m = some_maps()[0]
    other = copy.deepcopy(m)
    other.storage.zero_()
    assert m.storage.any()


def test_maps_compare_by_identity_and_can_be_keys():
    first, second = pk.DenseMap(torch.ones(1, 1, 4, 4), 4), pk.DenseMap(torch.ones(1, 1, 4, 4), 4)
    assert first != second and len({first, second}) == 2


def test_base_class_has_neither_a_dense_form_nor_a_size():
    with pytest.raises(TypeError, match="AttentionMap has no dense form"):
        pk.AttentionMap().dense()
    with pytest.raises(TypeError, match="AttentionMap has no size"):
        _ = pk.AttentionMap().nbytes
