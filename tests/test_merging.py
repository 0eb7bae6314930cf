"""``match_tokens``, ``select_tokens``, ``merge_tokens``: pairs, means, gradients, edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits
from inputs import BF16, F32, F64, fused_qkv, guarded, normal
from merge_cases import (
    check_merge,
    eager_merge,
    merge_case,
    merge_results,
    random_match,
    table_match,
)
from surroundings import threads
from torch._dynamo.testing import CompileCounter

import psvit_kernels as pk

SIZES = [(1, 0), (2, 1), (5, 0), (6, 1), (7, 2), (50, 1), (65, 5), (197, 1), (198, 2)]


def scores_of(metric):
    """Cosines of all pairs of tokens, float64."""
    metric = metric.unsqueeze(1) if metric.dim() == 3 else metric
    unit = F.normalize(metric.double().mean(1), dim=-1)
    return unit @ unit.transpose(1, 2)


def paired(scores, r, prefix, penalty=None):
    """What each token of one image becomes, position by position."""
    n = len(scores)
    penalty = [0.0] * n if penalty is None else penalty
    if not r:
        return list(range(n))
    even, odd = ([i for i in range(prefix, n) if i % 2 == side] for side in (0, 1))
    best = {i: max(odd, key=lambda j: (scores[i][j], -j)) for i in even} if odd else {}
    merged = sorted(best, key=lambda i: (penalty[i] - scores[i][best[i]], i))[:r]
    left = [*range(prefix), *(i for i in even if i not in merged), *odd]
    return [left.index(best[i] if i in merged else i) for i in range(n)]


@pytest.mark.parametrize(("n", "prefix"), SIZES)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_pairs_are_those_of_the_formula(provider, n, prefix, part):
    metric = normal(2, 3, n, 16, dtype=F32)
    most = (n - prefix) // 2
    r = math.ceil(part * most)
    match = pk.match_tokens(metric, r, prefix=prefix)
    assert match.tokens == n - r
    want = torch.tensor([paired(s.tolist(), r, prefix) for s in scores_of(metric)])
    assert torch.equal(match.into, want), (match.into, want)
    for got, table in zip(match, table_match(want, n - r), strict=True):
        assert torch.equal(got, table)


def test_keys_of_a_fused_projection_are_a_metric(backend):
    _, k, _ = fused_qkv(3, 65, 3, 24, backend.dtype)
    match = pk.match_tokens(k, 9, prefix=1)
    want = torch.tensor([paired(s.tolist(), 9, 1) for s in scores_of(k)])
    assert torch.equal(match.into, want)
    again = pk.match_tokens(k.float().mean(1), 9, prefix=1)
    assert torch.equal(again.into, want)


def test_a_penalty_keeps_tokens_from_being_merged(backend):
    """It counts for the token that would join another, and doesn't change which one that is."""
    metric = normal(3, 2, 41, 16, dtype=backend.dtype)
    penalty = normal(3, 41, dtype=F32)
    penalty[0, 6] = math.inf
    penalty[2, 10] = math.nan  # below all others, as is the one before
    match = pk.match_tokens(metric, 9, prefix=1, penalty=penalty)
    rows = penalty.nan_to_num(nan=math.inf, posinf=math.inf).tolist()
    want = [paired(s.tolist(), 9, 1, row) for s, row in zip(scores_of(metric), rows, strict=True)]
    assert torch.equal(match.into, torch.tensor(want))
    assert not torch.equal(match.into, pk.match_tokens(metric, 9, prefix=1).into)
    zero = pk.match_tokens(metric, 9, prefix=1, penalty=torch.zeros(3, 41))
    assert torch.equal(zero.into, pk.match_tokens(metric, 9, prefix=1).into)


def test_what_lies_beyond_a_row_is_not_read(provider):
    metric = guarded(normal(2, 2, 21, 13), offset=5, gaps=(7, 3, 11, 0))
    match = pk.match_tokens(metric, 6, prefix=1)
    assert torch.equal(match.into, pk.match_tokens(metric.contiguous(), 6, prefix=1).into)


