"""``QueryPool``: the token map whose weights are learned, SiT's slimming and its way back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psvit_kernels import apply_attention, attention

from ..attention import split_heads
from ..layout import Layout
from ..numbers import check_number
from ..token_map import Pool

#: Channels of a head that the kernels take.
WIDEST = 128


class QueryPool(Pool):
    """M tokens, each a mean of all patches, weighted by what the patches are: SiT's slimming.

    X^ = softmax over patches (s W2 gelu(W1 LN x))^T x, which is attention of one head with the
    rows of W2 as its queries, keys gelu(W1 LN x) and the patches themselves as values. Prefix
    tokens pass beside it. It doesn't matter in which order the patches come.

    Args:
        width: channels, 2 or more.
        tokens: M, that the patches become.
        cells: of the grid that ``expand`` recovers; None: without it.

    Raises:
        ValueError: a number that is too small.

    Source: SiT, arXiv 2111.12624, section 3.2 (token slimming).
    """

    def __init__(self, width: int, tokens: int, *, cells: int | None = None) -> None:
        super().__init__()
        check_number("width", width, least=2)
        check_number("tokens", tokens, least=1)
        self.tokens = tokens
        self.norm = nn.LayerNorm(width)
        self.keys = nn.Linear(width, width // 2)
        self.queries = nn.Parameter(torch.empty(tokens, width // 2))
        self.scale = nn.Parameter(torch.ones(1))  # FSDP shards no scalars
        for weight in (self.keys.weight, self.queries):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.keys.bias)
        self.recovery = None if cells is None else Recovery(width, tokens, cells)

    def reduce(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """`(B, N, C)` to `(B, prefix + M, C)`, and what these are: a sequence without a grid."""
        patches = x[:, layout.prefix :]
        keys = F.gelu(self.keys(self.norm(patches)))
        queries = (self.scale * self.queries).expand(len(x), -1, -1)
        slim = cross_attention(queries, keys, patches).to(x.dtype)
        return torch.cat([x[:, : layout.prefix], slim], dim=1), self.reduced(layout)

    def reduced(self, layout: Layout) -> Layout:
        """What the tokens are once they were slimmed: nobody can tell how many each stands for."""
        return Layout(layout.prefix, (self.tokens,))

    def expand(self, y: Tensor, layout: Layout) -> Tensor:
        """`(B, prefix + M, C)` to `(B, N, C)`: the recovery, which is learned too.

        Raises:
            ValueError: a pool without recovery, or one for another number of patches.
        """
        if self.recovery is None or self.recovery.cells != layout.cells:
            cells = None if self.recovery is None else self.recovery.cells
            raise ValueError(f"cells: got {cells}, expected {layout.cells} to recover those")
        prefix, slim = y[:, : layout.prefix], y[:, layout.prefix :]
        return torch.cat([prefix, self.recovery(slim)], dim=1)

    def flops(self, layout: Layout) -> int:
        """Of the products of slimming one image, a multiply-add counted as 2."""
        width = self.keys.in_features
        return 2 * layout.cells * (self.keys.weight.numel() + self.tokens * (width // 2 + width))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"


class Recovery(nn.Module):
    """N patches again from M tokens: Y = mlp_tok(LN(x)^T)^T, then Y + mlp(LN Y).

    It serves training alone: what is recovered is compared with a teacher's patches.

    Args:
        width: channels.
        tokens, cells: M and N.

    Source: SiT, arXiv 2111.12624, section 3.3 (reverse token slimming).
    """

    def __init__(self, width: int, tokens: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = _mlp(tokens, 4 * cells, cells)
        self.over_channels = _mlp(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, M, C)` to `(B, N, C)`."""
        y = self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return y + self.over_channels(self.norm2(y))


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, of one head of any width, on kernels whose heads are narrow.

    Values are cut into heads that apply one map. Scores are sums over channels: what the widest
    head leaves out of them goes in as the bias.

    Args:
        q: `(B, M, d)`.
        k: `(B, N, d)`.
        v: `(B, N, C)`.

    Returns:
        `(B, M, C)`.
    """
    q, k = q.unsqueeze(1), k.unsqueeze(1)
    rest = q[..., WIDEST:] @ k[..., WIDEST:].transpose(2, 3) if q.shape[3] > WIDEST else None
    q, k = q[..., :WIDEST], k[..., :WIDEST]
    heads = _heads(v.shape[2])
    v = split_heads(v, heads)
    out, attn_map = attention(
        q, k, v[:, :1], scale=1.0, bias=rest, return_map="dense" if heads > 1 else None, reuses=0
    )
    if attn_map is not None:
        others = apply_attention(attn_map, v[:, 1:], head_index=[0] * (heads - 1))
        out = torch.cat([out, others], dim=1)
    return out.transpose(1, 2).flatten(2)


def _heads(width: int) -> int:
    """The fewest that a width can be cut into."""
    return next(h for h in range(math.ceil(width / WIDEST), width + 1) if width % h == 0)
