"""``match_tokens``, ``select_tokens``, ``merge_tokens``: fewer tokens, where the image says so."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import checks
from .registry import register


class TokenMatch(NamedTuple):
    """Which of N tokens become which of M, image by image.

    Args:
        into: for each token the one it becomes a part of, -1 if it is dropped; int64 `[B, N]`.
        order: the tokens, sorted by that, and where it is the same by position; those that are
            dropped come last; int64 `[B, N]`.
        starts: token m is made of ``order[starts[m]:starts[m + 1]]``; int64 `[B, M + 1]`.
    """

    into: Tensor
    order: Tensor
    starts: Tensor

    @property
    def tokens(self) -> int:
        """M."""
        return self.starts.shape[1] - 1


class Merged(NamedTuple):
    """What ``merge_tokens`` gives.

    Args:
        tokens: `[B, M, C]`.
        sizes: sums of the weights, `[B, M]`, float32 (float64 for float64).
        normed: LayerNorm of the tokens, `[B, M, C]`; None if nobody asked.
    """

    tokens: Tensor
    sizes: Tensor
    normed: Tensor | None


def match_tokens(
    metric: Tensor, r: int, *, prefix: int = 0, penalty: Tensor | None = None
) -> TokenMatch:
    """Pairs the r tokens that are most like another one with it: bipartite soft matching.

    Tokens at even positions are compared by cosine with those at odd positions; each finds its
    best partner, and the r best of these pairs become one token each (several may have one
    partner). Prefix tokens count as positions, but are neither merged nor merged into. What is
    left is in this order: prefix tokens, the even ones that weren't merged, the odd ones. With r of
    0 all stay in their places.

    Of equal scores the lowest position wins. A token whose metric isn't finite is like no other.

    Args:
        metric: `[B, N, d]`, or `[B, H, N, d]`, of which the mean over H is taken: the keys of an
            attention, say. Unit stride on the last dimension. No gradient goes through it.
        r: pairs, of which there can be (N - prefix) // 2 at most: more is as good as that.
        prefix: leading tokens (class, distillation, registers).
        penalty: taken off the score of each even token's pair, `[B, N]`, float32 or the dtype of
            the metric: what would rather not be merged. No gradient goes through it.

    Returns:
        The match, with M = N - r.

    dtypes: float32, bfloat16, float16, float64; computed in float32 (float64 for float64).

    Raises:
        ValueError: another shape, a negative r, a prefix that isn't 0 to N, a strided last
            dimension.
        TypeError: not a floating-point tensor, r or prefix not integers.

    Source: Token Merging, arXiv 2210.09461, section 3 and appendix D.
    """
    if isinstance(metric, Tensor) and metric.dim() == 3:
        metric = metric.unsqueeze(1)
    checks.is_tensor("metric", metric, 4, "(B, N, d) or (B, H, N, d)")
    checks.unit_last_stride("metric", metric)
    for dim, meaning in ((1, "head"), (3, "channel")):
        checks.not_empty("metric", metric, dim, meaning)
    r, n = checks.integer("r", r), metric.shape[2]
    prefix = _checked_prefix(prefix, n)
    if r < 0:
        raise ValueError(f"r: got {r}, expected 0 or more")
    if penalty is not None:
        checks.is_tensor("penalty", penalty, 2, "(B, N)")
        _check_shape("penalty", penalty, (metric.shape[0], n), "metric")
        checks.parameter("penalty", penalty, metric.dtype, "metric", metric)
        penalty = penalty.detach()
    r = min(r, (n - prefix) // 2)
    return TokenMatch(*torch.ops.psvit_kernels.match_tokens(metric.detach(), r, prefix, penalty))


def select_tokens(
    scores: Tensor, keep: int, *, prefix: int = 0, rest: Literal["merge", "drop"] = "merge"
) -> TokenMatch:
    """Keeps the tokens with the highest scores; the rest becomes one token, or none.

    Prefix tokens are kept and come first, then those with the highest scores, in the order of their
    positions, then what the rest becomes: ``merge_tokens`` with weights makes it a weighted mean.
    Of equal scores the lowest position wins; one that is no number is below all others.

    Args:
        scores: of the tokens after the prefix, `[B, N - prefix]`. No gradient goes through it.
        keep: 1 to N - prefix.
        prefix: leading tokens (class, distillation, registers).
        rest: "merge": into one token, the last; "drop".

    Returns:
        The match, with M = prefix + keep, and one more if a rest is merged.

    dtypes: float32, bfloat16, float16, float64.

    Raises:
        ValueError: another shape, a ``keep`` out of range, a negative prefix, an unknown ``rest``.
        TypeError: not a floating-point tensor, ``keep`` or ``prefix`` not integers.

    Source: Evo-ViT, arXiv 2108.01390, section 3; EViT, arXiv 2202.07800, section 3.
    """
    checks.is_tensor("scores", scores, 2, "(B, N - prefix)")
    keep, prefix = checks.integer("keep", keep), checks.integer("prefix", prefix)
    patches = scores.shape[1]
    if not 1 <= keep <= patches:
        raise ValueError(f"keep: got {keep}, expected 1 to {patches}, the number of scores")
    if prefix < 0:
        raise ValueError(f"prefix: got {prefix}, expected 0 or more")
    if rest not in ("merge", "drop"):
        raise ValueError(f'rest: got {rest!r}, expected "merge" or "drop"')
    merge = rest == "merge"
    found = torch.ops.psvit_kernels.select_tokens(scores.detach(), keep, prefix, merge)
    return TokenMatch(*found)


def merge_tokens(
    x: Tensor,
    match: TokenMatch,
    weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Merged:
    """Each token becomes the weighted mean of those that a match makes it of.

    Args:
        x: tokens, `[B, N, C]`, unit stride on the last dimension.
        match: of N tokens.
        weights: above 0, `[B, N]`, dtype float32 or that of x: how many tokens each one stands for,
            or its score. None: all 1.
        residual: added to x first, in the same pass. Shape, dtype and device of x, unit stride on
            the last dimension. Added in float32.
        norm_weight, norm_bias: `[C]`; if given, LayerNorm of the result too, in the same pass.
        norm_eps: of that LayerNorm.

    Returns:
        Tokens, their sizes, and what LayerNorm makes of them.

    dtypes: float32, bfloat16, float16, float64, parameters the same or float32; sums in float32
    (float64 for float64).

    Raises:
        ValueError: sizes that don't match, a strided last dimension, a ``norm_bias`` alone.
        TypeError: not a floating-point tensor, mixed dtypes, no match.

    Source: Token Merging, arXiv 2210.09461, section 3.
    """
    checks.is_tensor("x", x, 3, "(B, N, C)")
    checks.not_empty("x", x, 2, "channel")
    checks.unit_last_stride("x", x)
    _check_match(match, x)
    if residual is not None:
        checks.is_tensor("residual", residual, 3, "(B, N, C)")
        _check_shape("residual", residual, tuple(x.shape))
        checks.same_kind("residual", residual, "x", x)
        checks.unit_last_stride("residual", residual)
    if weights is not None:
        checks.is_tensor("weights", weights, 2, "(B, N)")
        _check_shape("weights", weights, tuple(x.shape[:2]))
        checks.parameter("weights", weights, x.dtype, "x", x)
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_weight: got None with a norm_bias, expected both or neither")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None:
            checks.is_tensor(name, t, 1, f"({x.shape[2]},)")
            checks.size(name, t, 0, "channels", x.shape[2], "x")
            checks.parameter(name, t, x.dtype, "x", x)
    tokens, sizes, normed = torch.ops.psvit_kernels.merge_tokens(
        x, residual, *match, weights, norm_weight, norm_bias, norm_eps
    )
    return Merged(tokens, sizes, None if norm_weight is None else normed)


def _checked_prefix(prefix: object, tokens: int) -> int:
    count = checks.integer("prefix", prefix)
    if not 0 <= count <= tokens:
        raise ValueError(f"prefix: got {count}, expected 0 to {tokens}, the number of tokens")
    return count


def _check_match(match: object, x: Tensor) -> None:
    if not isinstance(match, TokenMatch):
        raise TypeError(f"match: got {type(match).__name__}, expected a TokenMatch")
    b, n = x.shape[:2]
    found = [tuple(t.shape) for t in match]
    if found != [(b, n), (b, n), (b, match.tokens + 1)]:
        raise ValueError(f"match: got shapes {found}, expected those of {b} images of {n} tokens")
    for t in match:
        if t.dtype != torch.int64:
            raise TypeError(f"match: got dtype {t.dtype}, expected torch.int64")
        if t.device != x.device:
            raise ValueError(f"match: is on device {t.device}, expected {x.device} as x")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], like: str = "x") -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape} as {like}")


# --- registration ---------------------------------------------------------------------------


def _fake_match(metric, r, prefix, penalty):
    b, _, n, _ = metric.shape
    return _fake_tables(metric, b, n, n - r)


def _fake_select(scores, keep, prefix, merge):
    b, patches = scores.shape
    return _fake_tables(scores, b, prefix + patches, prefix + keep + (merge and keep < patches))


def _fake_tables(like: Tensor, b: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(like.new_empty(b, size, dtype=torch.int64) for size in (n, n, m + 1))  # type: ignore[return-value]


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_merge(x, residual, into, order, starts, weights, norm_weight, norm_bias, norm_eps):
    b, _, c = x.shape
    m = starts.shape[1] - 1
    normed = x.new_empty(0) if norm_weight is None else x.new_empty(b, m, c)
    return x.new_empty(b, m, c), x.new_empty(b, m, dtype=_sums(x)), normed


def _fake_merge_backward(
    x, residual, into, order, starts, weights, norm_weight, norm_bias, norm_eps, sizes,
    grad_tokens, grad_sizes, grad_normed, need_weights,
):  # fmt: skip
    given = (x, weights if need_weights else None, norm_weight, norm_bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.norm_eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):
    *tensors, sizes = ctx.saved_tensors
    _, residual, _, _, _, _, norm_weight, norm_bias = tensors
    if all(grad is None for grad in grads):
        return (None,) * 9
    need_weights = ctx.needs_input_grad[5]
    dx, dw, dnw, dnb = torch.ops.psvit_kernels.merge_tokens_backward(
        *tensors, ctx.norm_eps, sizes, *grads, need_weights
    )
    # A sum's gradient is that of each of its terms: one tensor, written once.
    dresidual = None if residual is None else dx
    dw = dw if need_weights else None
    dnw, dnb = (None if t is None else g for t, g in ((norm_weight, dnw), (norm_bias, dnb)))
    return dx, dresidual, None, None, None, dw, dnw, dnb, None


_MERGE = (
    "Tensor x, Tensor? residual, Tensor into, Tensor order, Tensor starts, Tensor? weights,"
    " Tensor? norm_weight, Tensor? norm_bias, float norm_eps"
)

register(
    "match_tokens(Tensor metric, SymInt r, int prefix, Tensor? penalty)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_match,
)
register(
    "select_tokens(Tensor scores, SymInt keep, int prefix, bool merge) -> (Tensor, Tensor, Tensor)",
    _fake_select,
)
register(
    f"merge_tokens_backward({_MERGE}, Tensor sizes, Tensor? grad_tokens, Tensor? grad_sizes,"
    " Tensor? grad_normed, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_merge_backward,
)
register(f"merge_tokens({_MERGE}) -> (Tensor, Tensor, Tensor)", _fake_merge, _backward,
         _setup_context)  # fmt: skip