def test_of_equal_scores_the_lowest_position_wins(provider):
    match = pk.match_tokens(torch.ones(1, 11, 8), 2, prefix=1)
    # Even positions 2 and 4 join position 1: the first odd one.
    assert match.into.tolist() == [[0, 4, 4, 5, 4, 6, 1, 7, 2, 8, 3]]
    assert match.order.tolist() == [[0, 6, 8, 10, 1, 2, 4, 3, 5, 7, 9]]
    assert match.starts.tolist() == [[0, 1, 2, 3, 4, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("batch", [1, 2])
def test_images_cut_among_threads_match_the_same(batch):
    metric = normal(batch, 2, 197, 16)
    metric[:, :, 50:90] = metric[:, :, :1]  # equal scores across the cuts
    with threads(1):
        alone = pk.match_tokens(metric, 40, prefix=1)
    for count in (2, 5, 16):
        with threads(count):
            together = pk.match_tokens(metric, 40, prefix=1)
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got, want), count


def test_more_pairs_than_there_can_be_are_as_many_as_there_can_be(provider):
    metric = normal(2, 10, 8)
    most = pk.match_tokens(metric, 4, prefix=1)
    assert torch.equal(pk.match_tokens(metric, 100, prefix=1).into, most.into)
    assert most.tokens == 6
    assert pk.match_tokens(metric, 3, prefix=10).tokens == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_like_no_other(provider, bad):
    metric = normal(1, 12, 8)
    metric[0, 4, 3] = metric[0, 7, 0] = bad
    match = pk.match_tokens(metric, 4, prefix=0)
    alone = [match.into[0].tolist().count(int(match.into[0, n])) for n in (4, 7)]
    assert alone == [1, 1]
    everything = pk.match_tokens(metric, 6, prefix=0)
    assert everything.tokens == 6 and everything.into.min() == 0 and everything.into.max() == 5


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("rest", ["merge", "drop"])
@pytest.mark.parametrize("keep", [1, 5, 12])
def test_the_highest_scores_are_kept_in_order(prefix, rest, keep):
    scores = normal(3, 12)
    scores[1] = 0.0
    scores[2, 3] = math.nan
    match = pk.select_tokens(scores, keep, prefix=prefix, rest=rest)
    merged = rest == "merge" and keep < 12
    assert match.tokens == prefix + keep + merged
    rows = []
    for row in scores.nan_to_num(nan=-math.inf).tolist():
        kept = sorted(sorted(range(12), key=lambda i: (-row[i], i))[:keep])
        other = prefix + keep if merged else -1
        places = [prefix + kept.index(i) if i in kept else other for i in range(12)]
        rows.append([*range(prefix), *places])
    for got, table in zip(match, table_match(torch.tensor(rows), match.tokens), strict=True):
        assert torch.equal(got, table)


# --- merge_tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [7, 16, 33, 192])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_means_and_gradients_meet_the_bar(backend, channels, residual, norm):
    check_merge(merge_case(2, 37, 21, channels, residual=residual, norm=norm, dtype=backend.dtype))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_weights_meet_the_bar(dtype):
    for channels in (1, 24):
        check_merge(merge_case(2, 37, 21, channels, weights=True, residual=True, dtype=dtype))


@pytest.mark.parametrize("dropped", [0, 4])
def test_weights_that_need_no_gradient_give_the_same(backend, dropped):
    dtype = backend.dtype
    case = merge_case(2, 50, 33, 24, dtype=dtype, weights=True, norm=True, dropped=dropped)
    weights = case.tensors.pop("weights")

    def weighted(x, match, **tensors):
        return pk.merge_tokens(x, match, weights, **tensors)

    got = merge_results(case, weighted)
    weights = weights.double()
    with pk.use("reference"):
        exact = merge_results(case.double(), weighted)
    for name, value in got.items():
        tolerance = 2e-5 if dtype == F32 else 4e-2
        torch.testing.assert_close(value.double(), exact[name], rtol=tolerance, atol=tolerance)


def test_the_reference_equals_a_product_with_a_matrix_in_float64():
    for dropped in (0, 5):
        case = merge_case(
            2, 23, 11, 6, dtype=F64, weights=True, residual=True, norm=True, dropped=dropped
        )
        got, want = merge_results(case), merge_results(case, eager_merge)
        for name in got:
            torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12, msg=name)


