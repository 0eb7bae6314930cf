"""The operations as PyTorch sees them: schemas, shapes, derivatives, tracing, autocast, export."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention_cases import eager_attention
from inputs import BF16, F16, F32, F64, normal, probabilities
from pool_cases import pool_case
from surroundings import threads
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import psvit_kernels as pk
from psvit_kernels import registry

OPS = torch.ops.psvit_kernels


def leaf(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return normal(*shape, dtype=dtype).requires_grad_()


# --- opcheck --------------------------------------------------------------------------------


def attention_args(bias: bool, form: bool | torch.dtype, links: int = 0) -> tuple:
    q, k, v = normal(2, 3, 5, 16), normal(2, 3, 7, 16), normal(2, 3, 7, 24)
    bias = normal(3, 1, 7).expand(2, 3, 5, 7) if bias else None
    tensors = [t.requires_grad_() for t in (q, k, v)]
    return (*tensors, bias, 0.25, form, links)


def links() -> list[Tensor]:
    """As the donor gives them: the log-sum-exp, and stand-ins for an output and for values."""
    return [leaf(2, 3, 7), leaf(1).expand(2, 7, 3, 16), leaf(1).expand(2, 3, 7, 16)]


def apply_args(index: bool, correction: bool, linked: bool = False) -> tuple:
    storage = torch.nn.functional.pad(probabilities(1, 3, 7, 7), (0, 1)).requires_grad_()
    if linked:
        storage = storage.detach().repeat(2, 1, 1, 1).requires_grad_()
    head_index = [2, 0, 0, 1] if index else None
    heads = 4 if index else 3
    v = normal(2, 7, heads, 16).transpose(1, 2).requires_grad_()
    rest = (head_index, leaf(heads, 3) if correction else None, 0.0, None)
    return storage, v, *rest, links() if linked else []


def quantized_args(code: str, linked: bool = False) -> tuple:
    m = pk.QuantizedMap.from_dense(probabilities(2, 3, 7, 7), code)
    rest = (None, leaf(3, 3), 0.0, None, links() if linked else [])
    return m.codes, m.row_scale, leaf(2, 3, 7, 16), *rest


def factored_args(bias: bool, correction: bool, linked: bool = False) -> tuple:
    q, k, v = (leaf(2, 3, 7, 16) for _ in range(3))
    lse = torch.logsumexp(q @ k.transpose(-1, -2) / 4, -1).detach()
    bias = normal(7).expand(2, 3, 7, 7) if bias else None
    rest = (None, leaf(3, 3) if correction else None, 0.0, None, links() if linked else [])
    return q, k, lse, bias, 0.25, v, *rest


def pool_args(kind: str, norm: bool) -> tuple:
    weight = leaf(6, 1, 3, 3) if kind == "conv" else None
    norms = (leaf(6), leaf(6)) if norm else (None, None)
    window = ([1, 1], [2, 2], [0, 0]) if kind == "stride" else ([3, 3], [2, 2], [1, 1])
    groups = 6 if kind == "conv" else 1
    x, residual = leaf(2, 21, 6), leaf(2, 21, 6) if norm else None
    return x, residual, [4, 5], 1, kind, *window, weight, None, groups, *norms, 1e-6


def skip_unless_served(provider: str, op, args: tuple) -> None:
    name = op.name().removeprefix("psvit_kernels::")
    reason = registry.PROVIDERS[provider].supports(name, args)
    if reason is not None:
        pytest.skip(f'provider "{provider}": {reason}')


FORWARD = {
    "attention": (OPS.attention.default, lambda: attention_args(False, False)),
    "attention with a dense map": (OPS.attention.default, lambda: attention_args(False, True)),
    "attention with a bias": (OPS.attention.default, lambda: attention_args(True, True)),
    "attention with a uint8 map": (
        OPS.attention_quantized.default,
        lambda: attention_args(True, torch.uint8),
    ),
    "apply_dense": (OPS.apply_dense.default, lambda: apply_args(False, False)),
    "apply_dense with everything": (OPS.apply_dense.default, lambda: apply_args(True, True)),
    "apply_dense with links": (OPS.apply_dense.default, lambda: apply_args(False, True, True)),
    "apply_quantized": (OPS.apply_quantized.default, lambda: quantized_args("uint8")),
    "apply_quantized with links": (
        OPS.apply_quantized.default,
        lambda: quantized_args("uint8", True),
    ),
    "apply_factored": (OPS.apply_factored.default, lambda: factored_args(False, False)),
    "apply_factored with everything": (
        OPS.apply_factored.default,
        lambda: factored_args(True, True),
    ),
    "apply_factored with links": (
        OPS.apply_factored.default,
        lambda: factored_args(True, False, True),
    ),
    "max": (OPS.token_pool.default, lambda: pool_args("max", False)),
    "avg with norm": (OPS.token_pool.default, lambda: pool_args("avg", True)),
    "stride": (OPS.token_pool.default, lambda: pool_args("stride", False)),
    "conv with norm": (OPS.token_pool.default, lambda: pool_args("conv", True)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_opcheck(provider, name):
    op, args = FORWARD[name]
    args = args()
    skip_unless_served(provider, op, args)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("dense", [False, True])
def test_opcheck_of_links(provider, dense):
    """All but the comparison of what is computed: a link is memory that nobody writes or reads."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = attention_args(True, dense, 2)
    torch.library.opcheck(OPS.attention.default, args, test_utils=utils)


