"""Streamed ridge regression and its fit of low rank, held against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from psvit.calibrate.ridge import LeastSquares, low_rank


def rows(n: int = 60, features: int = 8, targets: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, features, dtype=torch.float64) + torch.randn(features, dtype=torch.float64)
    y = x @ torch.randn(features, targets, dtype=torch.float64) + torch.randn(
        n, targets, dtype=torch.float64
    )
    return x, y, torch.rand(n, dtype=torch.float64) + 0.1


def problem(x: Tensor, y: Tensor, w: Tensor | None = None, *, intercept: bool = True, batch=7):
    made = LeastSquares(x.shape[1], y.shape[1], intercept=intercept)
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        made.add(x[part], y[part], None if w is None else w[part])
    return made


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@pytest.mark.parametrize("intercept", [True, False])
def test_the_fit_is_that_of_stacked_least_squares(intercept: bool) -> None:
    x, y, w = rows()
    columns = with_ones(x) if intercept else x
    start = torch.randn(columns.shape[1], y.shape[1], dtype=torch.float64)
    ridge = 10 ** float(torch.empty(()).uniform_(-4, 0))
    root = w.sqrt()[:, None]
    scale = math.sqrt(ridge * float((w[:, None] * x**2).sum(0).mean()))
    damping = scale * torch.eye(x.shape[1], columns.shape[1], dtype=torch.float64)
    want = torch.linalg.lstsq(
        torch.cat([root * columns, damping]), torch.cat([root * y, damping @ start])
    ).solution
    got = problem(x, y, w, intercept=intercept).solve(start, ridge)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_batches_give_what_one_batch_gives() -> None:
    x, y, w = rows()
    start = torch.zeros(9, 5, dtype=torch.float64)
    many, one = problem(x, y, w, batch=11), problem(x, y, w, batch=len(x))
    assert many.rows == one.rows == len(x)
    torch.testing.assert_close(many.solve(start, 1e-2), one.solve(start, 1e-2))


def test_a_weight_is_a_number_of_equal_rows() -> None:
    x, y, _ = rows()
    times = torch.randint(1, 5, (len(x),))
    weighted = problem(x, y, times.double())
    repeated = problem(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    for name in ("gram", "cross", "square"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_the_error_of_any_parameters_is_that_of_the_rows() -> None:
    x, y, w = rows()
    parameters = torch.randn(9, 5, dtype=torch.float64)
    want = (w[:, None] * (with_ones(x) @ parameters - y) ** 2).sum()
    assert problem(x, y, w).error(parameters) == pytest.approx(float(want), rel=1e-9)


def test_the_sums_are_as_large_for_many_batches_as_for_few() -> None:
    sizes = set()
    for n in (20, 2000):
        made = problem(*rows(n))
        sizes.add(sum(t.nbytes for t in vars(made).values() if isinstance(t, Tensor)))
    assert len(sizes) == 1, sizes


def test_rank_counts_independent_features() -> None:
    x, y, _ = rows()
    x[:, 3] = 2 * x[:, 1] - x[:, 0] + 4  # the constant doesn't make it another feature
    x[:, 5] = 1.0
    assert problem(x, y).rank() == 6


def test_features_that_are_zero_keep_their_weights() -> None:
    x, y, _ = rows()
    start = torch.randn(9, 5, dtype=torch.float64)
    got = problem(torch.zeros_like(x), y).solve(start, 1e-2)
    torch.testing.assert_close(got[:8], start[:8])
    torch.testing.assert_close(got[8], y.mean(0))


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan")])
def test_a_ridge_that_is_not_above_zero_is_an_error(ridge: float) -> None:
    with pytest.raises(ValueError, match=rf"^ridge: got {ridge}, expected a number above 0$"):
        problem(*rows()).solve(torch.zeros(9, 5, dtype=torch.float64), ridge)


# --- low rank ---------------------------------------------------------------------------------

GROUPS, SIZE, RANK = 3, 6, 2


def low_rank_case() -> tuple[LeastSquares, Tensor, Tensor]:
    """A problem, parameters to start from, and their factors' product per group."""
    x, y, w = rows(200, GROUPS * SIZE, 7)
    start = torch.cat(
        [
            torch.randn(SIZE, RANK, dtype=torch.float64) @ torch.randn(RANK, 7, dtype=torch.float64)
            for _ in range(GROUPS)
        ]
        + [torch.zeros(1, 7, dtype=torch.float64)]
    )
    return problem(x, y, w), start, w


