"""The executable specification: plain PyTorch, any floating dtype up to float64, any device.

Half-precision inputs are computed in float32 and rounded once at the end. Gradients are written
out as formulas, so that this file can be read as the definition of every operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .epilogue import corrected, correction_backward, norm_backward
from .epilogue import wide as _wide
from .maps import padded_codes, row_pitch


def missing() -> str | None:
    """Why this provider can't be used on this machine: PyTorch is always there."""
    return None


def supports(op: str, args: tuple) -> str | None:
    return None


def _merge(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, M, d) to contiguous (B, M, H, d): what every attention op returns."""
    return heads.transpose(1, 2).to(dtype).contiguous()


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (_wide(q) @ _wide(k).transpose(-1, -2)) * scale
    return scores if bias is None else scores + _wide(bias)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, lse: Tensor) -> Tensor:
    return torch.exp(_scores(q, k, bias, scale) - lse.unsqueeze(-1))


# --- attention ------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dense_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """O = P V with P = softmax(scale Q K^T + bias); P itself if asked for; log-sum-exp of rows."""
    scores = _scores(q, k, bias, scale)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.softmax(scores, dim=-1)
    out = _merge(p @ _wide(v), q.dtype)
    if not dense_map:
        return out, q.new_empty(0), lse
    n = k.shape[2]
    return out, F.pad(p.to(q.dtype), (0, row_pitch(n, q.element_size()) - n)), lse


def attention_quantized(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, code: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``attention``, whose output stays exact, and P in 8 bits with a scale per row."""
    scores = _scores(q, k, bias, scale)
    out, _, lse = attention(q, k, v, bias, scale, False)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    coded, row_scale = padded_codes(codes.encode(e, code))
    return out, coded, torch.where(lse.isfinite(), row_scale, torch.nan), lse