def test_a_token_that_nothing_joins_stays_as_it_is(backend):
    case = merge_case(2, 30, 30, 17, dtype=backend.dtype)
    merged = pk.merge_tokens(case.x, case.match)
    assert torch.equal(
        merged.tokens, case.x.gather(1, case.match.order[..., None].expand(-1, -1, 17))
    )
    assert torch.equal(merged.sizes, torch.ones(2, 30)) and merged.normed is None


def test_merging_what_was_merged_is_merging_once(backend):
    """Means of means, weighted by size, are means: for two matches after one another."""
    x = normal(2, 40, 24, dtype=backend.dtype)
    first, second = random_match(2, 40, 25), random_match(2, 25, 10)
    one = pk.merge_tokens(x, first)
    two = pk.merge_tokens(one.tokens, second, one.sizes)
    both = table_match(second.into.gather(1, first.into), 10)
    once = pk.merge_tokens(x, both)
    torch.testing.assert_close(two.sizes, once.sizes)
    tolerance = 2e-2 if backend.dtype != F32 else 1e-5
    torch.testing.assert_close(two.tokens, once.tokens, rtol=tolerance, atol=tolerance)


def test_a_dropped_token_is_not_read_and_gets_no_gradient(provider):
    case = merge_case(2, 20, 9, 12, dropped=6)
    dropped = case.match.into < 0
    case.x[dropped] = math.nan
    got = merge_results(case)
    assert got["tokens"].isfinite().all()
    assert torch.equal(got["dx"][dropped], torch.zeros(12, 12))


def test_one_token_that_is_no_number_spoils_only_what_it_becomes(provider):
    case = merge_case(1, 20, 9, 12)
    case.x[0, 7] = math.nan
    spoilt = pk.merge_tokens(case.x, case.match).tokens.isnan().any(2)
    want = torch.zeros(1, 9, dtype=torch.bool)
    want[0, case.match.into[0, 7]] = True
    assert torch.equal(spoilt, want)


def test_memory_between_tokens_is_not_read(provider):
    case = merge_case(2, 21, 13, 15, residual=True)
    want = merge_results(case)
    tensors = {name: guarded(t, 3, (9, 5, 0)) for name, t in case.tensors.items()}
    got = merge_results(case._replace(x=guarded(case.x, 1, (4, 6, 0)), tensors=tensors))
    assert_same_bits(got, want)


def test_gradients_that_come_expanded_are_read_right(provider):
    case = merge_case(2, 21, 13, 15)
    grad = torch.ones(1).expand(2, 13, 15)
    want = merge_results(case._replace(grads=(torch.ones(2, 13, 15), *case.grads[1:])))
    got = merge_results(case._replace(grads=(grad, *case.grads[1:])))
    assert_same_bits(got, want)


@pytest.mark.parametrize("used", ["tokens", "sizes", "normed"])
def test_gradients_of_one_result_alone_are_right(used):
    case = merge_case(2, 9, 5, 4, dtype=F64, weights=True, norm=True)
    names = ("weights", "norm_weight", "norm_bias")
    tensors = [case.tensors[name].requires_grad_() for name in names]

    def result(x, weights, norm_weight, norm_bias):
        merged = pk.merge_tokens(
            x, case.match, weights, norm_weight=norm_weight, norm_bias=norm_bias
        )
        return getattr(merged, used)

    torch.autograd.gradcheck(result, (case.x.requires_grad_(), *tensors))


# --- registration ---------------------------------------------------------------------------

OPS = torch.ops.psvit_kernels


def test_opcheck(provider):
    case = merge_case(2, 12, 7, 8, residual=True, norm=True)
    tensors = [case.tensors[name] for name in ("norm_weight", "norm_bias")]
    x, residual = case.x.requires_grad_(), case.tensors["residual"].requires_grad_()
    args = (x, residual, *case.match, None, *tensors, 1e-6)
    torch.library.opcheck(OPS.merge_tokens.default, args)
    sizes = pk.merge_tokens(case.x, case.match).sizes
    grads = (case.grads[0], None, case.grads[2])
    backward = (*(a.detach() if isinstance(a, torch.Tensor) else a for a in args), sizes, *grads)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.merge_tokens_backward.default, (*backward, False), test_utils=utils)
    metric, penalty = normal(2, 3, 12, 8), normal(2, 12)
    for penalised in (None, penalty):
        torch.library.opcheck(OPS.match_tokens.default, (metric, 4, 1, penalised))