def cost(made: LeastSquares, parameters: Tensor, start: Tensor, ridge: float) -> Tensor:
    residual = (parameters * (made.gram @ parameters - 2 * made.cross)).sum() + made.square
    return residual + made.penalty(ridge) * (parameters - start)[:-1].square().sum()


def by_gradient(made: LeastSquares, start: Tensor, begin: Tensor, ridge: float) -> float:
    """The cost at which LBFGS on all factors at once ends."""
    u, s, vh = torch.linalg.svd(begin[:-1].view(GROUPS, SIZE, 7), full_matrices=False)
    left = (u[..., :RANK] * s[:, None, :RANK].sqrt()).contiguous().requires_grad_()
    right = (s[:, :RANK, None].sqrt() * vh[:, :RANK]).contiguous().requires_grad_()
    bias = begin[-1:].clone().requires_grad_()
    options = dict(max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)
    optimizer = torch.optim.LBFGS([left, right, bias], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cost(made, torch.cat([(left @ right).flatten(0, 1), bias]), start, ridge)
        value.backward()
        return value

    optimizer.step(closure)
    return float(closure().detach())


def test_low_rank_ends_where_no_gradient_leads_further_down() -> None:
    made, start, _ = low_rank_case()
    got = low_rank(made, start, groups=GROUPS, rank=RANK, ridge=1e-2, rounds=2000, tolerance=1e-14)
    ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-9)) for part in got[:-1].chunk(GROUPS)]
    assert max(ranks) <= RANK, ranks
    found = float(cost(made, got, start, 1e-2))
    assert by_gradient(made, start, got, 1e-2) == pytest.approx(found, rel=1e-6)


def test_low_rank_is_mostly_no_worse_than_gradient_descent() -> None:
    ratios = []
    for _ in range(3):
        made, start, _ = low_rank_case()
        got = low_rank(made, start, groups=GROUPS, rank=RANK, ridge=1e-2, rounds=500)
        rival = by_gradient(made, start, start, 1e-2)
        ratios.append(float(cost(made, got, start, 1e-2)) / rival)
    assert sorted(ratios)[1] < 1.05, ratios


def test_low_rank_of_full_rank_is_ridge() -> None:
    x, y, w = rows(200, 12, 5)
    made, start = problem(x, y, w), torch.randn(13, 5, dtype=torch.float64)
    got = low_rank(made, start, groups=2, rank=5, ridge=1e-2, rounds=5000, tolerance=1e-15)
    torch.testing.assert_close(got, made.solve(start, 1e-2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_low_rank_never_raises_the_cost(rounds: int) -> None:
    made, start, _ = low_rank_case()
    got = low_rank(made, start, groups=GROUPS, rank=RANK, ridge=1e-1, rounds=rounds)
    before, after = (float(cost(made, p, start, 1e-1)) for p in (start, got))
    assert after <= before, (before, after)


def test_low_rank_finds_a_model_that_is_there() -> None:
    x, _, _ = rows(300, GROUPS * SIZE, 7)
    truth = low_rank_case()[1]
    truth[-1] = torch.randn(7, dtype=torch.float64)
    made = problem(x, with_ones(x) @ truth)
    start = truth + 0.05 * torch.randn_like(truth)
    start[:-1] = torch.cat(
        [u[:, :RANK] * s[:RANK] @ vh[:RANK] for u, s, vh in map(_svd, start[:-1].chunk(GROUPS))]
    )
    got = low_rank(made, start, groups=GROUPS, rank=RANK, ridge=1e-9, rounds=5000, tolerance=1e-12)
    torch.testing.assert_close(got, truth, rtol=1e-3, atol=1e-3)


def _svd(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(part, full_matrices=False)