def attention_backward(
    grad_out: Tensor,
    grad_map: Tensor | None,
    grad_lse: Tensor | None,
    group_grads: list[Tensor],
    group_values: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    map_storage: Tensor,
    lse: Tensor,
    out: Tensor,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS = P (dP - rowsum(P dP) + sum_l dO_l V_l^T + dlse); then dQ, dK, dV, dbias.

    dP = dO V^T + the map's own gradient. What the layers that share the map sent back, (dO_l, V_l)
    and their part of the gradient of the log-sum-exp, comes in the lists and in ``grad_lse``.
    ``grad_out`` is (B, M, H, d), as the op returned it; ``grad_map`` is in the map's storage.
    """
    n = k.shape[2]
    p = _probabilities(q, k, bias, scale, lse)
    if map_storage.numel():
        p = _wide(map_storage[..., :n])
    g = _wide(grad_out).transpose(1, 2)
    dp = g @ _wide(v).transpose(-1, -2)
    if grad_map is not None:
        dp = dp + _wide(grad_map[..., :n])
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    for group_grad, values in zip(group_grads, group_values, strict=True):
        ds = ds + p * (_wide(group_grad).transpose(1, 2) @ _wide(values).transpose(-1, -2))
    if grad_lse is not None:
        ds = ds + p * grad_lse.unsqueeze(-1)
    dq, dk = _score_gradients(ds, q, k, scale)
    dv = p.transpose(-1, -2) @ g
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias


def _score_gradients(ds: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return ds @ _wide(k) * scale, ds.transpose(-1, -2) @ _wide(q) * scale


# --- apply_attention ------------------------------------------------------------------------

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
    out = _dropped(p, v, head_index, dropout, seed)[0] @ _wide(v)
    if correction is not None:
        out = corrected(out, _wide(v), correction)
    return _merge(out, v.dtype)


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
    wide_v, g = _wide(v), _wide(grad_out).transpose(1, 2)
    dv_direct = v.new_zeros(())
    dcorrection, dlse, dpv = (v.new_empty(0) for _ in range(3))
    if correction is not None:
        g, dv_direct, dcorrection = correction_backward(g, p @ wide_v, wide_v, correction)
    dp = g @ wide_v.transpose(-1, -2)
    dv = (p.transpose(-1, -2) @ g + dv_direct).to(v.dtype)
    if linked:
        dlse = -(g * (p @ wide_v)).sum(-1)
        dpv = dpv if correction is None else _merge(g, v.dtype)
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
    p = _wide(map_storage[..., : v.shape[2]])
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
    p = _wide(map_storage[..., :n])
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
    p = _probabilities(q, k, bias, scale, lse)
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
    p = _probabilities(q, k, bias, scale, lse)
    rest = (head_index, correction, dropout, seed, linked)
    dp, *others = _apply_backward(grad_out, p, v, *rest)
    if linked:
        return *(q.new_empty(0) for _ in range(3)), *others  # type: ignore[return-value]
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk = _score_gradients(ds, q, k, scale)
    dbias = ds.to(q.dtype) if need_bias else q.new_empty(0)
    return dq.to(q.dtype), dk.to(q.dtype), dbias, *others  # type: ignore[return-value]


# --- token_pool -----------------------------------------------------------------------------


def _image(tokens: Tensor, grid: list[int]) -> Tensor:
    """(B, h w, C) to (B, C, h, w): a channels-last view, nothing is copied."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def _pool_image(
    image: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    if kind == "max":
        return F.max_pool2d(image, kernel, stride, padding)
    if kind == "avg":
        return F.avg_pool2d(image, kernel, stride, padding, count_include_pad=False)
    if kind == "stride":
        return image[:, :, :: stride[0], :: stride[1]]
    assert weight is not None
    wide_bias = None if bias is None else bias.to(image.dtype)
    with torch.autocast(image.device.type, enabled=False):  # it would narrow what is wide here
        return F.conv2d(image, weight.to(image.dtype), wide_bias, stride, padding, 1, groups)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return _wide(x) if residual is None else _wide(x) + _wide(residual)


def _pool_tokens(wide: Tensor, grid: list[int], prefix: int, *pool) -> Tensor:
    """Prefix tokens unchanged, the others pooled: what the normalisation, if any, gets."""
    pooled = _tokens(_pool_image(_image(wide[:, prefix:], grid), *pool))
    return torch.cat([wide[:, :prefix], pooled], dim=1) if prefix else pooled


def token_pool(
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    pool = (kind, kernel, stride, padding, weight, bias, groups)
    out = _pool_tokens(_sum(x, residual), grid, prefix, *pool)
    if norm_weight is not None:
        wide_bias = None if norm_bias is None else norm_bias.to(out.dtype)
        out = F.layer_norm(out, out.shape[-1:], norm_weight.to(out.dtype), wide_bias, norm_eps)
    return out.to(x.dtype).contiguous()


def _pool_image_backward(
    g: Tensor,
    image: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    aten = torch.ops.aten
    if kind == "max":
        _, index = aten.max_pool2d_with_indices(image, kernel, stride, padding)
        window = (kernel, stride, padding, [1, 1], False)
        return aten.max_pool2d_with_indices_backward(g, image, *window, index), None, None
    if kind == "avg":
        counted = (False, False, None)  # no ceil_mode, padding left out, no divisor of its own
        dx = aten.avg_pool2d_backward(g, image, kernel, stride, padding, *counted)
        return dx, None, None
    if kind == "stride":
        dx = torch.zeros_like(image)
        dx[:, :, :: stride[0], :: stride[1]] = g
        return dx, None, None
    assert weight is not None
    conv = (stride, padding, [1, 1], False, [0, 0], groups, [True, True, bias is not None])
    return aten.convolution_backward(
        g, image, weight.to(image.dtype), None if bias is None else list(bias.shape), *conv
    )


def token_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    grid: list[int],
    prefix: int,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (the residual's is the same), weight, bias, norm_weight, norm_bias.

    An empty tensor for what is absent.
    """
    pool = (kind, kernel, stride, padding, weight, bias, groups)
    wide, g = _sum(x, residual), _wide(grad_out)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        pooled = _pool_tokens(wide, grid, prefix, *pool)
        g, dnorm_weight, dnorm_bias = norm_backward(g, pooled, norm_weight, norm_bias, norm_eps)
    new_grid = _pool_image(_image(wide[:, prefix:], grid), *pool).shape[2:]
    dimage, dweight, dbias = _pool_image_backward(
        _image(g[:, prefix:], list(new_grid)), _image(wide[:, prefix:], grid), *pool
    )
    dx = _tokens(dimage)
    if prefix:
        dx = torch.cat([g[:, :prefix], dx], dim=1)
    found = (dx, dweight, dbias, dnorm_weight, dnorm_bias)
    inputs = (x, weight, bias, norm_weight, norm_bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if t is None or d is None else d.to(t.dtype).contiguous()
        for d, t in zip(found, inputs, strict=True)
    )


# --- match_tokens, select_tokens ------------------------------------------------------------


def match_tokens(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of even and odd positions after the prefix; the r best even ones join a partner."""
    unit = F.normalize(_wide(metric).mean(1), dim=-1)
    b, n, _ = unit.shape
    position = torch.arange(n, device=unit.device)
    even, odd = (position[(position >= prefix) & (position % 2 == side)] for side in (0, 1))
    into = position.repeat(b, 1)
    if not r:
        return _tables(into, n)
    scores = (unit[:, even] @ unit[:, odd].transpose(1, 2)).nan_to_num(nan=-torch.inf)
    best = scores.amax(2)
    partner = _first(scores == best.unsqueeze(2))
    merged = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    stays = torch.ones_like(best, dtype=torch.bool).scatter(1, merged, False)
    left = len(even) - r
    places = prefix + torch.where(stays, stays.cumsum(1) - 1, left + partner)
    into[:, even] = places
    into[:, odd] = prefix + left + torch.arange(len(odd), device=unit.device)
    return _tables(into, n - r)


def select_tokens(
    scores: Tensor, keep: int, prefix: int, merge: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens with the highest scores stay; the others are one token, or dropped."""
    b, patches = scores.shape
    ranked = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ranked[:, :keep], True)
    rest = prefix + keep if merge else -1
    places = torch.where(stays, prefix + stays.cumsum(1) - 1, rest)
    first = torch.arange(prefix, device=scores.device).expand(b, prefix)
    return _tables(torch.cat([first, places], 1), prefix + keep + (merge and keep < patches))


def _first(wanted: Tensor) -> Tensor:
    """The lowest place of the last dimension where it is true."""
    n = wanted.shape[-1]
    return torch.where(wanted, torch.arange(n, device=wanted.device), n).amin(-1)


def _tables(into: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """A match from what each token becomes a part of, -1 for those that are dropped."""
    place = torch.where(into < 0, m, into)
    order = place.argsort(dim=1, stable=True)
    ends = torch.arange(m + 1, device=into.device).expand(len(into), m + 1)
    starts = torch.searchsorted(place.gather(1, order), ends.contiguous())
    return into.contiguous(), order, starts


# --- merge_tokens ---------------------------------------------------------------------------


def _sums(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Of the rows (B, N, C) of each merged token their sum, (B, M, C)."""
    b, n, c = rows.shape
    sorted_rows = rows.gather(1, order.unsqueeze(2).expand(b, n, c))
    lengths = starts.diff(append=starts.new_full((b, 1), n)).flatten()  # the last are dropped
    sums = torch.segment_reduce(sorted_rows.flatten(0, 1), "sum", lengths=lengths, axis=0)
    return sums.unflatten(0, (b, -1))[:, :-1]


def _weights(weights: Tensor | None, x: Tensor) -> Tensor:
    return _wide(x).new_ones(x.shape[:2]) if weights is None else weights.to(_wide(x).dtype)


def _merged(
    x: Tensor, residual: Tensor | None, order: Tensor, starts: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted means, and the sums of the weights."""
    w = _weights(weights, x).unsqueeze(2)
    sizes = _sums(w, order, starts)
    return _sums(w * _sum(x, residual), order, starts) / sizes, sizes.squeeze(2).contiguous()


def merge_tokens(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_m = sum w_n x_n / sum w_n over the tokens n that become m; the sums of w; LayerNorm(y)."""
    tokens, sizes = _merged(x, residual, order, starts, weights)
    normed = x.new_empty(0)
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(tokens.dtype)
        shape = tokens.shape[-1:]
        normed = F.layer_norm(tokens, shape, norm_weight.to(tokens.dtype), bias, norm_eps)
    return tokens.to(x.dtype), sizes, normed.to(x.dtype)


def merge_tokens_backward(
    x: Tensor,
    residual: Tensor | None,
    into: Tensor,
    order: Tensor,
    starts: Tensor,
    weights: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    sizes: Tensor,
    grad_tokens: Tensor | None,
    grad_sizes: Tensor | None,
    grad_normed: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx_n = w_n / s_m dy_m and dw_n = (x_n - y_m) dy_m / s_m + ds_m, where n becomes m.

    Gradients of x (the residual's is the same), weights, norm_weight, norm_bias; an empty tensor
    for what is absent or not asked for.
    """
    tokens, _ = _merged(x, residual, order, starts, weights)
    g = torch.zeros_like(tokens) if grad_tokens is None else _wide(grad_tokens)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        dnormed = torch.zeros_like(tokens) if grad_normed is None else _wide(grad_normed)
        through, dnorm_weight, dnorm_bias = norm_backward(
            dnormed, tokens, norm_weight, norm_bias, norm_eps
        )
        g = g + through
    kept, at = into >= 0, into.clamp(min=0)

    def of_input(t: Tensor) -> Tensor:
        """What belongs to the merged token that each token becomes a part of."""
        return t.gather(1, at.unsqueeze(2).expand(*at.shape, t.shape[2]))

    size, g = of_input(sizes.unsqueeze(2)), of_input(g)
    share = torch.where(kept, _weights(weights, x), 0).unsqueeze(2) / size
    dx = torch.where(kept.unsqueeze(2), share * g, 0)
    dweights = None
    if need_weights:
        dweights = ((_sum(x, residual) - of_input(tokens)) * g / size).sum(2)
        if grad_sizes is not None:
            dweights = dweights + of_input(_wide(grad_sizes).unsqueeze(2)).squeeze(2)
        dweights = torch.where(kept, dweights, 0)
    found = (dx, dweights, dnorm_weight, dnorm_bias)
    inputs = (x, weights, norm_weight, norm_bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if t is None or d is None else d.to(t.dtype).contiguous()
        for d, t in zip(found, inputs, strict=True)
    )