def test_opcheck_of_selection():
    for keep, merge in ((4, True), (4, False), (9, True)):
        torch.library.opcheck(OPS.select_tokens.default, (normal(2, 9), keep, 1, merge))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_whole_and_for_every_image(provider):
    """No graph break, and no recompilation for images whose tokens merge in another way."""
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def merge(x, keys):
        match = pk.match_tokens(keys, 5, prefix=1)
        return pk.merge_tokens(x, match)

    for _ in range(3):
        x, keys = normal(2, 21, 12), normal(2, 3, 21, 4)
        got = merge(x, keys)
        want = pk.merge_tokens(x, pk.match_tokens(keys, 5, prefix=1))
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.sizes, want.sizes)
    assert counter.frame_count == 1


# --- bad input ------------------------------------------------------------------------------


def ones(*shape, dtype=F32):
    return torch.ones(*shape, dtype=dtype)


def merge(x=None, match=None, **options):
    match = pk.match_tokens(ones(2, 6, 4), 2) if match is None else match
    return pk.merge_tokens(ones(2, 6, 4) if x is None else x, match, **options)


BAD = [
    (lambda: pk.match_tokens(None, 2), TypeError,
     "metric: got NoneType, expected a Tensor of shape (B, N, d) or (B, H, N, d)"),
    (lambda: pk.match_tokens(ones(2, 4), 2), ValueError,
     "metric: got shape (2, 4), expected (B, N, d) or (B, H, N, d)"),
    (lambda: pk.match_tokens(ones(2, 6, 4), 1.5), TypeError, "r: got 1.5, expected an integer"),
    (lambda: pk.match_tokens(ones(2, 6, 4), -1), ValueError, "r: got -1, expected 0 or more"),
    (lambda: pk.match_tokens(ones(2, 6, 4), 1, prefix=7), ValueError,
     "prefix: got 7, expected 0 to 6, the number of tokens"),
    (lambda: pk.match_tokens(ones(2, 6, 0), 1), ValueError,
     "metric: got shape (2, 1, 6, 0), expected at least one channel"),
    (lambda: pk.match_tokens(ones(2, 6, 4), 1, penalty=ones(2, 5)), ValueError,
     "penalty: got shape (2, 5), expected (2, 6) as metric"),
    (lambda: pk.select_tokens(ones(2, 6), 0), ValueError,
     "keep: got 0, expected 1 to 6, the number of scores"),
    (lambda: pk.select_tokens(ones(2, 6), 7), ValueError,
     "keep: got 7, expected 1 to 6, the number of scores"),
    (lambda: pk.select_tokens(ones(2, 6), 3, rest="keep"), ValueError,
     "rest: got 'keep', expected \"merge\" or \"drop\""),
    (lambda: pk.select_tokens(ones(2, 6), 3, prefix=-1), ValueError,
     "prefix: got -1, expected 0 or more"),
    (lambda: pk.merge_tokens(ones(2, 6, 4), None), TypeError,
     "match: got NoneType, expected a TokenMatch"),
    (lambda: merge(ones(2, 7, 4)), ValueError,
     "match: got shapes [(2, 6), (2, 6), (2, 5)], expected those of 2 images of 7 tokens"),
    (lambda: merge(weights=ones(2, 5)), ValueError,
     "weights: got shape (2, 5), expected (2, 6) as x"),
    (lambda: merge(weights=ones(2, 6, dtype=F64)), TypeError,
     "weights: got dtype torch.float64, expected torch.float32"),
    (lambda: merge(residual=ones(2, 6, 5)), ValueError,
     "residual: got shape (2, 6, 5), expected (2, 6, 4) as x"),
    (lambda: merge(residual=ones(2, 6, 4, dtype=BF16)), TypeError,
     "residual: got dtype torch.bfloat16, expected torch.float32 as x"),
    (lambda: merge(norm_bias=ones(4)), ValueError,
     "norm_weight: got None with a norm_bias, expected both or neither"),
    (lambda: merge(norm_weight=ones(3)), ValueError,
     "norm_weight: got shape (3,) with channels 3, expected 4 as x"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_input_raises(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
