"""Patches that are kept, and one token for the rest: what EViT and Evo-ViT have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from psvit_kernels import TokenMatch, merge_tokens, select_tokens


class Selection(NamedTuple):
    """Which of N tokens are kept, and what the others count in the one token that they become.

    Args:
        match: of N tokens to M: prefix tokens, those kept in the order of their places, and the
            one that all others become, if there are any.
        weights: `(B, N)`, above 0.
        kept: number of patches.
    """

    match: TokenMatch
    weights: Tensor
    kept: int


def select_patches(scores: Tensor, keep: int, prefix: int) -> Selection:
    """The patches with the highest scores; all others become one token, weighted by their scores.

    Args:
        scores: `(B, patches)`, 0 or more. Gradients reach them through the weights.
        keep: number of patches.
        prefix: tokens before them, which are kept.
    """
    match = select_tokens(scores, keep, prefix=prefix)
    tiny = torch.finfo(scores.dtype).tiny  # where attention was rounded to 0
    ones = scores.new_ones(len(scores), prefix)
    return Selection(match, torch.cat([ones, scores.clamp(min=tiny)], dim=1), keep)


def slow_and_fast(f: Callable[[Tensor], Tensor], x: Tensor, selection: Selection) -> Tensor:
    """x + E (f(R x) - R x): the kept tokens evolve slowly, in f, and the others fast.

    R makes the M tokens of a selection, each row of it summing to 1; E gives each token the change
    of the one that it is a part of. As R E is the identity, R of the result is f(R x): layers with
    one selection may be taken one by one or together.

    Args:
        f: makes `(B, M, C)` of `(B, M, C)`.
        x: `(B, N, C)`.
        selection: of N tokens.

    Source: Evo-ViT, arXiv 2108.01390, section 3.3.
    """
    reduced = merge_tokens(x, selection.match, selection.weights).tokens
    change = f(reduced) - reduced
    into = selection.match.into.unsqueeze(2)
    return x + change.gather(1, into.expand(-1, -1, x.shape[2]))


def updated_scores(scores: Tensor, row: Tensor, selection: Selection, part: float) -> Tensor:
    """(1 - part) s + part row for the patches that were kept; the others' scores stay.

    Args:
        scores: s, of all patches, `(B, patches)`.
        row: what the class token pays to the patches there were in the map, those kept and the
            one that stands for the others, `(B, M - prefix)`.
        selection: of the tokens.
        part: from 0 to 1.

    Source: Evo-ViT, arXiv 2108.01390, section 3.2.
    """
    prefix = selection.weights.shape[1] - scores.shape[1]
    at = selection.match.into[:, prefix:] - prefix
    mixed = (1 - part) * scores + part * row.gather(1, at)
    return torch.where(at < selection.kept, mixed, scores)
