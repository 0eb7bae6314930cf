"""Registers ``reduce_map``, which ``AttentionMap.reduce`` calls."""

import torch

from .maps import row_pitch
from .registry import register


def _fake(storage, n, order, starts, means, shares):
    b, h, _, _ = storage.shape
    m = starts.shape[1] - 1
    return storage.new_empty(max(b, order.shape[0]), h, m, row_pitch(m, storage.itemsize))


def _fake_backward(grad, storage, n, order, starts, means, shares):
    return storage.new_empty(storage.shape)


def _setup_context(ctx, inputs, output):
    storage, ctx.n, *tables = inputs
    ctx.save_for_backward(storage, *tables)


def _backward(ctx, grad):
    storage, *tables = ctx.saved_tensors
    found = torch.ops.psvit_kernels.reduce_map_backward(grad, storage, ctx.n, *tables)
    return found, None, None, None, None, None


_REDUCE = "Tensor storage, SymInt n, Tensor order, Tensor starts, Tensor means, Tensor? shares"

register(f"reduce_map_backward(Tensor grad, {_REDUCE}) -> Tensor", _fake_backward)
register(f"reduce_map({_REDUCE}) -> Tensor", _fake, _backward, _setup_context)
