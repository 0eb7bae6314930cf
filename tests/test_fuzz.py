"""Random shapes, strides and offsets at the boundary of the compiled module, against the bar.

Every tensor lies in memory that is NaN wherever it is not: what reads outside shows in the
result, and what writes into memory that was only to be read is found afterwards. Reads and writes
outside of any tensor are for AddressSanitizer: the same tests run under it.

The examples are the same in every run. ``PSVIT_FUZZ=5000`` draws as many new ones per test.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from accuracy import bits
from attention_cases import (
    ApplyCase,
    AttentionCase,
    GroupCase,
    check_apply,
    check_attention,
    check_group,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inputs import BF16, F32, guarded, normal, probabilities
from pool_cases import check_pool, pool_case
from surroundings import threads
from torch import Tensor

EXAMPLES = int(os.environ.get("PSVIT_FUZZ", "0"))

#: Of the bar: what is looked for here is what is wrong, not the last bit of degenerate cases.
SLACK = 8.0

bounded = settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pytestmark = pytest.mark.usefixtures("cpu_provider")

dtypes = st.sampled_from([F32, BF16])
tokens = st.one_of(st.integers(1, 20), st.integers(1, 80), st.sampled_from([48, 49, 64, 65, 129]))
head_dims = st.one_of(st.integers(1, 40), st.sampled_from([48, 63, 64, 65, 80, 96, 127, 128]))
thread_counts = st.integers(1, 4)


@st.composite
def layouts(draw, dims: int, unit_last: bool = True, shared: bool = True):
    """How a tensor lies in memory: order of its dimensions, gaps, offset, which have stride 0."""
    inner = [dims - 1] if unit_last else []
    order = [*draw(st.permutations(range(dims - len(inner)))), *inner]
    gaps = [draw(st.sampled_from([0, 0, 1, 3, 16])) for _ in range(dims - len(inner))]
    gaps += [0] * len(inner)
    offset = draw(st.integers(0, 20))
    broadcast = [d for d in range(dims - 1) if shared and draw(st.integers(0, 7)) == 0]
    return order, gaps, offset, broadcast


def laid_out(t: Tensor, layout) -> Tensor:
    order, gaps, offset, broadcast = layout
    shape = t.shape
    for dim in broadcast:
        t = t.narrow(dim, 0, min(1, t.shape[dim]))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return guarded(t.permute(order), offset, gaps).permute(inverse).expand(shape)


class Untouched:
    """The memory behind these tensors is the same at the end, the NaN around them included."""

    def __init__(self, *tensors: Tensor | None) -> None:
        whole = [t.new_empty(0).set_(t.untyped_storage()) for t in tensors if t is not None]
        self._memory = [(t, bits(t).clone()) for t in whole]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        for now, before in self._memory:
            assert torch.equal(bits(now), before), "memory of an input was written to"


@st.composite
def biases(draw, shape: tuple[int, int, int, int]):
    """None, or a bias of any shape that broadcasts, with -inf but no row of -inf alone."""
    if draw(st.booleans()):
        return None
    dims = draw(st.integers(0, 4))
    sizes = [n if draw(st.booleans()) else 1 for n in shape[4 - dims :]]
    bias = normal(*sizes) if sizes else normal(1)[0]
    if sizes and sizes[-1] > 1 and draw(st.booleans()):
        blocked = torch.rand(bias.shape) < 0.3
        blocked[..., 0] = False
        bias = torch.where(blocked, -math.inf, bias)
    if not sizes:
        return bias
    return laid_out(bias, draw(layouts(dims, unit_last=False, shared=False)))


@st.composite
def attention_cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    b, h = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    m, n, d, dv = draw(tokens), draw(tokens), draw(head_dims), draw(head_dims)
    dtype, form = draw(dtypes), draw(st.sampled_from([None, "dense", "factored"]))
    q, k, v = (
        laid_out(normal(*shape).to(dtype), draw(layouts(4)))
        for shape in ((b, h, m, d), (b, h, n, d), (b, h, n, dv))
    )
    grad_out = laid_out(normal(b, h, m, dv).to(dtype), draw(layouts(4, unit_last=False)))
    grad_map = None
    if form == "dense" and draw(st.booleans()):
        grad_map = laid_out(normal(b, h, m, n).to(dtype), draw(layouts(4, unit_last=False)))
    bias = draw(biases((b, h, m, n)))
    bias = None if bias is None else bias.to(dtype)
    scale = draw(st.sampled_from([None, None, 0.3, -1.0, 2.5]))
    return AttentionCase(q, k, v, grad_out, bias, scale, grad_map, form)


@bounded
@given(case=attention_cases(), count=thread_counts)
def test_attention(case, count):
    tensors = (case.q, case.k, case.v, case.grad_out, case.bias, case.grad_map)
    with threads(count), Untouched(*tensors):
        check_attention(case, SLACK)


@st.composite
def apply_cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    b, h, donors = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    m, n, d, dtype = draw(tokens), draw(tokens), draw(head_dims), draw(dtypes)
    index = draw(st.lists(st.integers(0, donors - 1), min_size=h, max_size=h))
    if draw(st.booleans()):
        donors, index = h, None
    correction = None
    if draw(st.booleans()):
        m = n
        correction = normal(h, 3).to(draw(st.sampled_from([F32, dtype])))
        correction = laid_out(correction, draw(layouts(2, unit_last=False)))
    p = probabilities(draw(st.sampled_from([1, b])), donors, m, n).to(dtype)
    v = laid_out(normal(b, h, n, d).to(dtype), draw(layouts(4)))
    grad_out = laid_out(normal(b, h, m, d).to(dtype), draw(layouts(4, unit_last=False)))
    return ApplyCase(p, v, grad_out, index, correction)


@bounded
@given(case=apply_cases(), count=thread_counts)
def test_apply_attention(case, count):
    with threads(count), Untouched(case.p, case.v, case.grad_out, case.correction):
        check_apply(case, SLACK)


@st.composite
def group_cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    b, h = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n, d, dtype = draw(tokens), draw(head_dims), draw(dtypes)
    index = draw(st.one_of(st.none(), st.lists(st.integers(0, h - 1), min_size=1, max_size=5)))
    shapes = {"q": (b, h, n, d), "k": (b, h, n, d), "v": (b, h, n, draw(head_dims))}
    for layer in range(draw(st.integers(1, 2))):
        shapes[f"v{layer}"] = (b, len(index or range(h)), n, draw(head_dims))
    tensors = {
        name: laid_out(normal(*shape).to(dtype), draw(layouts(4))) for name, shape in shapes.items()
    }
    bias = draw(biases((b, h, n, n)))
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    grads = [
        laid_out(normal(*shape).to(dtype), draw(layouts(4, unit_last=False)))
        for name, shape in shapes.items()
        if name.startswith("v")
    ]
    return GroupCase(tensors, grads, draw(st.sampled_from(["dense", "factored"])), None, index)


@bounded
@given(case=group_cases(), count=thread_counts)
def test_group_of_layers(case, count):
    with threads(count), Untouched(*case.tensors.values(), *case.grads):
        check_group(case, SLACK)


@st.composite
def pool_cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kernel = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel // 2))
    least = max(1, kernel - 2 * padding)
    dims = draw(st.sampled_from([1, 2, 2]))
    grid = [draw(st.integers(least, 12)) for _ in range(dims)]
    channels = draw(st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 127, 128, 129, 200])))
    kind = draw(st.sampled_from(["max", "avg", "stride", "conv"]))
    dtype = draw(dtypes)
    case = pool_case(
        draw(st.integers(0, 3)), grid, channels, dtype=dtype,
        parameters=draw(st.sampled_from([F32, dtype])), prefix=draw(st.sampled_from([0, 1, 5])),
        kind=kind, kernel=kernel, stride=draw(st.integers(1, 6)), padding=padding,
        groups=channels if kind == "conv" else 1, bias=draw(st.booleans()),
        norm=draw(st.booleans()), residual=draw(st.booleans()),
    )  # fmt: skip
    tensors = {
        name: laid_out(t, draw(layouts(t.dim(), unit_last=name == "residual", shared=False)))
        for name, t in case.tensors.items()
    }
    if "norm_bias" in tensors and draw(st.booleans()):
        del tensors["norm_bias"]
    x = laid_out(case.x, draw(layouts(3)))
    grad_out = laid_out(case.grad_out, draw(layouts(3, unit_last=False)))
    return case._replace(x=x, grad_out=grad_out, tensors=tensors)


@bounded
@given(case=pool_cases(), count=thread_counts)
def test_token_pool(case, count):
    with threads(count), Untouched(case.x, case.grad_out, *case.tensors.values()):
        check_pool(case, SLACK)


@bounded
@given(data=st.data())
def test_any_bits_are_read_without_harm(data):
    """Random bit patterns: NaN with payloads, infinities, subnormals; only memory matters here."""
    import psvit_kernels as pk

    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    n, d, dtype = data.draw(tokens), data.draw(head_dims), data.draw(dtypes)
    kind = torch.int32 if dtype == F32 else torch.int16
    info = torch.iinfo(kind)

    def noise(*shape: int) -> Tensor:
        return torch.randint(info.min, info.max, shape, dtype=kind).view(dtype).requires_grad_()

    q, k, v = (noise(1, 2, n, d) for _ in range(3))
    with threads(data.draw(thread_counts)):
        outs = [pk.attention(q, k, v)[0]]
        for form in ("dense", "factored"):
            out, m = pk.attention(q, k, v, bias=noise(n), return_map=form)
            outs += [out, pk.apply_attention(m, v)]
        x = v.transpose(1, 2).flatten(2).contiguous()
        for kind_of_pool in ("max", "avg", "stride"):
            outs.append(pk.token_pool(x, (n,), kind=kind_of_pool, dims=1)[0])
        sum(out.sum() for out in outs).backward()
    assert q.grad.shape == q.shape
