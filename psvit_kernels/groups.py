"""Tokens in groups, each of which becomes one: what an attention map needs to follow its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import checks

if TYPE_CHECKING:  # maps need groups, and what matches tokens needs maps
    from .merging import TokenMatch


class TokenGroups(NamedTuple):
    """Which of N tokens each of M is made of, and how much of each: sparse, and by image.

    Group m has the members ``order[starts[m]:starts[m + 1]]``. A token may be in several.

    Args:
        order: tokens, group by group; int64 `[B or 1, E]`.
        starts: int64 `[B or 1, M + 1]`; what comes after the last group is in none.
        means: how much of each member is in its group's mean: in a group they sum to 1. float32
            (float64), `[B or 1, E]`.
        shares: how much of each member belongs to its group: for a token they sum to 1 over its
            groups. As ``means``; None where each token is in one group.
    """

    order: Tensor
    starts: Tensor
    means: Tensor
    shares: Tensor | None = None

    @property
    def tokens(self) -> int:
        """M."""
        return self.starts.shape[1] - 1

    @classmethod
    def of(cls, match: TokenMatch, weights: Tensor | None, sums: Tensor) -> TokenGroups:
        """Of tokens that become weighted means.

        Args:
            match: which become which.
            weights: `[B, N]`; None: all 1.
            sums: of the weights, `[B, M]`: what ``merge_tokens`` calls sizes.
        """
        part = 1 / sums.gather(1, match.into.clamp(min=0))
        part = part if weights is None else part * weights
        return cls(match.order, match.starts, part.gather(1, match.order))


def check_groups(groups: object, storage: Tensor, n: int) -> None:
    """Raises unless the groups are of n tokens, of as many images as a stored map or of one."""
    if not isinstance(groups, TokenGroups):
        raise TypeError(f"groups: got {type(groups).__name__}, expected TokenGroups")
    entries = tuple(groups.order.shape)
    images = storage.shape[0]
    if len(entries) != 2 or (entries[0] != images and 1 not in (entries[0], images)):
        raise ValueError(f"groups: got order of shape {entries}, expected ({images} or 1, members)")
    for name in ("order", "starts"):
        t = getattr(groups, name)
        if t.dtype != torch.int64 or t.dim() != 2 or t.shape[0] != entries[0]:
            raise ValueError(
                f"groups: got {name} of shape {tuple(t.shape)}, {t.dtype}, expected "
                f"({entries[0]}, ...), torch.int64"
            )
    for name, t in (("means", groups.means), ("shares", groups.shares)):
        if t is not None:
            checks.is_tensor(f"groups.{name}", t, 2, "(B or 1, members)")
            if tuple(t.shape) != entries:
                raise ValueError(
                    f"groups: got {name} of shape {tuple(t.shape)}, expected {entries} as order"
                )
    if groups.order.device != storage.device:
        raise ValueError(f"groups: are on {groups.order.device}, expected {storage.device}")
    if storage.shape[2] != n:
        raise ValueError(f"map: got {storage.shape[2]} rows of {n} columns, expected as many")
