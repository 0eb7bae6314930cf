"""Weighted ridge regression on a stream of batches: all it keeps is sums of products, in float64.

For rows f (features, and a 1 for the intercept) with targets t and weights w, the sums
G = sum w f^T f, R = sum w f^T t and sum w |t|^2 decide everything: the fit that pulls towards given
parameters W0 is W0 + (G + penalty)^-1 (R - G W0), and the error of any parameters follows from them
without another look at the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Eigenvalues of the features' correlation below this part of the largest count as zero.
RANK_TOLERANCE = 1e-10


class LeastSquares:
    """The sums of one least-squares problem. Its size doesn't depend on the number of rows.

    Parameters of a fit are one matrix, `(features + intercept, targets)`, float64: the weights as
    they multiply features from the right, and the intercept as the last row.

    Args:
        features, targets: columns of each.
        intercept: whether a constant is fitted too; it is never penalised.
        device: where the sums are kept; needs float64.
    """

    def __init__(
        self,
        features: int,
        targets: int,
        *,
        intercept: bool = True,
        device: torch.device | None = None,
    ) -> None:
        size = features + intercept
        self.features, self.intercept = features, intercept
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(size, targets, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Rows `(n, features)` with their targets `(n, targets)` and weights `(n,)`, None for 1.

        A row of weight w counts as w equal rows.
        """
        x, y = features.double(), targets.double()
        if self.intercept:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        scaled = x if weights is None else x * weights.double()[:, None]
        self.gram.addmm_(scaled.T, x)
        self.cross.addmm_(scaled.T, y)
        squares = y.square().sum(1)
        self.square += (squares if weights is None else squares * weights.double()).sum()
        self.rows += len(x)

    def join(self, other: LeastSquares) -> None:
        """Adds the rows of another problem of the same size."""
        self.gram += other.gram
        self.cross += other.cross
        self.square += other.square
        self.rows += other.rows

    def error(self, parameters: Tensor) -> float:
        """Weighted sum of squared residuals of any parameters."""
        residual = (self.gram @ parameters - 2 * self.cross).mul_(parameters).sum() + self.square
        return max(0.0, float(residual))

    def solve(self, start: Tensor, ridge: float) -> Tensor:
        """The parameters W that minimise error(W) + penalty |W - start|^2.

        Args:
            start: parameters that the fit is pulled towards.
            ridge: the penalty, as a part of the mean of the features' squared norms; above 0.
        """
        damped = self.gram.clone()
        damped.diagonal()[: self.features] += self.penalty(ridge)
        return start + torch.linalg.solve(damped, self.cross - self.gram @ start)

    def penalty(self, ridge: float) -> Tensor:
        """What ``ridge`` is in the units of the sums."""
        if not ridge > 0:
            raise ValueError(f"ridge: got {ridge!r}, expected a number above 0")
        # Features that are zero throughout have no scale; any penalty then leaves them alone.
        return ridge * self.gram.diagonal()[: self.features].mean().clamp_min(1e-100)

    def rank(self) -> int:
        """Number of independent features, the intercept not counted: at most ``features``."""
        gram, _ = self.centred()
        scale = gram.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, 1 / scale, 0.0)
        values = torch.linalg.eigvalsh(scale[:, None] * gram * scale)
        return int((values > RANK_TOLERANCE * values[-1]).sum()) if values[-1] > 0 else 0

    def centred(self) -> tuple[Tensor, Tensor]:
        """G and R of features and targets less their means: the problem with the best intercept."""
        n = self.features
        if not self.intercept or not self.rows:
            return self.gram[:n, :n], self.cross[:n]
        sums, total = self.gram[:n, n:], self.gram[n, n]
        return (
            self.gram[:n, :n] - sums @ sums.T / total,
            self.cross[:n] - sums @ self.cross[n:] / total,
        )


def low_rank(
    problem: LeastSquares,
    start: Tensor,
    *,
    groups: int,
    rank: int,
    ridge: float,
    rounds: int = 20,
    tolerance: float = 1e-4,
) -> Tensor:
    """A fit whose weights, in each group of features, have a given rank at most.

    Backfitting: the groups take turns, each being fitted to what the others leave. Of one group
    the best weights of a rank are known: those of full rank, cut off by singular values in the
    metric of its Gram matrix. So no turn makes the error plus the penalty larger; what is found
    in the end is a local optimum, as the problem isn't convex.

    Args:
        problem: with features in ``groups`` equal parts.
        start: parameters to begin from and to be pulled towards, each part of rank ``rank``.
        groups, rank: number of parts, and the rank of each part's weights.
        ridge: as in ``LeastSquares.solve``.
        rounds: most turns of all groups.
        tolerance: it stops after a round that lowers the error plus the penalty by less than
            this part.

    Source: reduced-rank regression (Izenman 1975); backfitting (Breiman and Friedman 1985).
    """
    gram, cross = problem.centred()
    penalty, n = problem.penalty(ridge), problem.features
    size = n // groups
    parts = [slice(i * size, (i + 1) * size) for i in range(groups)]
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factors = [torch.linalg.cholesky(gram[part, part] + penalty * identity) for part in parts]
    prior, weights = start[:n], start[:n].clone()
    product, last = gram @ weights, torch.inf
    for _ in range(rounds):
        for part, factor in zip(parts, factors, strict=True):
            own = gram[part, part] @ weights[part]
            left = cross[part] - product[part] + own + penalty * prior[part]
            best = _best_of_rank(factor, left, rank)
            product += gram[:, part] @ (best - weights[part])
            weights[part] = best
        # Up to a constant: what the residuals lose, and the penalty.
        gain = (weights * (2 * cross - product)).sum()
        cost = float(problem.square - gain + penalty * (weights - prior).square().sum())
        if last - cost < tolerance * abs(cost):
            break
        last = cost
    return _with_intercept(problem, weights)


def _best_of_rank(factor: Tensor, right: Tensor, rank: int) -> Tensor:
    """argmin of tr(W^T A W) - 2 tr(W^T right) over W of a rank, A = factor factor^T."""
    whitened = torch.linalg.solve_triangular(factor, right, upper=False)
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.linalg.solve_triangular(factor.T, cut, upper=True)


def _with_intercept(problem: LeastSquares, weights: Tensor) -> Tensor:
    if not problem.intercept:
        return weights
    n = problem.features
    sums, total = problem.gram[n:, :n], problem.gram[n, n]
    return torch.cat([weights, (problem.cross[n:] - sums @ weights) / total])
