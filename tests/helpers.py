"""The oracle, the bar, and the inputs that the tests of the operations share.

The bar
-------
``assert_accurate`` holds each element of a result against the reference in float64:

    |got - exact| <= 2 * eager * magnitude + floor
    eager = largest |eager - exact| / magnitude in the tensor
    floor = eps(dtype) / 2 * |exact| + FLOOR * eps(float32) * magnitude

``magnitude`` is the formula of the result with absolute values in place of signed ones:
sum_j |P_ij| |V_jd| for an output, and so on. Rounding errors are proportional to it, however much
of the result itself cancels, so it is the unit in which elements of one tensor can be compared.
Eager PyTorch, in the same dtype, may be exactly right at one element by luck; its largest error in
that unit is what it can be trusted for. The floor is rounding: of storing the result, and of
summing in another order. For float64, eps(float64) stands in both of its terms.

On top, the root mean square of the errors, in the same unit, may not exceed twice eager's, with a
floor of half the one above: a kernel that is everywhere just inside the bar is not as good as
eager. ``slack`` widens both, for inputs that were searched out to be degenerate (all values equal,
one element): there every error has the same sign, and eager is exact by luck more often.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import building
import emulated
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import psvit_kernels as pk
from psvit_kernels import cuda, reference, registry
from psvit_kernels.triton import interpreting

FLOOR = 2.0

#: What the rates of a machine are where a test must not measure them: see ``probed``.
MEASURED = {"copy": 4e12, "exp": 3e12, "float32": 5e13, "bfloat16": 7e14, "float16": 7e14}

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


# --- providers ------------------------------------------------------------------------------


class Backend(NamedTuple):
    provider: str
    dtype: torch.dtype
    device: str = "cpu"
    family: str | None = None  # of the CUDA kernels

    def __str__(self) -> str:
        parts = [self.provider, str(self.dtype).removeprefix("torch.")]
        parts += [] if self.family is None else [self.family]
        return "-".join(parts if self.device == "cpu" else [*parts, self.device])


#: Triton's kernels run on a GPU, or in its interpreter on CPU tensors (not in bfloat16).
TRITON_DEVICE = "cpu" if interpreting() else "cuda"

#: The CUDA kernels run on a GPU, or on CPU tensors as ``emulated.py`` compiles them.
CUDA_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA_FAMILIES = ("sm_80", "sm_90a")

#: Float64 through the reference is the oracle itself: it is held against PyTorch's own functions.
BACKENDS = [Backend("cpu", F32), Backend("cpu", BF16), Backend("reference", F32)]
BACKENDS += [Backend("reference", BF16), Backend("reference", F16)]
BACKENDS += [Backend("triton", dtype, TRITON_DEVICE) for dtype in (F32, F16, BF16)]
BACKENDS += [
    Backend("cuda", t, CUDA_DEVICE, family) for family in CUDA_FAMILIES for t in (BF16, F16)
]


def device_of(provider: str) -> str:
    return {"triton": TRITON_DEVICE, "cuda": CUDA_DEVICE}.get(provider, "cpu")


def unavailable(provider: str, dtype: torch.dtype = F32) -> str | None:
    """Why a provider serves no call of this dtype here, or None."""
    missing = registry.PROVIDERS[provider].missing()
    if missing is not None:
        return missing
    x = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device_of(provider))
    return registry.PROVIDERS[provider].supports("attention", (x, x, x, None, 1.0, True))


def skip_unless_available(provider: str, dtype: torch.dtype = F32) -> None:
    reason = unavailable(provider, dtype)
    if reason is not None:
        pytest.skip(f'provider "{provider}": {reason}')


@contextmanager
def serving(provider: str, dtype: torch.dtype = F32, family: str | None = None) -> Iterator[None]:
    """Forces a provider, so that nothing falls back; new tensors are made where it serves.

    One CPU thread: sizes are small, and on a busy machine threads wait for each other. What more
    threads change (not a bit) has its own tests.
    """
    place = nullcontext() if device_of(provider) == "cpu" else torch.device(device_of(provider))
    with cuda_kernels(family) if provider == "cuda" else nullcontext():
        if provider != "cuda":  # what that refuses is skipped call by call
            skip_unless_available(provider, dtype)
        with registry.use(provider), threads(1), place:
            yield


class _ForwardOnly:
    """The CUDA provider in tests of values and gradients: the reference has the latter."""

    missing = staticmethod(cuda.missing)

    @staticmethod
    def supports(op: str, args: tuple) -> str | None:
        return None if op.endswith("_backward") else cuda.supports(op, args)

    def __getattr__(self, op: str) -> Callable:
        return getattr(reference if op.endswith("_backward") else cuda, op)


@contextmanager
def cuda_kernels(family: str | None, gradients: bool = True) -> Iterator[None]:
    """One family of the CUDA kernels; without a GPU, emulated."""
    with ExitStack() as stack:
        if CUDA_DEVICE == "cpu":
            stack.enter_context(patch.object(cuda, "_cuda", emulated_kernels()))
        if family is not None:
            stack.enter_context(patch.dict(os.environ, PSVIT_CUDA_KERNELS=family))
        if gradients:
            stack.enter_context(patch.dict(registry.PROVIDERS, cuda=_ForwardOnly()))
        for known in (cuda.family, cuda._capability):
            known.cache_clear()
            stack.callback(known.cache_clear)
        skip_unless_kernels()
        yield


def skip_unless_kernels() -> None:
    if (reason := cuda.missing()) is not None:
        pytest.skip(f'provider "cuda": {reason}')
    try:
        cuda.family(torch.device(CUDA_DEVICE))
    except ValueError as error:  # this GPU doesn't run them
        pytest.skip(str(error))


def emulated_kernels() -> ModuleType:
    if (reason := building.unavailable()) is not None:
        pytest.skip(f"the CUDA kernels can't be compiled for a CPU: {reason}")
    module = emulated.module()
    if isinstance(module, str):
        pytest.fail(module, pytrace=False)
    return module


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def silent(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Progress that nobody sees."""
    yield lambda part=1: None


