"""``apply_attention``: a map that is there already, times values; and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codes
from ..epilogue import corrected, correction_backward, wide
from .scores import heads_last, probabilities, score_gradients

_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEYS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _philox(key: tuple[Tensor, Tensor], counter: list[Tensor]) -> Tensor:
    """First word of Philox-4x32-10 (Salmon et al. 2011), 32-bit words in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c2 = (b >> 32) & _WORD ^ c1 ^ k0, (a >> 32) & _WORD ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _PHILOX_KEYS[0]) & _WORD, (k1 + _PHILOX_KEYS[1]) & _WORD
    return c0


def _kept(shape: tuple[int, ...], dropout: float, seed: Tensor) -> Tensor:
    """1 / (1 - dropout) where an element of a map of (B, H, M, N) is kept, else 0.

    The random number of an element comes from its place alone, so that a kernel can make it where
    it needs it, in the backward again: counter (i N + j, b H + h), key the seed.
    """
    b, h, m, n = shape
    element = torch.arange(m * n, device=seed.device).view(m, n)
    head = torch.arange(b * h, device=seed.device).view(b, h, 1, 1)
    none = torch.zeros_like(head)
    word = _philox((seed & _WORD, seed >> 32 & _WORD), [element & _WORD, head, none, none])
    word = torch.where(word >= 2**31, _WORD - word, word)
    uniform = word.to(torch.float32) * 4.6566127342e-10
    return torch.where(uniform >= dropout, 1 / (1 - dropout), 0.0)


def _dropped(
    p: Tensor, v: Tensor, head_index: list[int] | None, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """P of each receiver after dropout, and what it was multiplied with."""
    if head_index is not None:
        p = p[:, head_index]
    if seed is None:
        return p, None
    kept = _kept((*v.shape[:2], *p.shape[2:]), dropout, seed).to(p.dtype)
    return p * kept, kept


def _apply(
    p: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """(B, M, H, d) from wide probabilities."""
    out = _dropped(p, v, head_index, dropout, seed)[0] @ wide(v)
    if correction is not None:
        out = corrected(out, wide(v), correction)
    return heads_last(out, v.dtype)


def _apply_backward(
    grad_out: Tensor,
    p: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dP in the donor's shape, dV, the scalars' gradient of O = corrected(P[head_index] V).

    And, if this application is linked to its donor, that of the log-sum-exp (the rows of P scale
    with exp(-lse), so it is - dPV . PV) and of P V itself where it isn't ``grad_out``.
    """
    donor = p.shape
    p, kept = _dropped(p, v, head_index, dropout, seed)
    wide_v, g = wide(v), wide(grad_out).transpose(1, 2)
    dv_direct = v.new_zeros(())
    dcorrection, dlse, dpv = (v.new_empty(0) for _ in range(3))
    if correction is not None:
        g, dv_direct, dcorrection = correction_backward(g, p @ wide_v, wide_v, correction)
    dp = g @ wide_v.transpose(-1, -2)
    dv = (p.transpose(-1, -2) @ g + dv_direct).to(v.dtype)
    if linked:
        dlse = -(g * (p @ wide_v)).sum(-1)
        dpv = dpv if correction is None else heads_last(g, v.dtype)
    dp = dp if kept is None else dp * kept
    dp = dp.sum_to_size(donor[0], *dp.shape[1:])
    if head_index is not None:
        index = torch.tensor(head_index, device=p.device)
        dp = dp.new_zeros(donor).index_add(1, index, dp)
    return dp, dv, dcorrection, dlse, dpv


def apply_dense(
    map_storage: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    p = wide(map_storage[..., : v.shape[2]])
    return _apply(p, v, head_index, correction, dropout, seed)


def apply_dense_backward(
    grad_out: Tensor,
    map_storage: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = v.shape[2]
    p = wide(map_storage[..., :n])
    rest = (head_index, correction, dropout, seed, linked)
    dp, *others = _apply_backward(grad_out, p, v, *rest)
    if linked:
        return v.new_empty(0), *others  # type: ignore[return-value]
    dmap = F.pad(dp.to(map_storage.dtype), (0, map_storage.shape[-1] - n))
    return dmap, *others  # type: ignore[return-value]


def _dequantized(codes_: Tensor, row_scale: Tensor, v: Tensor) -> Tensor:
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    return codes.decode(codes_[..., : v.shape[2]], wide) * row_scale.unsqueeze(-1)


def apply_quantized(
    codes_: Tensor,
    row_scale: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    p = _dequantized(codes_, row_scale, v)
    return _apply(p, v, head_index, correction, dropout, seed)


def apply_quantized_backward(
    grad_out: Tensor,
    codes_: Tensor,
    row_scale: Tensor,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = _dequantized(codes_, row_scale, v)
    rest = (head_index, correction, dropout, seed, linked)
    _, *others = _apply_backward(grad_out, p, v, *rest)
    return tuple(others)  # type: ignore[return-value]


def apply_factored(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    links: list[Tensor],
) -> Tensor:
    p = probabilities(q, k, bias, scale, lse)
    return _apply(p, v, head_index, correction, dropout, seed)


def apply_factored_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    v: Tensor,
    head_index: list[int] | None,
    correction: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    linked: bool,
    need_bias: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients reach q and k through the whole softmax (lse depends on them), or by links."""
    p = probabilities(q, k, bias, scale, lse)
    rest = (head_index, correction, dropout, seed, linked)
    dp, *others = _apply_backward(grad_out, p, v, *rest)
    if linked:
        return *(q.new_empty(0) for _ in range(3)), *others  # type: ignore[return-value]
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk = score_gradients(ds, q, k, scale)
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dbias, *others  # type: ignore[return-value]
