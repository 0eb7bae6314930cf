"""Patches that are kept, and one token for the rest: what EViT and Evo-ViT have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psvit_kernels import merge_tokens, select_tokens

from ..token_map import IndexMap


def select_patches(scores: Tensor, keep: int, prefix: int) -> IndexMap:
    """The patches with the highest scores; all others become one token, weighted by their scores.

    Weights are normalised: the one token is a mean. (EViT's own code takes a sum.) It comes last,
    after the kept ones in the order of their places.

    Args:
        scores: `(B, patches)`, 0 or more. Gradients reach them through the weights.
        keep: number of patches.
        prefix: tokens before them, which are kept.

    Source: EViT, arXiv 2202.07800, section 3.3; Evo-ViT, arXiv 2108.01390, section 3.2.
    """
    match = select_tokens(scores, keep, prefix=prefix)
    tiny = torch.finfo(scores.dtype).tiny  # where attention was rounded to 0
    ones = scores.new_ones(len(scores), prefix)
    return IndexMap(match, torch.cat([ones, scores.clamp(min=tiny)], dim=1))


def slow_and_fast(f: Callable[[Tensor], Tensor], x: Tensor, selected: IndexMap) -> Tensor:
    """x + E (f(R x) - R x): the kept tokens evolve slowly, in f, and the others fast.

    R makes the M tokens of a selection, each row of it summing to 1; E gives each token the change
    of the one that it is a part of. As R E is the identity, R of the result is f(R x): layers with
    one selection may be taken one by one or together.

    Args:
        f: makes `(B, M, C)` of `(B, M, C)`.
        x: `(B, N, C)`.
        selected: of N tokens.

    Source: Evo-ViT, arXiv 2108.01390, section 3.3.
    """
    reduced = merge_tokens(x, selected.match, selected.weights).tokens
    change = f(reduced) - reduced
    into = selected.match.into.unsqueeze(2)
    return x + change.gather(1, into.expand(-1, -1, x.shape[2]))


def updated_scores(scores: Tensor, row: Tensor, selected: IndexMap, part: float) -> Tensor:
    """(1 - part) s + part row for the patches that were kept; the others' scores stay.

    Args:
        scores: s, of all patches, `(B, patches)`.
        row: what the class token pays to the patches that were kept, and at last to the token
            that all others became, `(B, M - prefix)`.
        selected: of the tokens.
        part: from 0 to 1.

    Source: Evo-ViT, arXiv 2108.01390, section 3.2.
    """
    into = selected.match.into
    prefix = into.shape[1] - scores.shape[1]
    at = into[:, prefix:] - prefix
    mixed = (1 - part) * scores + part * row.gather(1, at)
    return torch.where(at < row.shape[1] - 1, mixed, scores)
