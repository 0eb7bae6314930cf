// Merging of tokens: which join which, image by image, and their weighted means.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "attention_blocks.h"
#include "tokens.h"

namespace psvit::PSVIT_ISA {
namespace {

// --- matching --------------------------------------------------------------------------------

// Positions `first`, first + 2, ... of an image.
struct Side {
    int64_t first, count;

    Side(const MatchArgs& a, int64_t parity)
        : first(a.prefix + ((a.prefix ^ parity) & 1)),
          count(first < a.tokens ? (a.tokens - first + 1) / 2 : 0) {}
};

constexpr int64_t ODD_ROWS = 4 * TILE_ROWS;  // compared at a time: they stay in the first cache
constexpr int HEAD_VECS = 4;                 // of a head, summed in registers

// Where images are fewer than threads, each is cut into runs of even tokens.
struct EvenSplit {
    int64_t vecs, parts;

    explicit EvenSplit(const MatchArgs& a)
        : vecs(round_up(Side(a, 0).count, W) / W),
          parts(smaller(vecs, (a.threads + a.batch - 1) / a.batch)) {}
    int64_t first(int64_t part) const { return vecs * part / parts * W; }
    int64_t most() const { return (vecs + parts - 1) / parts * W; }
};

// Even tokens are columns of the scores: each has a lane of its own, so that its best partner is
// found without a look across lanes.
struct MatchScratch {
    int64_t ldd;  // channels, in whole vectors
    float *rows, *even, *scores, *best, *partners;
    uint64_t* ranks;

