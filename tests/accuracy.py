"""The bar that every result of an operation is held against.

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

import torch
from inputs import F16, F32, F64
from torch import Tensor

FLOOR = 2.0

Results = dict[str, Tensor]


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
