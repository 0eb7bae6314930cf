// Merging of tokens: which join which, image by image, and their weighted means.
#include <algorithm>
#include <cmath>
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

// Scratch memory for one image.
struct MatchScratch {
    int64_t ldd, ldo;  // channels and odd tokens, in whole vectors
    float *rows, *odd, *scores;

    MatchScratch(const MatchArgs& a, Arena& arena)
        : ldd(round_up(a.depth, W)), ldo(round_up(Side(a, 1).count, W)) {
        rows = arena.take((a.tokens - a.prefix) * ldd);
        odd = arena.take(a.depth * ldo);  // transposed
        scores = arena.take(Side(a, 0).count * ldo);
    }
};

// The mean over the heads of one token's metric, its length made 1.
template <typename T>
void unit_row(const MatchArgs& a, int64_t b, int64_t n, float* row) {
    const float part = 1.0f / float(a.heads);
    vf squares = {};
    for (int64_t c = 0; c < a.depth; c += W) {
        vf sum = {};
        for (int64_t h = 0; h < a.heads; h++)
            sum += load_upto(head<T>(a.metric, b, h) + n * a.metric.row + c, a.depth - c);
        sum *= part;
        squares += sum * sum;
        store(row + c, sum);
    }
    const float length = sqrtf(sum_lanes(squares));
    const float scale = 1.0f / (length < 1e-12f ? 1e-12f : length);
    for (int64_t c = 0; c < a.depth; c += W) store(row + c, load(row + c) * scale);
}

struct Best {
    float score;
    int64_t partner;
};

// The first of the highest scores; a NaN is below all others.
Best best_of(const float* scores, int64_t count) {
    vf top = splat(-INFINITY);
    vi at = {};
    for (int64_t c = 0; c < count; c += W) {
        vi column = lane_numbers() + int32_t(c);
        vf x = load(scores + c);
        vi wins = (x > top) & (column < int32_t(count));
        top = wins ? x : top;
        at = wins ? column : at;
    }
    Best best = {max_lanes(top), count};
    for (int i = 0; i < W; i++)
        if (top[i] == best.score && at[i] < best.partner) best.partner = at[i];
    return best;
}

// order and starts from into.
void write_tables(const int64_t* into, int64_t tokens, int64_t outputs, int64_t* order,
                  int64_t* starts) {
    std::fill(starts, starts + outputs + 1, 0);
    for (int64_t n = 0; n < tokens; n++) starts[into[n] + 1]++;
    for (int64_t m = 0; m < outputs; m++) starts[m + 1] += starts[m];
    std::vector<int64_t> next(starts, starts + outputs);
    for (int64_t n = 0; n < tokens; n++) order[next[size_t(into[n])]++] = n;
}

template <typename T>
std::vector<Best> best_pairs(const MatchArgs& a, int64_t b, float* memory) {
    Arena arena(memory);
    const MatchScratch s(a, arena);
    const Side even(a, 0), odd(a, 1);
    for (int64_t n = a.prefix; n < a.tokens; n++)
        unit_row<T>(a, b, n, s.rows + (n - a.prefix) * s.ldd);
    const float* first_even = s.rows + (even.first - a.prefix) * s.ldd;
    const float* first_odd = s.rows + (odd.first - a.prefix) * s.ldd;
    pack_transposed(first_odd, 2 * s.ldd, odd.count, a.depth, s.odd, s.ldo);
    gemm(even.count, s.ldo, a.depth, {first_even, 2 * s.ldd, 1}, s.odd, s.ldo, s.scores, s.ldo,
         false);
    std::vector<Best> best(size_t(even.count));
    for (int64_t i = 0; i < even.count; i++)
        best[size_t(i)] = best_of(s.scores + i * s.ldo, odd.count);
    return best;
}

// Of each pair whether it is among the best: of equal scores the first.
std::vector<char> joined(const std::vector<Best>& best, int64_t pairs) {
    std::vector<size_t> ranked(best.size());
    for (size_t i = 0; i < ranked.size(); i++) ranked[i] = i;
    std::nth_element(ranked.begin(), ranked.begin() + pairs, ranked.end(),
                     [&](size_t i, size_t j) {
                         const float x = best[i].score, y = best[j].score;
                         return x > y || (x == y && i < j);
                     });
    std::vector<char> joins(best.size(), 0);
    for (int64_t i = 0; i < pairs; i++) joins[ranked[size_t(i)]] = 1;
    return joins;
}

template <typename T>
void match_image(const MatchArgs& a, int64_t b, float* memory) {
    const Side even(a, 0), odd(a, 1);
    const int64_t outputs = a.tokens - a.pairs, odds = a.prefix + even.count - a.pairs;
    int64_t* into = a.into + b * a.tokens;
    for (int64_t n = 0; n < a.tokens; n++) into[n] = n;
    if (a.pairs) {
        const std::vector<Best> best = best_pairs<T>(a, b, memory);
        const std::vector<char> joins = joined(best, a.pairs);
        int64_t next = a.prefix;
        for (int64_t i = 0; i < even.count; i++)
            into[even.first + 2 * i] = joins[size_t(i)] ? odds + best[size_t(i)].partner : next++;
        for (int64_t i = 0; i < odd.count; i++) into[odd.first + 2 * i] = odds + i;
    }
    write_tables(into, a.tokens, outputs, a.order + b * a.tokens, a.starts + b * (outputs + 1));
}

template <typename T>
void match(const MatchArgs& a) {
    Arena counter(nullptr);
    MatchScratch(a, counter);
    parallel_tasks(a.batch, a.threads, a.pairs ? counter.used : 0,
                   [&](int64_t b, float* memory) { match_image<T>(a, b, memory); });
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

template <typename T>
void merge_token(const MergeArgs& a, int64_t b, int64_t m, float* row) {
    const Parts parts(a, b, m);
    a.sizes[b * a.outputs + m] = parts.size;
    T* out = token<T>(a.out, b, m);
    for (int64_t c = 0; c < a.channels; c += W) {
        const int64_t left = a.channels - c;
        vf sum = {};
        for (int64_t i = 0; i < parts.count; i++) {
            vf x = load_upto(token<T>(a.x, b, parts.order[i]) + c, left);
            if (a.residual.data)
                x += load_upto(token<T>(a.residual, b, parts.order[i]) + c, left);
            sum += x * (parts.weight(i) / parts.size);
        }
        store_upto(out + c, sum, left);
        if (a.normed.data) store(row + c, sum);
    }
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