    MatchScratch(const MatchArgs& a, int64_t evens, Arena& arena) : ldd(round_up(a.depth, W)) {
        rows = arena.take((evens < ODD_ROWS ? ODD_ROWS : evens) * ldd);
        even = arena.take(a.depth * evens);  // transposed
        scores = arena.take(ODD_ROWS * evens);
        best = arena.take(evens);
        partners = arena.take(evens);  // odd tokens, counted from 0: exact in a float up to 2^24
        ranks = (uint64_t*)arena.take(2 * Side(a, 0).count);
    }
};

// The mean over the heads of VECS vectors of a token's metric, and the squares of it.
template <int VECS, typename T>
PSVIT_INLINE vf mean_of_heads(const MatchArgs& a, const T* metric, int64_t left, float* mean) {
    vf sums[VECS] = {};
    for (int64_t h = 0; h < a.heads; h++)
        for (int v = 0; v < VECS; v++) {
            const T* at = metric + h * a.metric.head + v * W;
            __builtin_prefetch(at + 4 * a.metric.row);  // in a fused projection rows lie far apart
            sums[v] += load_upto(at, left - v * W);
        }
    vf squares = {};
    for (int v = 0; v < VECS; v++) {
        sums[v] *= 1.0f / float(a.heads);
        squares += sums[v] * sums[v];
        store(mean + v * W, sums[v]);
    }
    return squares;
}

// The mean over the heads of one token's metric, its length made 1.
template <typename T>
void unit_row(const MatchArgs& a, int64_t b, int64_t n, float* row) {
    const T* metric = head<T>(a.metric, b, 0) + n * a.metric.row;
    vf squares = {};
    int64_t c = 0;
    for (; c + HEAD_VECS * W <= a.depth; c += HEAD_VECS * W)
        squares += mean_of_heads<HEAD_VECS>(a, metric + c, HEAD_VECS * W, row + c);
    for (; c < a.depth; c += W) squares += mean_of_heads<1>(a, metric + c, a.depth - c, row + c);
    const float length = sqrtf(sum_lanes(squares));
    const float scale = 1.0f / (length < 1e-12f ? 1e-12f : length);
    for (c = 0; c < a.depth; c += W) store(row + c, load(row + c) * scale);
}

// `rows` odd tokens more, from number `first` on: the first of the highest scores is kept; a NaN is
// below all others.
void keep_best(const MatchScratch& s, int64_t evens, int64_t first, int64_t rows) {
    for (int64_t c = 0; c < evens; c += W) {
        vf best = load(s.best + c), partner = load(s.partners + c);
        for (int64_t r = 0; r < rows; r++) {
            const vf x = load(s.scores + r * evens + c);
            partner = x > best ? splat(float(first + r)) : partner;
            best = x > best ? x : best;
        }
        store(s.best + c, best);
        store(s.partners + c, partner);
    }
}

// The best partners of even tokens `begin` to `end`, in `into`, and their scores.
template <typename T>
void best_partners(const MatchArgs& a, int64_t b, int64_t begin, int64_t end, int64_t* into,
                   float* scores, const MatchScratch& s) {
    const Side even(a, 0), odd(a, 1);
    const int64_t evens = round_up(end - begin, W);
    for (int64_t i = begin; i < end; i++)
        unit_row<T>(a, b, even.first + 2 * i, s.rows + (i - begin) * s.ldd);
    pack_transposed(s.rows, s.ldd, end - begin, a.depth, s.even, evens);
    std::fill(s.best, s.best + evens, -INFINITY);
    std::fill(s.partners, s.partners + evens, 0.0f);
    for (int64_t first = 0; first < odd.count; first += ODD_ROWS) {
        const int64_t rows = smaller(ODD_ROWS, odd.count - first);
        for (int64_t r = 0; r < rows; r++)
            unit_row<T>(a, b, odd.first + 2 * (first + r), s.rows + r * s.ldd);
        gemm(rows, evens, a.depth, {s.rows, s.ldd, 1}, s.even, evens, s.scores, evens, false);
        keep_best(s, evens, first, rows);
    }
    for (int64_t i = begin; i < end; i++) {
        const int64_t n = even.first + 2 * i;
        float score = s.best[i - begin];
        if (a.penalty) score -= a.penalty[b * a.tokens + n];
        scores[i] = score == score ? score : -INFINITY;
        into[n] = int64_t(s.partners[i - begin]);
    }
}

// Greater for a higher score, and of equal ones for a lower position.
uint64_t rank_of(float score, int64_t position) {
    const float x = score + 0.0f;  // never -0
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(bits) << 32 | ~uint32_t(position);
}

// into, from the best partners in it.
void join_best(const MatchArgs& a, int64_t* into, const float* scores, uint64_t* ranks) {
    const Side even(a, 0), odd(a, 1);
    for (int64_t i = 0; i < even.count; i++) ranks[i] = rank_of(scores[i], i);
    const uint64_t* last = ranks + a.pairs - 1;  // that joins
    std::nth_element(ranks, ranks + a.pairs - 1, ranks + even.count, std::greater<uint64_t>());
    const int64_t odds = a.prefix + even.count - a.pairs;
    int64_t next = a.prefix;
    for (int64_t n = 0; n < a.prefix; n++) into[n] = n;
    for (int64_t i = 0; i < even.count; i++) {
        int64_t& place = into[even.first + 2 * i];
        place = rank_of(scores[i], i) >= *last ? odds + place : next++;
    }
    for (int64_t i = 0; i < odd.count; i++) into[odd.first + 2 * i] = odds + i;
}

// order and starts from into.
void write_tables(const MatchArgs& a, int64_t b) {
    const int64_t outputs = a.tokens - a.pairs;
    const int64_t* into = a.into + b * a.tokens;
    int64_t *order = a.order + b * a.tokens, *starts = a.starts + b * (outputs + 1);
    std::fill(starts, starts + outputs + 1, 0);
    for (int64_t n = 0; n < a.tokens; n++) starts[into[n] + 1]++;
    for (int64_t m = 0; m < outputs; m++) starts[m + 1] += starts[m];
    for (int64_t n = 0; n < a.tokens; n++) order[starts[into[n]]++] = n;  // now they are ends
    std::copy_backward(starts, starts + outputs, starts + outputs + 1);
    starts[0] = 0;
}

// All tokens stay.
void match_nothing(const MatchArgs& a) {
    for (int64_t b = 0; b < a.batch; b++) {
        std::iota(a.into + b * a.tokens, a.into + (b + 1) * a.tokens, 0);
        write_tables(a, b);
    }
}

template <typename T>
void match(const MatchArgs& a) {
    if (a.batch * a.pairs == 0) return match_nothing(a);
    const int64_t evens = Side(a, 0).count;
    const EvenSplit split(a);
    Arena counter(nullptr);
    MatchScratch(a, split.most(), counter);
    std::vector<float> all_scores(size_t(a.batch * evens));
    std::vector<std::atomic<int64_t>> done(size_t(a.batch));  // parts of each image
    const auto match_part = [&](int64_t task, float* memory) {
        const int64_t b = task / split.parts, part = task % split.parts;
        const int64_t begin = split.first(part), end = smaller(split.first(part + 1), evens);
        int64_t* into = a.into + b * a.tokens;
        float* scores = all_scores.data() + b * evens;
        Arena arena(memory);
        const MatchScratch s(a, split.most(), arena);
        best_partners<T>(a, b, begin, end, into, scores, s);
        if (++done[size_t(b)] < split.parts) return;
        join_best(a, into, scores, s.ranks);
        write_tables(a, b);
    };
    parallel_tasks(a.batch * split.parts, a.threads, counter.used, match_part);
}

// --- merging ---------------------------------------------------------------------------------

constexpr int64_t TOKENS = 32;  // of a task

struct Parts {
    const int64_t* order;
    int64_t count;
    const float* weights;  // null: all 1
    float size;

