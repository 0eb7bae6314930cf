"""Block sizes, warps and stages that each kernel is tried with; the first of a list is the default.

Nothing here has been measured yet: the defaults come from counting registers and shared memory.
"""

from __future__ import annotations

import torch
from triton import Config

from .tiles import padded

# --- attention ------------------------------------------------------------------------------


def attention_short(capability: tuple[int, int], columns: int) -> list[Config]:
    """64 rows a warp group, what wgmma takes: (columns + d') / 2 registers a thread hold scores and
    output. 128 rows read K and V half as often, with twice the shared memory; with more than 208
    columns they spill on sm_100. Before sm_90, K and V pass through registers too, and 32 rows fit.
    """
    if capability < (9, 0):
        return [Config({"BLOCK_M": 32}, num_warps=4, num_stages=1)]
    found = [Config({"BLOCK_M": 64}, num_warps=4, num_stages=1)]
    if columns <= 208:
        found.append(Config({"BLOCK_M": 128}, num_warps=8, num_stages=1))
    return found


def attention_stream(dtype: torch.dtype, d: int, biased: bool) -> list[Config]:
    """The most that doesn't spill: 128 columns, or 128 rows of wide heads, do on sm_80; 64 columns
    of wide heads and of a bias everywhere; float32, without tensor cores, any more than these."""
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4 if d <= 64 else 8, num_stages=2)]
    if d > 64:
        wide = Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2)
        narrow = Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2)
        return [narrow] if biased else [wide, narrow]
    return [
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    ]


# --- attention, backward --------------------------------------------------------------------


def attention_delta(dtype: torch.dtype) -> list[Config]:
    return [Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=1)]


def attention_backward(
    capability: tuple[int, int], dtype: torch.dtype, d: int, pairs: int
) -> list[Config]:
    """Sums of BLOCK_OWN x d for dK and dV, a tile of P and one of dP are in registers; the owned
    rows of two tensors and one more for each pair, and two stages of as many walked ones, in shared
    memory. wgmma of sm_90 likes 64 walked rows; elsewhere they spill, and which others do is no
    rule: ptxas gives a few bytes up where it sees a multiprocessor hold more programs then.
    """
    if dtype == torch.float32:
        if d > 64:
            return [Config({"BLOCK_OWN": 16, "BLOCK": 16}, num_warps=4, num_stages=2)]
        return [Config({"BLOCK_OWN": 32, "BLOCK": 16}, num_warps=8, num_stages=2)]
    if d > 64:
        walked = 32 if pairs < 2 else 16
        return [Config({"BLOCK_OWN": 64, "BLOCK": walked}, num_warps=8, num_stages=2)]
    small = Config({"BLOCK_OWN": 64, "BLOCK": 32}, num_warps=4, num_stages=2)
    large = Config({"BLOCK_OWN": 128, "BLOCK": 32}, num_warps=8, num_stages=2)
    if capability < (9, 0):
        return [large]
    if capability >= (10, 0):
        return [small if pairs < 3 else large]
    return [Config({"BLOCK_OWN": 128, "BLOCK": 64}, num_warps=8, num_stages=2), large, small]


# --- apply_attention ------------------------------------------------------------------------


def apply_stored(dtype: torch.dtype, itemsize: int, dropout: bool) -> list[Config]:
    """Many rows a block, so that V is fetched from the L2 cache seldom; small enough for at least
    two programs at a time on a multiprocessor, so that one reads while another starts or ends.

    With 700 ns of latency, 4 TB/s take 22 KB of the map on their way to each multiprocessor of an
    H200. The first below has 3 programs x 3 stages x 16 KB there; with one byte an element, whose
    decoding takes registers, 2 x 3 x 8 KB. Random numbers take more of them.
    """
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=3)]
    table = [
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=4),
    ]
    if dropout:
        return table[:1]
    if itemsize == 1:
        return [*table, Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3)]
    return [
        *table,
        Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
        Config({"BLOCK_M": 256, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    ]


def apply_factored(dtype: torch.dtype, d: int, dropout: bool) -> list[Config]:
    """The tiles of flash attention; with four warps, more columns or longer heads, P and O together
    would not fit into registers."""
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2)]
    if dropout:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2)]
    table = [Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3)]
    if d > 64:
        return [*table, Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2)]
    return [
        *table,
        Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    ]


def apply_values_stored(dtype: torch.dtype, itemsize: int, dropout: bool) -> list[Config]:
    """Many columns a block, so that dO is fetched from the L2 cache seldom; with 8-bit codes, whose
    tiles pass through registers to be transposed, fewer."""
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=3)]
    table = [Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)]
    if itemsize == 1 or dropout:
        return table
    return [Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=3), *table]