# --- the bar --------------------------------------------------------------------------------


def accumulation_eps(dtype: torch.dtype) -> float:
    return torch.finfo(F64 if dtype == F64 else F32).eps


def smallest_number(dtype: torch.dtype) -> float:
    """Below this, zero is as good: a product of probabilities that underflow in float32."""
    return 6e-8 if dtype == F16 else 1e-300 if dtype == F64 else 1e-30


def assert_accurate(
    got: Tensor,
    exact: Tensor,
    eager: Tensor,
    magnitude: Tensor,
    what: str = "result",
    slack: float = 1.0,
) -> None:
    """Raises unless ``got`` is about as close to ``exact`` (float64) as ``eager`` is."""
    __tracebackhide__ = True
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == eager.dtype, f"{what}: dtype {got.dtype}, not {eager.dtype}"
    assert exact.dtype == F64 and magnitude.shape == exact.shape, f"{what}: the test is wrong"
    got, exact, magnitude = got.detach().double(), exact.detach(), magnitude.detach()
    eager64 = eager.detach().double()
    _assert_same_non_finite(got, exact, what)
    if not exact.numel():
        return
    finite = exact.isfinite() & eager64.isfinite() & magnitude.isfinite()
    smallest = smallest_number(eager.dtype)
    unit = magnitude + smallest
    error, eager_error = ((t - exact).abs() / unit for t in (got, eager64))
    stored = torch.finfo(eager.dtype).eps / 2 * exact.abs() + smallest
    floor = stored / unit + FLOOR * accumulation_eps(eager.dtype)
    error, eager_error, floor = (torch.where(finite, t, 0.0) for t in (error, eager_error, floor))
    bound = slack * (2 * eager_error.max() + floor)
    excess = error - bound
    if bool((excess > 0).any()):
        at = _index(excess.argmax(), excess)
        raise AssertionError(
            f"{what} {tuple(exact.shape)} {eager.dtype}: {int((excess > 0).sum())} of "
            f"{exact.numel()} elements miss the bar; the worst, at {at}, is {got[at]:.9g}, "
            f"should be {exact[at]:.9g}: error {error[at] * unit[at]:.3g}, allowed "
            f"{bound[at] * unit[at]:.3g} (eager's here {eager_error[at] * unit[at]:.3g}, floor "
            f"{floor[at] * unit[at]:.3g}); in units of the magnitude, largest error "
            f"{error.max():.3g}, eager's {eager_error.max():.3g}"
        )
    rms, allowed = _rms(error), slack * (2 * _rms(eager_error) + _rms(floor) / 2)
    assert rms <= allowed, (
        f"{what} {tuple(exact.shape)} {eager.dtype}: root mean square error {rms:.3g}, allowed "
        f"{allowed:.3g}, eager's {_rms(eager_error):.3g}, in units of the magnitude"
    )


