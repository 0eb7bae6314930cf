"""Triton's kernels where tensors are large, graphs are captured, and devices are several."""

from __future__ import annotations

import pytest
import torch
from forced_providers import serving
from inputs import F16, normal
from torch.utils import deterministic

import psvit_kernels as pk
from psvit_kernels.triton import interpreting

FAR = 2**31 + 64


@pytest.fixture(autouse=True)
def triton_provider():
    with serving("triton"):
        yield


def far_apart(values: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The same values with 2^31 elements between the first sequence and the second.

    What lies between is never touched, so that it costs address space and no memory.
    """
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(FAR + values[0].numel(), dtype=values.dtype)
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    view = memory.as_strided(values.shape, (FAR, *values[0].contiguous().stride()))
    return view.copy_(values)


def pairs(run, tensors, monkeypatch):
    """Results for the tensors as they are, and far apart."""
    near = run(*(t.detach().requires_grad_() for t in tensors))
    far = run(*(far_apart(t, monkeypatch).requires_grad_() for t in tensors))
    return zip(near, far, strict=True)


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("tokens", [20, 300])
def test_attention_reaches_beyond_two_to_the_31_elements(form, tokens, monkeypatch):
    grad = normal(2, 1, tokens, 16, dtype=F16)

    def run(q, k, v, values):
        out, m = pk.attention(q, k, v, return_map=form)
        other = pk.apply_attention(m, values)
        return (out, other, *torch.autograd.grad((out, other), (q, k, v, values), (grad, grad)))

    tensors = [normal(2, 1, tokens, 16, dtype=F16) for _ in range(4)]
    for near, far in pairs(run, tensors, monkeypatch):
        assert torch.equal(near, far)


def test_maps_and_gradients_reach_beyond_two_to_the_31_elements(monkeypatch):
    storage = torch.zeros(2, 2, 9, 16, dtype=F16)
    storage[..., :9] = normal(2, 2, 9, 9, dtype=F16).softmax(-1)
    grad = far_apart(normal(2, 2, 9, 16, dtype=F16), monkeypatch)

    def run(storage, v):
        out = pk.apply_attention(pk.DenseMap(storage, 9), v)
        return (out, *torch.autograd.grad(out, (storage, v), grad))

    for near, far in pairs(run, [storage, normal(2, 2, 9, 16, dtype=F16)], monkeypatch):
        assert torch.equal(near, far)


@pytest.mark.parametrize("kind", ["max", "conv"])
def test_pooling_reaches_beyond_two_to_the_31_elements(kind, monkeypatch):
    options = {"weight": normal(16, 1, 3, 3, dtype=F16), "groups": 16} if kind == "conv" else {}
    norm = {"norm_weight": normal(16, dtype=F16), "norm_bias": normal(16, dtype=F16)}
    grad = normal(2, 5, 16, dtype=F16)

    def run(x, residual):
        out, _ = pk.token_pool(x, (4, 4), prefix=1, kind=kind, residual=residual, **options, **norm)
        return (out, *torch.autograd.grad(out, (x, residual), grad))

    tensors = [normal(2, 17, 16, dtype=F16) for _ in range(2)]
    for near, far in pairs(run, tensors, monkeypatch):
        assert torch.equal(near, far)


# --- GPU --------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    interpreting() or not torch.cuda.is_available(), reason="no CUDA device"
)


def model(q, k, v, values):
    out, m = pk.attention(q, k, v, return_map="dense")
    coded = pk.attention(q.detach(), k.detach(), v.detach(), return_map="uint8")[1]
    other = pk.apply_attention(m, values, dropout=0.1)
    other = other + pk.apply_attention(coded, values.detach(), head_index=[1, 0, 2])
    pooled, _ = pk.token_pool(other.transpose(1, 2).flatten(2), (7, 7), prefix=1)
    return out.square().sum() + pooled.square().sum()


@pytest.mark.gpu
@needs_gpu
def test_forward_and_backward_are_captured_in_a_graph():
    tensors = [normal(2, 3, 50, 64, dtype=F16).requires_grad_() for _ in range(4)]

    def step():
        loss = model(*tensors)
        return (loss, *torch.autograd.grad(loss, tensors))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t))
    torch.cuda.manual_seed(7)
    graph.replay()
    assert all(bool(t.isfinite().all()) for t in captured)
    without_dropout = pk.attention(*tensors[:3])[0]
    torch.testing.assert_close(
        without_dropout, torch.nn.functional.scaled_dot_product_attention(*tensors[:3]),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_device():
    tensors = [normal(2, 3, 50, 64, dtype=F16).requires_grad_() for _ in range(4)]
    torch.autograd.grad(model(*tensors), tensors)  # compiles, and copies head indices once
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(model(*tensors), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_tensors_of_another_device_are_served_there():
    with torch.device("cuda:1"):
        tensors = [normal(2, 3, 50, 64, dtype=F16).requires_grad_() for _ in range(4)]
        assert all(t.device.index == 1 for t in torch.autograd.grad(model(*tensors), tensors))