def apply_values_factored(dtype: torch.dtype, dropout: bool) -> list[Config]:
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=4, num_stages=2)]
    if dropout:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2)]
    return [
        Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=8, num_stages=3),
        Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    ]


def apply_map_gradient(dtype: torch.dtype, dropout: bool) -> list[Config]:
    """Bound by writing: one tile a program, unless sequences or heads are summed."""
    if dtype == torch.float32:
        return [Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=1)]
    if dropout:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=1)]
    return [
        Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=1),
        Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=1),
    ]


# --- token_pool -----------------------------------------------------------------------------


def pool(dtype: torch.dtype) -> list[Config]:
    """Lines of 128 bytes, and tokens of a few rows of a grid, whose windows overlap; 16 or 32 bytes
    a thread, times the taps of a window in flight."""
    line, tokens = 128 // dtype.itemsize, 64 // dtype.itemsize
    return [
        Config({"BLOCK_T": tokens, "BLOCK_C": line}, num_warps=4, num_stages=1),
        Config({"BLOCK_T": tokens // 2, "BLOCK_C": line}, num_warps=4, num_stages=1),
        Config({"BLOCK_T": 2 * tokens, "BLOCK_C": line}, num_warps=8, num_stages=1),
        Config({"BLOCK_T": tokens // 4, "BLOCK_C": 2 * line}, num_warps=4, num_stages=1),
    ]


def pool_norm(dtype: torch.dtype, channels: int, rows: int) -> list[Config]:
    """Whole rows of the result, with all warps along them, so that what is read for a channel is
    read by the thread that needs it. Consecutive steps find each other's tokens in the L1 cache:
    as many as leave some hundred programs."""
    block, warps = _row(channels)
    tokens = max(1, 512 * warps // block)
    steps = max(1, min(16 // tokens, rows // (512 * tokens)))
    table = [(tokens, steps), (tokens, 2 * steps)]
    if dtype != torch.float32:
        table.append((2 * tokens, max(1, steps // 2)))
    return [
        Config({"BLOCK_T": t, "BLOCK_C": block, "STEPS": s}, num_warps=warps, num_stages=1)
        for t, s in table
    ]


def pool_norm_backward(channels: int) -> list[Config]:
    """Half as many tokens, for there is more to hold. One, because its block says what is summed
    before what: another would give other bits."""
    block, warps = _row(channels)
    tokens = max(1, 256 * warps // block)
    return [Config({"BLOCK_T": tokens, "BLOCK_C": block}, num_warps=warps, num_stages=1)]


def _row(channels: int) -> tuple[int, int]:
    """Channels of a block that holds whole rows, and warps with 8 of them a thread."""
    block = padded(channels)
    return block, max(1, min(16, block // 256))


def merge(channels: int) -> list[Config]:
    """Whole rows of the result, several at a time so that their loads are in flight together; 8
    or 16 channels a thread, for there are weights, a residual and LayerNorm to hold too."""
    block, warps = _row(channels)
    tokens = max(1, 512 * warps // block)
    return [
        Config({"BLOCK_T": t, "BLOCK_C": block}, num_warps=min(16, 2 * warps), num_stages=1)
        for t in (tokens, 2 * tokens)
    ]


def reduce_map(tokens: int) -> list[Config]:
    """Rows of the result, as whole as registers allow, 16 elements a thread: what is known of a
    column is read once for all rows of a tile."""
    block = min(256, padded(tokens))
    rows = 4096 // block
    return [
        Config({"BLOCK_M": r, "BLOCK_N": block}, num_warps=warps, num_stages=1)
        for r, warps in ((rows // 2, 4), (rows, 8), (rows // 4, 4))
    ]


def match(depth: int) -> list[Config]:
    """Square tiles of scores; products without tensor cores hold both operands in registers."""
    return [Config({"BLOCK": min(64, 4096 // depth)}, num_warps=8, num_stages=1)]


def pool_weight(dtype: torch.dtype) -> list[Config]:
    """32 sums a thread, and as many elements of x in flight."""
    return [Config({"BLOCK_T": 4, "BLOCK_C": 128 // dtype.itemsize}, num_warps=4, num_stages=1)]


def convolution(dtype: torch.dtype, outer: int, inner: int) -> list[Config]:
    """Square tiles for the tensor cores; narrow ones for narrow groups."""
    if dtype == torch.float32:
        sizes = [(64, 64, 32, 8, 3)]
    else:
        sizes = [(128, 128, 32, 8, 4), (64, 64, 64, 4, 4)]
    return [
        Config(
            {"BLOCK_M": m, "BLOCK_N": min(n, outer), "BLOCK_K": min(k, inner)},
            num_warps=warps,
            num_stages=stages,
        )
        for m, n, k, warps, stages in sizes
    ]
