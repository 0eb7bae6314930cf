"""FLOPs of the operations, for ``torch.utils.flop_counter``: a multiply-add counts as 2.

As there, only products count; what a backward computes again counts again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import apply as _apply  # noqa: F401  (these define the operations)
from . import attention as _attention  # noqa: F401
from . import pooling as _pooling  # noqa: F401
from .grid import pooled_grid

_ops = torch.ops.psvit_kernels
Shape = tuple[int, ...]


def _product(q: Shape, n: int, d: int) -> int:
    """FLOPs of a product whose sides are the rows of q, n and d."""
    b, h, m = q[:3]
    return 2 * b * h * m * n * d


@register_flop_formula(_ops.attention)
def attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """Q K^T and P V."""
    return _product(q, k[2], q[3] + v[3])


@register_flop_formula(_ops.attention_backward)
def attention_backward(
    grad_out: Shape,
    grad_map: Shape | None,
    grad_lse: Shape | None,
    group_grads: list[Shape],
    group_values: list[Shape],
    q: Shape,
    k: Shape,
    v: Shape,
    bias: Shape | None,
    scale: float,
    map_storage: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    """dO V^T, P^T dO, dS K, dS^T Q, dO_l V_l^T of the layers that share the map, and the scores
    again where it wasn't kept."""
    again = 0 if math.prod(map_storage) else q[3]
    group = sum(values[3] for values in group_values)
    return _product(q, k[2], 2 * v[3] + 2 * q[3] + again + group)


@register_flop_formula(_ops.apply_dense)
def apply_dense(map_storage: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """P V."""
    b, h, n, d = v
    return 2 * b * h * map_storage[2] * n * d


@register_flop_formula(_ops.apply_dense_backward)
def apply_dense_backward(
    grad_out: Shape, map_storage: Shape, v: Shape, *args: Any, **kwargs: Any
) -> int:
    """dO V^T and P^T dO."""
    return 2 * apply_dense(map_storage, v)


@register_flop_formula(_ops.apply_factored)
def apply_factored(
    q: Shape, k: Shape, lse: Shape, bias: Shape | None, scale: float, v: Shape, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Q K^T and P V."""
    b, h, n, d = v
    return 2 * b * h * q[2] * n * (q[3] + d)


@register_flop_formula(_ops.apply_factored_backward)
def apply_factored_backward(
    grad_out: Shape, q: Shape, k: Shape, lse: Shape, bias: Shape | None, scale: float, v: Shape,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """The scores again, dO V^T, P^T dO, dS K, dS^T Q."""
    b, h, n, d = v
    return 2 * b * h * q[2] * n * (3 * q[3] + 2 * d)


@register_flop_formula(_ops.token_pool)
def token_pool(
    x: Shape, residual: Shape | None, grid: list[int], prefix: int, kind: str, kernel: list[int],
    stride: list[int], padding: list[int], weight: Shape | None, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """A convolution's products; comparisons and averages count nothing."""
    if weight is None:
        return 0
    return 2 * x[0] * math.prod(pooled_grid(grid, kernel, stride, padding)) * math.prod(weight)


@register_flop_formula(_ops.token_pool_backward)
def token_pool_backward(grad_out: Shape, *args: Any, **kwargs: Any) -> int:
    """A convolution's two gradients."""
    return 2 * token_pool(*args)
