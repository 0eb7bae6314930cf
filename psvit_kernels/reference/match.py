"""``match_tokens``, ``select_tokens``: which tokens become which."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import wide


def match_tokens(
    metric: Tensor, r: int, prefix: int, penalty: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of even and odd positions after the prefix; the r best even ones join a partner."""
    unit = F.normalize(wide(metric).mean(1), dim=-1)
    b, n, _ = unit.shape
    position = torch.arange(n, device=unit.device)
    even, odd = (position[prefix + (prefix + side) % 2 :: 2] for side in (0, 1))
    into = position.repeat(b, 1)
    if not r:
        return _tables(into, n)
    scores = (unit[:, even] @ unit[:, odd].transpose(1, 2)).nan_to_num(nan=-torch.inf)
    best = scores.amax(2)
    partner = _first(scores == best.unsqueeze(2))
    if penalty is not None:
        best = best - penalty[:, even].to(best.dtype)
        best = best.masked_fill(best.isnan(), -torch.inf)
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