    Parts(const MergeArgs& a, int64_t b, int64_t m) {
        const int64_t* starts = a.starts + b * (a.outputs + 1) + m;
        order = a.order + b * a.tokens + starts[0];
        count = starts[1] - starts[0];
        weights = a.weights ? a.weights + b * a.tokens : nullptr;
        size = 0.0f;
        for (int64_t i = 0; i < count; i++) size += weight(i);
    }
    float weight(int64_t i) const { return weights ? weights[order[i]] : 1.0f; }
};

// The weighted mean in `row`.
template <typename T>
void mean_of_parts(const MergeArgs& a, int64_t b, const Parts& parts, float* row) {
    if (parts.count == 0) std::fill(row, row + round_up(a.channels, W), 0.0f);
    for (int64_t i = 0; i < parts.count; i++) {
        const T* x = token<T>(a.x, b, parts.order[i]);
        const T* residual = a.residual.data ? token<T>(a.residual, b, parts.order[i]) : nullptr;
        const float share = parts.weight(i) / parts.size;
        for (int64_t c = 0; c < a.channels; c += W) {
            const int64_t left = a.channels - c;
            vf part = load_upto(x + c, left);
            if (residual) part += load_upto(residual + c, left);
            store(row + c, i ? load(row + c) + part * share : part * share);
        }
    }
}

template <typename T>
void merge_token(const MergeArgs& a, int64_t b, int64_t m, float* row) {
    const Parts parts(a, b, m);
    a.sizes[b * a.outputs + m] = parts.size;
    T* out = token<T>(a.out, b, m);
    if (parts.count == 1 && !a.residual.data && !a.normed.data) {
        memcpy(out, token<T>(a.x, b, parts.order[0]), size_t(a.channels) * sizeof(T));
        return;
    }
    mean_of_parts<T>(a, b, parts, row);
    for (int64_t c = 0; c < a.channels; c += W) store_upto(out + c, load(row + c), a.channels - c);
    if (a.normed.data)
        layer_norm(row, a.channels, a.norm_weight, a.norm_bias, a.norm_eps,
                   token<T>(a.normed, b, m));
}

template <typename T>
void merge(const MergeArgs& a) {
    const int64_t blocks = (a.outputs + TOKENS - 1) / TOKENS;
    parallel_tasks(a.batch * blocks, a.threads, round_up(a.channels, W),
                   [&](int64_t task, float* row) {
                       const int64_t b = task / blocks, first = task % blocks * TOKENS;
                       for (int64_t m = first; m < smaller(first + TOKENS, a.outputs); m++)
                           merge_token<T>(a, b, m, row);
                   });
}

template <typename T>
void merge_backward(const MergeArgs& a) {
    const int64_t blocks = (a.tokens + TOKENS - 1) / TOKENS;
    parallel_tasks(a.batch * blocks, a.threads, 0, [&](int64_t task, float*) {
        const int64_t b = task / blocks, first = task % blocks * TOKENS;
        for (int64_t n = first; n < smaller(first + TOKENS, a.tokens); n++) {
            const int64_t at = b * a.tokens + n, m = a.into[at];
            T* dx = token<T>(a.dx, b, n);
            if (m < 0) {
                memset(dx, 0, size_t(a.channels) * sizeof(T));
                continue;
            }
            const T* g = token<T>(a.out, b, m);
            const float share = (a.weights ? a.weights[at] : 1.0f) / a.sizes[b * a.outputs + m];
            for (int64_t c = 0; c < a.channels; c += W)
                store_upto(dx + c, load_upto(g + c, a.channels - c) * share, a.channels - c);
        }
    });
}

}  // namespace

void match_tokens(const MatchArgs& a) {
    a.dtype == Dtype::float32 ? match<float>(a) : match<bf16>(a);
}

void merge_tokens(const MergeArgs& a) {
    a.dtype == Dtype::float32 ? merge<float>(a) : merge<bf16>(a);
}

void merge_tokens_backward(const MergeArgs& a) {
    a.dtype == Dtype::float32 ? merge_backward<float>(a) : merge_backward<bf16>(a);
}

}  // namespace psvit::PSVIT_ISA