def _assert_same_non_finite(got: Tensor, exact: Tensor, what: str) -> None:
    wrong = (got.isnan() != exact.isnan()) | ((got != exact) & (got.isinf() | exact.isinf()))
    wrong &= ~(got.isnan() & exact.isnan())
    if bool(wrong.any()):
        at = _index(wrong.byte().argmax(), wrong)
        raise AssertionError(
            f"{what} {tuple(exact.shape)}: {int(wrong.sum())} elements wrong in NaN or infinity; "
            f"the first, at {at}, is {got[at]:.9g}, should be {exact[at]:.9g}"
        )


def _index(flat: Tensor, like: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, like.shape))


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


Results = dict[str, Tensor]


def assert_all_accurate(
    got: Results, exact: Results, eager: Results, magnitude: Results, slack: float = 1.0
) -> None:
    __tracebackhide__ = True
    assert got.keys() == exact.keys() == eager.keys()
    for name in got:
        assert_accurate(got[name], exact[name], eager[name], magnitude[name], name, slack)


def assert_same_bits(first: Results, second: Results) -> None:
    for name, one in first.items():
        assert torch.equal(bits(one), bits(second[name])), f"{name}: two runs differ"


def bits(t: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself and -0 differs from 0."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(size)


# --- inputs ---------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F32).to(dtype)


def probabilities(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return normal(*shape).softmax(-1).to(dtype)


def fused_qkv(
    b: int, n: int, heads: int, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one (B, N, 3 H d) projection, as in timm."""
    q, k, v = normal(b, n, 3, heads, d, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def guarded(values: Tensor, offset: int = 0, gaps: Sequence[int] = ()) -> Tensor:
    """The same values in memory that is NaN everywhere else: before, between rows and after.

    Dimensions keep their order in memory; ``gaps[i]`` elements are left after each block of
    dimension i. What reads past a row becomes NaN.
    """
    gaps = list(gaps) or [0] * values.dim()
    strides, step = [0] * values.dim(), 1
    for dim in reversed(range(values.dim())):
        strides[dim] = step
        step = step * values.shape[dim] + gaps[dim]
    memory = torch.full((offset + max(step, 1) + 64,), math.nan, dtype=values.dtype)
    view = memory.as_strided(values.shape, strides, offset)
    return view.copy_(values)


def described(case: tuple) -> str:
    """The fields of a case, tensors by what matters about them."""
    fields = zip(case._fields, case, strict=True)  # type: ignore[attr-defined]
    return ", ".join(f"{name}={_described(value)}" for name, value in fields)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        place = f"strides {tuple(value.stride())} from {value.storage_offset()}"
        return f"<{kind} {tuple(value.shape)} {place}>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_described, value)) + "]"
    return repr(value)


def leaf(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A leaf with the same values (and strides, if the dtype stays), so that grads can be asked."""
    if t is None:
        return None
    return t.detach().to(t.dtype if dtype is None else dtype).requires_grad_()


def wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


# --- attention ------------------------------------------------------------------------------


class AttentionCase(NamedTuple):
    """Inputs of one call, and the gradients that come back: of out, and of the map if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    grad_map: Tensor | None = None
    form: str | None = None

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> AttentionCase:
        return self._replace(
            **{name: wide(getattr(self, name)) for name in ("q", "k", "v", "grad_out")},
            bias=wide(self.bias),
            grad_map=wide(self.grad_map),
        )

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale


def eager_attention(q, k, v, *, scale=None, bias=None, return_map=None, reuses=0):
    """What a person writes without this package."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    p = scores.softmax(-1)
    return p @ v, p


def attention_results(case: AttentionCase, attention: Callable = pk.attention) -> Results:
    """out, the map where it is dense, and every gradient."""
    q, k, v, bias = map(leaf, (case.q, case.k, case.v, case.bias))
    out, p = attention(q, k, v, scale=case.scale, bias=bias, return_map=case.form)
    results = {"out": out}
    outputs, grads = [out], [case.grad_out]
    if case.form == "dense":
        results["map"] = p if isinstance(p, Tensor) else p.dense()
        if case.grad_map is not None:
            outputs.append(results["map"])
            grads.append(case.grad_map)
    inputs = {"dq": q, "dk": k, "dv": v} | ({} if bias is None else {"dbias": bias})
    found = torch.autograd.grad(outputs, list(inputs.values()), grads)
    return results | dict(zip(inputs, found, strict=True))


def attention_magnitudes(case: AttentionCase) -> Results:
    """The formulas of every result with absolute values in place of signed ones, in float64."""
    dtype, case = case.q.dtype, case.double()
    p = eager_attention(*case[:3], scale=case.scale, bias=case.bias)[1].nan_to_num(0.0)
    q, k, v, g = (t.abs() for t in (case.q, case.k, case.v, case.grad_out))
    scale = abs(case.factor)
    p = with_scores(p, q, k, scale, case.bias)
    found = {"out": p @ v, "map": p}
    dp = g @ v.transpose(-1, -2)
    if case.grad_map is not None:
        dp = dp + case.grad_map.abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    found["dv"] = p.transpose(-1, -2) @ g
    found["dq"], found["dk"] = ds @ k * scale, ds.transpose(-1, -2) @ q * scale
    if case.bias is not None:
        found["dbias"] = bias_magnitude(ds, case.bias, dtype)
    return found


def bias_magnitude(ds: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias that is one number for a whole row changes nothing: its gradient is zero, and what is
    found is the roundings, to the dtype of the bias, of what was summed."""
    size = ds.sum_to_size(bias.shape)
    one_for_the_row = bias.dim() == 0 or bias.shape[-1] == 1
    return size * (torch.finfo(dtype).eps / accumulation_eps(dtype) if one_for_the_row else 1)


def with_scores(p: Tensor, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Magnitude of P = exp(score - lse): a score is off by its own rounding, and P with it."""
    score = scale * q.abs() @ k.abs().transpose(-1, -2)
    if bias is not None:
        score = score + torch.where(bias.isfinite(), bias.abs(), 0.0)
    return p * (1 + score)


def check_attention(case: AttentionCase, slack: float = 1.0) -> Results:
    """Runs a case through the provider in use, and holds it against the bar."""
    __tracebackhide__ = True
    got = attention_results(case)
    with registry.use("reference"):
        exact = attention_results(case.double())
    eager = attention_results(case, eager_attention)
    assert_all_accurate(got, exact, eager, attention_magnitudes(case), slack)
    return got


# --- apply_attention ------------------------------------------------------------------------


class ApplyCase(NamedTuple):
    """Inputs of ``apply_attention`` on a dense map, and the gradient of its output."""

    p: Tensor
    v: Tensor
    grad_out: Tensor
    head_index: Sequence[int] | None = None
    correction: Tensor | None = None

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> ApplyCase:
        p, v, grad_out = (t.detach().double() for t in self[:3])
        return ApplyCase(p, v, grad_out, self.head_index, wide(self.correction))


def eager_apply(p, v, *, head_index=None, correction=None):
    """What a person writes without this package: O = alpha P V + beta V + gamma mean(V)."""
    if head_index is not None:
        p = p[:, list(head_index)]
    out = p @ v
    if correction is None:
        return out
    alpha, beta, gamma = correction.to(v.dtype)[:, :, None, None].unbind(1)
    return alpha * out + beta * v + gamma * v.mean(2, keepdim=True)


def apply_dense(p, v, *, head_index=None, correction=None):
    return pk.apply_attention(
        pk.DenseMap.from_dense(p), v, head_index=head_index, correction=correction
    )


def apply_results(case: ApplyCase, apply: Callable = apply_dense) -> Results:
    p, v, correction = map(leaf, (case.p, case.v, case.correction))
    out = apply(p, v, head_index=case.head_index, correction=correction)
    inputs = {"dmap": p, "dv": v} | ({} if correction is None else {"dcorrection": correction})
    found = torch.autograd.grad(out, list(inputs.values()), case.grad_out)
    return {"out": out} | dict(zip(inputs, found, strict=True))


def apply_magnitudes(case: ApplyCase) -> Results:
    absolute = ApplyCase(
        *(t.detach().double().abs() for t in case[:3]),
        case.head_index,
        None if case.correction is None else case.correction.detach().double().abs(),
    )
    return apply_results(absolute, eager_apply)


def check_apply(case: ApplyCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = apply_results(case)
    with registry.use("reference"):
        exact = apply_results(case.double())
    eager = apply_results(case, eager_apply)
    assert_all_accurate(got, exact, eager, apply_magnitudes(case), slack)
    return got


# --- groups: one layer attends, others share -------------------------------------------------


class GroupCase(NamedTuple):
    """``tensors``: q, k, v of the layer that attends, v0, v1, .. of those that share its map, and
    bias where there is one. ``grads``: of each layer's output, and of the map if ``grad_map``."""

    tensors: Results
    grads: list[Tensor]
    form: str
    grad_map: Tensor | None = None
    head_index: Sequence[int] | None = None
    reuses: int = 2

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> GroupCase:
        tensors = {name: t.detach().double() for name, t in self.tensors.items()}
        grads = [g.double() for g in self.grads]
        return self._replace(tensors=tensors, grads=grads, grad_map=wide(self.grad_map))


def group_case(
    b: int,
    h: int,
    n: int,
    d: int,
    dtype: torch.dtype,
    form: str,
    *,
    sharing: int = 2,
    bias: Tensor | None = None,
    differentiate_map: bool = False,
) -> GroupCase:
    q, k, v = fused_qkv(b, n, h, d, dtype)
    tensors = {"q": q, "k": k, "v": v}
    tensors |= {f"v{i}": normal(b, h, n, d, dtype=dtype) for i in range(sharing)}
    if bias is not None:
        tensors["bias"] = bias.to(dtype)
    grads = [normal(b, h, n, d, dtype=dtype) for _ in range(1 + sharing)]
    grad_map = normal(b, h, n, n, dtype=dtype) if differentiate_map else None
    return GroupCase(tensors, grads, form, grad_map)


def eager_group(case: GroupCase) -> Results:
    return group_results(case, eager_attention, eager_apply)


def group_results(
    case: GroupCase, attention: Callable = pk.attention, apply: Callable = pk.apply_attention
) -> Results:
    """Outputs of one ``A`` and its ``S`` layers, and the gradients of every tensor."""
    t = {name: leaf(value) for name, value in case.tensors.items()}
    options = {"bias": t.get("bias"), "return_map": case.form, "reuses": case.reuses}
    out, p = attention(t["q"], t["k"], t["v"], **options)
    sharing = [name for name in t if name.startswith("v") and name != "v"]
    outs = [out] + [apply(p, t[name], head_index=case.head_index) for name in sharing]
    results = {f"out{i}": o for i, o in enumerate(outs)}
    grads = list(case.grads)
    if case.grad_map is not None:
        outs.append(p if isinstance(p, Tensor) else p.dense())
        grads.append(case.grad_map)
    found = torch.autograd.grad(outs, list(t.values()), grads)
    return results | {f"d{name}": g for name, g in zip(t, found, strict=True)}


def group_magnitudes(case: GroupCase) -> Results:
    dtype, case = case.grads[0].dtype, case.double()
    t, bias = case.tensors, case.tensors.get("bias")
    q, k = t["q"].abs(), t["k"].abs()
    scale = 1 / math.sqrt(q.shape[-1])
    p = eager_attention(t["q"], t["k"], t["v"], bias=bias)[1]
    p = with_scores(p, q, k, scale, bias)
    dp = torch.zeros_like(p) if case.grad_map is None else case.grad_map.abs()
    found = {}
    for i, (name, g) in enumerate(zip([n for n in t if n[0] == "v"], case.grads, strict=True)):
        index = range(p.shape[1]) if name == "v" else case.head_index or range(p.shape[1])
        index = torch.tensor(list(index), device=p.device)
        g, v = g.abs(), t[name].abs()
        found[f"out{i}"] = p[:, index] @ v
        found[f"d{name}"] = p[:, index].transpose(-1, -2) @ g
        dp = dp.index_add(1, index, g @ v.transpose(-1, -2))
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    found["dq"], found["dk"] = ds @ k * scale, ds.transpose(-1, -2) @ q * scale
    if bias is not None:
        found["dbias"] = bias_magnitude(ds, bias, dtype)
    return found


def check_group(case: GroupCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = group_results(case)
    with registry.use("reference"):
        exact = group_results(case.double())
    assert_all_accurate(got, exact, eager_group(case), group_magnitudes(case), slack)
    return got


# --- token_pool -----------------------------------------------------------------------------


class PoolCase(NamedTuple):
    x: Tensor
    grid: tuple[int, ...]
    grad_out: Tensor
    options: dict
    tensors: dict[str, Tensor]  # residual, weight, bias, norm_weight, norm_bias where given

    def __repr__(self) -> str:
        return described(self)

    def double(self) -> PoolCase:
        tensors = {name: t.detach().double() for name, t in self.tensors.items()}
        return self._replace(
            x=self.x.detach().double(), grad_out=self.grad_out.double(), tensors=tensors
        )


def pool_case(
    b: int,
    grid: Sequence[int],
    channels: int,
    *,
    dtype: torch.dtype = F32,
    parameters: torch.dtype | None = None,
    prefix: int = 0,
    kind: str = "max",
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    width: int | None = None,
    groups: int = 1,
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
) -> PoolCase:
    """A case with random tensors; ``parameters`` is the dtype of weights, x's if None."""
    grid = tuple(grid)
    parameters = dtype if parameters is None else parameters
    options = dict(prefix=prefix, kind=kind, kernel=kernel, stride=stride, padding=padding)
    options |= dict(groups=groups, dims=len(grid))
    tensors = {}
    if residual:
        tensors["residual"] = normal(b, prefix + math.prod(grid), channels, dtype=dtype)
    if kind == "conv":
        width = channels if width is None else width
        shape = (width, channels // groups, *[kernel] * len(grid))
        tensors["weight"] = normal(*shape, dtype=parameters)
        if bias:
            tensors["bias"] = normal(width, dtype=parameters)
    width = channels if width is None else width
    if norm:
        tensors["norm_weight"] = 1 + normal(width, dtype=parameters) / 4
        tensors["norm_bias"] = normal(width, dtype=parameters)
    x = normal(b, prefix + math.prod(grid), channels, dtype=dtype)
    k, p = (1, 0) if kind == "stride" else (kernel, padding)
    tokens = prefix + math.prod((n + 2 * p - k) // stride + 1 for n in grid)
    return PoolCase(x, grid, normal(b, tokens, width, dtype=dtype), options, tensors)


def eager_pool(
    x, grid, *, prefix, kind, kernel, stride, padding, groups, dims, residual=None, weight=None,
    bias=None, norm_weight=None, norm_bias=None, norm_eps=1e-6,
):  # fmt: skip
    """What a person writes without this package: to images, pool, back, cat, LayerNorm."""
    if residual is not None:
        x = x + residual
    if dims == 1:
        grid, kernel, stride, padding = (1, *grid), (1, kernel), (1, stride), (0, padding)
        weight = None if weight is None else weight.unsqueeze(2)
    image = x[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if kind == "max":
        image = F.max_pool2d(image, kernel, stride, padding)
    elif kind == "avg":
        image = F.avg_pool2d(image, kernel, stride, padding, count_include_pad=False)
    elif kind == "stride":
        step = (stride, stride) if isinstance(stride, int) else stride
        image = image[:, :, :: step[0], :: step[1]]
    else:
        bias = None if bias is None else bias.to(x.dtype)
        image = F.conv2d(image, weight.to(x.dtype), bias, stride, padding, 1, groups)
    out = image.flatten(2).transpose(1, 2)
    if prefix:
        out = torch.cat([x[:, :prefix], out], dim=1)
    if norm_weight is None:
        return out, tuple(image.shape[4 - dims :])
    bias = None if norm_bias is None else norm_bias.to(x.dtype)
    out = F.layer_norm(out, out.shape[-1:], norm_weight.to(x.dtype), bias, norm_eps)
    return out, tuple(image.shape[4 - dims :])


def pool_results(case: PoolCase, pool: Callable = pk.token_pool) -> Results:
    x = leaf(case.x)
    tensors = {name: leaf(t) for name, t in case.tensors.items()}
    out, grid = pool(x, case.grid, **case.options, **tensors)
    assert out.shape[1] == case.options["prefix"] + math.prod(grid)
    inputs = {"dx": x} | {f"d{name}": t for name, t in tensors.items()}
    found = torch.autograd.grad(out, list(inputs.values()), case.grad_out)
    return {"out": out} | dict(zip(inputs, found, strict=True))


def pool_magnitudes(case: PoolCase) -> Results:
    """As the results, with absolute values; LayerNorm's backward is written out for that."""
    case = case.double()
    norm = [case.tensors.get(name) for name in ("norm_weight", "norm_bias")]
    bare = {name: t.abs() for name, t in case.tensors.items() if not name.startswith("norm")}
    pool = PoolCase(case.x.abs(), case.grid, case.grad_out.abs(), case.options, bare)
    if norm[0] is None:
        return _pool_magnitudes(pool, case)
    signed = {name: t for name, t in case.tensors.items() if not name.startswith("norm")}
    pooled, _ = eager_pool(case.x, case.grid, **case.options, **signed)
    size, _ = eager_pool(pool.x, case.grid, **case.options, **bare)
    size = torch.maximum(size, pooled.abs())
    rstd = ((pooled - pooled.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normal_size = (size + size.mean(-1, keepdim=True)) * rstd
    weight, bias = norm[0].abs(), 0 if norm[1] is None else norm[1].abs()
    g = pool.grad_out
    wg = g * weight
    dpooled = wg + wg.mean(-1, keepdim=True)
    dpooled = rstd * (dpooled + normal_size * (normal_size * wg).mean(-1, keepdim=True))
    found = _pool_magnitudes(pool._replace(grad_out=dpooled), case)
    found["out"] = normal_size * weight + bias
    found["dnorm_weight"] = (g * normal_size).sum((0, 1))
    found["dnorm_bias"] = g.sum((0, 1))
    return found


def _pool_magnitudes(absolute: PoolCase, signed: PoolCase) -> Results:
    """The window's own; which token wins a maximum depends on the signed values."""
    if absolute.options["kind"] != "max":
        return pool_results(absolute, eager_pool)
    tensors = {name: t for name, t in signed.tensors.items() if name == "residual"}
    found = pool_results(signed._replace(grad_out=absolute.grad_out, tensors=tensors), eager_pool)
    return {name: t.abs() for name, t in found.items()}


def check_pool(case: PoolCase, slack: float = 1.0) -> Results:
    __tracebackhide__ = True
    got = pool_results(case)
    with registry.use("reference"):
        exact = pool_results(case.double())
    eager = pool_results(case, eager_pool)
    assert_all_accurate(got, exact, eager, pool_magnitudes(case), slack)
    return got