def without_grad(args: tuple) -> tuple:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in args)


def attention_backward_args(dense: bool, everything: bool) -> tuple:
    q, k, v, bias, scale, *_ = without_grad(attention_args(everything, dense))
    out, storage, lse, _ = OPS.attention(q, k, v, bias, scale, dense, 0)
    grad_map = normal(*storage.shape) if everything else None
    grad_lse = normal(*lse.shape) if everything else None
    group = [[normal(2, 5, 3, 24)], [normal(2, 3, 7, 24)]] if everything else [[], []]
    grads = (normal(2, 5, 3, 24), grad_map, grad_lse, *group)
    return *grads, q, k, v, bias, scale, storage, lse, out, everything


def application_backward_args(args: tuple, linked: bool, *more: bool) -> tuple:
    """Of any form: the gradient, all but the links, and the output."""
    *args, _ = without_grad(args)
    heads = next(a.shape[1] for a in reversed(args) if isinstance(a, Tensor) and a.dim() == 4)
    grad, out = normal(2, 7, heads, 16), normal(2, 7, heads, 16)
    return grad, *args, linked, *more, out


BACKWARD = {
    "attention": (
        OPS.attention_backward.default,
        lambda: attention_backward_args(False, False),
    ),
    "attention with everything": (
        OPS.attention_backward.default,
        lambda: attention_backward_args(True, True),
    ),
    "apply_dense": (
        OPS.apply_dense_backward.default,
        lambda: application_backward_args(apply_args(True, True), False),
    ),
    "apply_dense with links": (
        OPS.apply_dense_backward.default,
        lambda: application_backward_args(apply_args(False, True, True), True),
    ),
    "apply_quantized with links": (
        OPS.apply_quantized_backward.default,
        lambda: application_backward_args(quantized_args("uint8"), True),
    ),
    "apply_factored": (
        OPS.apply_factored_backward.default,
        lambda: application_backward_args(factored_args(True, True), False, True),
    ),
    "apply_factored with links": (
        OPS.apply_factored_backward.default,
        lambda: application_backward_args(factored_args(True, False), True, False),
    ),
    "token_pool": (
        OPS.token_pool_backward.default,
        lambda: (normal(2, 7, 6), *without_grad(pool_args("conv", True))),
    ),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck_of_backward(provider, name):
    op, args = BACKWARD[name]
    args = args()
    skip_unless_served(provider, op, args)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# --- gradcheck ------------------------------------------------------------------------------


@pytest.fixture
def doubles():
    """gradcheck needs float64, which the reference serves."""
    with pk.use("reference"), threads(1):
        yield lambda *shape: leaf(*shape, dtype=F64)


@pytest.mark.parametrize("form", [None, "dense", "factored"])
def test_gradcheck_of_attention(doubles, form):
    q, k, v, bias = doubles(2, 2, 2, 3), doubles(2, 2, 3, 3), doubles(2, 2, 3, 2), doubles(2, 1, 3)

    def run(q, k, v, bias):
        out, m = pk.attention(q, k, v, bias=bias, return_map=form)
        return out if m is None else (out, m.dense())

    assert gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_gradcheck_of_a_group(doubles, form):
    q, k, v, bias = doubles(2, 2, 3, 2), doubles(2, 2, 3, 2), doubles(2, 2, 3, 2), doubles(3)
    values, correction = doubles(2, 3, 3, 2), doubles(3, 3)

    def run(q, k, v, bias, values, correction):
        out, m = pk.attention(q, k, v, bias=bias, return_map=form)
        other = pk.apply_attention(m, values, head_index=[1, 0, 1], correction=correction)
        return out, other, pk.apply_attention(m, v)

    assert gradcheck(run, (q, k, v, bias, values, correction))


@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck_of_apply_with_respect_to_the_map(doubles, batch):
    def run(p, v, correction):
        m = pk.DenseMap.from_dense(p)
        return pk.apply_attention(m, v, head_index=[1, 1, 0], correction=correction)

    assert gradcheck(run, (doubles(batch, 2, 3, 3), doubles(2, 3, 3, 2), doubles(3, 3)))


@pytest.mark.parametrize("kind", ["max", "avg", "stride", "conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_of_token_pool(doubles, kind, norm):
    case = pool_case(
        1, (3, 4), 4, dtype=F64, prefix=1, kind=kind, groups=2, bias=True, norm=norm, residual=norm
    )
    names = list(case.tensors)
    tensors = [t.detach().requires_grad_() for t in case.tensors.values()]

    def run(x, *tensors):
        named = dict(zip(names, tensors, strict=True))
        return pk.token_pool(x, case.grid, **case.options, **named)[0]

    assert gradcheck(run, (case.x.detach().requires_grad_(), *tensors))


SECOND = {
    "attention": lambda x: pk.attention(x, x, x)[0],
    "apply_dense": lambda x: pk.apply_attention(pk.DenseMap(torch.ones(1, 2, 4, 4), 4), x),
    "apply_factored": lambda x: pk.apply_attention(
        pk.FactoredMap(x.detach(), x.detach(), torch.ones(2, 2, 4), 0.5), x
    ),
    "token_pool": lambda x: pk.token_pool(x.flatten(1, 2), (2, 4), kind="avg")[0],
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_raise(provider, name):
    """They would be silently wrong otherwise."""
    x = leaf(2, 2, 4, 4)
    (g,) = torch.autograd.grad(SECOND[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{name}: second derivatives are not"):
        g.sum().backward()


# --- a small model, traced ------------------------------------------------------------------


class Group(nn.Module):
    """One layer that attends, one that shares, a pool: everything that a PSViT stage needs."""

    def __init__(self, form: str = "dense", dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.qkv, self.v = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.correction = nn.Parameter(torch.tensor([[1.0, 0.1, 0.1]]).repeat(heads, 1))
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.Conv2d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out, m = pk.attention(q, k, v, return_map=self.form)
        x = x + out.transpose(1, 2).reshape(b, n, c)
        v = self.v(x).view(b, n, self.heads, -1).transpose(1, 2)
        out = pk.apply_attention(m, v, head_index=[2, 0, 1], correction=self.correction)
        x = x + out.transpose(1, 2).reshape(b, n, c)
        x, _ = pk.token_pool(
            x, (4, 4), prefix=1, kind="conv", weight=self.pool.weight, bias=self.pool.bias,
            groups=c, norm_weight=self.norm.weight, norm_bias=self.norm.bias,
        )  # fmt: skip
        return pk.token_pool(x, (2, 2), prefix=1)[0]


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_compiled_model_without_graph_breaks_equals_the_eager_one(provider, form):
    torch.compiler.reset()
    model, x = Group(form), normal(2, 17, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(grads(compiled, x), grads(model, x), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_model_takes_other_batch_sizes(provider):
    torch.compiler.reset()
    model = Group()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x = normal(batch, 17, 24)
        torch.testing.assert_close(compiled(x), model(x))


def test_maps_go_in_and_out_of_compiled_functions(provider):
    torch.compiler.reset()
    q, k, v, values = (normal(2, 3, 9, 16) for _ in range(4))
    attend = torch.compile(pk.attention, fullgraph=True, backend="aot_eager")
    apply = torch.compile(pk.apply_attention, fullgraph=True, backend="aot_eager")
    for form, kind in (("dense", pk.DenseMap), ("factored", pk.FactoredMap)):
        _, m = attend(q, k, v, return_map=form)
        assert type(m) is kind
        _, same = pk.attention(q, k, v, return_map=form)
        torch.testing.assert_close(apply(m, values), pk.apply_attention(same, values))


def test_model_compiled_by_inductor_equals_the_eager_one(cpu_provider):
    torch.compiler.reset()
    model, x = Group(), normal(2, 17, 24)
    compiled = torch.compile(model, fullgraph=True)
    try:
        got = grads(compiled, x)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    for one, want in zip(got, grads(model, x), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_exported_model_equals_the_eager_one(provider, form):
    model = Group(form).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (normal(4, 17, 24),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"psvit_kernels.attention.default", "psvit_kernels.token_pool.default"} <= targets
    for size in (1, 3):
        x = normal(size, 17, 24)
        torch.testing.assert_close(program.module()(x), model(x))


# --- autocast, checkpointing, threads of autograd -------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_runs_attention_in_half_precision_as_sdpa_does(dtype):
    q, k, v, values = (leaf(2, 3, 9, 16) for _ in range(4))
    with torch.autocast("cpu", dtype=dtype):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        for form in ("dense", "factored"):
            out, m = pk.attention(q, k, v, bias=normal(9), return_map=form)
            other = pk.apply_attention(m, values, correction=torch.ones(3, 3))
            assert out.dtype == m.dtype == other.dtype == want.dtype == dtype
            found = torch.autograd.grad((out.sum(), other.sum()), (q, k, v, values))
            assert all(g.dtype == F32 for g in found)
    with torch.autocast("cpu", dtype=dtype):
        assert pk.attention(q.double(), k.double(), v.double())[0].dtype == F64


def test_model_under_autocast_is_near_the_float32_one(provider):
    model, x = Group(), normal(2, 17, 24)
    dtype = F16 if provider == "triton" else BF16  # what the interpreter can do, too
    with torch.autocast(x.device.type, dtype=dtype):
        half = model(x)
        half.float().sum().backward()
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == F32 for p in model.parameters())


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_map_travels_through_gradient_checkpointing(provider, form):
    q, k, v, values = (leaf(2, 3, 9, 16) for _ in range(4))

    def run(wrap):
        out, m = wrap(lambda *t: pk.attention(*t, return_map=form), q, k, v)
        other = wrap(lambda x: pk.apply_attention(m, x), values)
        return torch.autograd.grad(out.sum() + other.square().sum(), (q, k, v, values))

    got = run(lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    for one, want in zip(got, run(lambda f, *args: f(*args)), strict=True):
        torch.testing.assert_close(one, want)


def test_backward_may_run_twice_and_release_its_memory(provider):
    q, k, v = (leaf(1, 2, 9, 16) for _ in range(3))
    out, _ = pk.attention(q, k, v, return_map="dense")
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), (q, k, v))


def test_writing_into_a_saved_map_is_an_error_at_backward(provider):
    q = leaf(1, 2, 9, 16)
    out, m = pk.attention(q, q, q, return_map="dense")
    with torch.no_grad():
        m.storage.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_warns(provider):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Group()(normal(1, 17, 24)).sum().backward()


# --- GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_reference_on_a_gpu_equals_the_one_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensors = [normal(2, 3, 50, 16) for _ in range(4)]

    def run(device):
        q, k, v, values = (t.to(device).requires_grad_() for t in tensors)
        out, m = pk.attention(q, k, v, return_map="dense")
        other = pk.apply_attention(m, values, head_index=[2, 1, 0])
        pooled, _ = pk.token_pool(other.transpose(1, 2).flatten(2)[:, 1:], (7, 7))
        found = torch.autograd.grad(out.sum() + pooled.square().sum(), (q, k, v, values))
        return [t.cpu() for t in (out, other, pooled, *found)]

    with pk.use("reference"):
        on_gpu, on_cpu = run("cuda"), run("cpu")
    for got, want in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_eager_attention_of_the_tests_is_attention():
    """The baseline that the bar is measured by is itself PyTorch's function."""
    q, k, v = (normal(2, 3, 9, 16) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(eager_attention(q, k, v)[0], want)
