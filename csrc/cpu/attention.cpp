// Softmax attention that hands out its map, and the application of a map: forward.
//
// A task is one head, or a run of rows of one. K (transposed) and V are packed once per task;
// then a block of rows at a time goes scores -> probabilities -> map and output while it is in
// the first-level cache.
#include "attention_blocks.h"

namespace psvit::PSVIT_ISA {
namespace {

// Rows of a block: the scores of 24 rows of 208 columns and a panel of K fit in 48 KiB.
constexpr int64_t BLOCK = 24;

// out = alpha (scale_of_row * block) + beta V + gamma mean(V); without a correction the first
// term alone.
template <typename T>
struct Epilogue {
    T* out;
    int64_t out_row, depth, ld;
    const float* values;  // packed V
    const float* mean;
    const float* correction;  // alpha, beta, gamma of this head, or null

    void write(const float* block, const float* row_scale, int64_t first, int64_t rows) const {
        for (int64_t r = 0; r < rows; r++) {
            float s = row_scale ? row_scale[r] : 1.0f;
            if (correction) s *= correction[0];
            T* to = out + (first + r) * out_row;
            for (int64_t c = 0; c < depth; c += W) {
                vf x = load(block + r * ld + c) * s;
                if (correction)
                    x += correction[1] * load(values + (first + r) * ld + c) +
                         correction[2] * load(mean + c);
                store_upto(to + c, x, depth - c);
            }
        }
    }
};

// Summed in runs, so that rounding errors grow with the root of the number of rows.
void mean_of_rows(const float* values, int64_t rows, int64_t ld, float* mean) {
    for (int64_t c = 0; c < ld; c += W) {
        vf total = {};
        for (int64_t first = 0; first < rows; first += 16) {
            vf run = {};
            for (int64_t r = first; r < smaller(first + 16, rows); r++)
                run += load(values + r * ld + c);
            total += run;
        }
        store(mean + c, total / float(rows));
    }
}

struct AttentionScratch {
    int64_t ldn, ldd, ldv, floats;
    float *keys, *values, *mean, *queries, *scores, *block;

    AttentionScratch(const Sizes& s, float* memory)
        : ldn(padded_columns(s.columns)), ldd(round_up(s.depth, W)), ldv(round_up(s.depth_v, W)) {
        Arena arena(memory);
        keys = arena.take(s.depth * ldn);      // (d, N), transposed
        values = arena.take(s.columns * ldv);  // (N, d)
        mean = arena.take(ldv);
        queries = arena.take(BLOCK * ldd);
        scores = arena.take(BLOCK * ldn);
        block = arena.take(BLOCK * ldv);
        floats = arena.used;
    }
};

template <typename T>
void attention_task(const AttentionArgs& a, int64_t task, const RowSplit& split, float* memory) {
    const Sizes& s = a.size;
    int64_t unit = task / split.parts;
    int64_t b = unit / s.heads, h = unit % s.heads;
    int64_t donor = a.head_index ? a.head_index[h] : h;
    AttentionScratch t(s, memory);
    float inverse[BLOCK];

    pack_transposed(head<T>(a.k, b, donor), a.k.row, s.columns, s.depth, t.keys, t.ldn);
    pack_rows(head<T>(a.v, b, h), a.v.row, s.columns, s.depth_v, t.values, t.ldv);
    const float* correction = a.correction ? a.correction + 3 * h : nullptr;
    if (correction) mean_of_rows(t.values, s.columns, t.ldv, t.mean);
    Epilogue<T> epilogue = {head<T>(a.out, b, h), a.out.row, s.depth_v, t.ldv,
                            t.values,             t.mean,    correction};
    const T* q = head<T>(a.q, b, donor);
    const T* bias = a.bias.data ? head<T>(a.bias, b, donor) : nullptr;
    T* map = a.map.data ? head<T>(a.map, b, h) : nullptr;
    float* lse = a.lse + (b * a.lse_heads + donor) * s.rows;

    int64_t end = split.first(task % split.parts + 1);
    for (int64_t i = split.first(task % split.parts); i < end; i += BLOCK) {
        int64_t rows = smaller(BLOCK, end - i);
        Matrix q_rows = float_rows(q + i * a.q.row, a.q.row, rows, s.depth, t.queries, t.ldd);
        gemm(rows, t.ldn, s.depth, q_rows, t.keys, t.ldn, t.scores, t.ldn, false);
        const T* bias_rows = bias ? bias + i * a.bias.row : nullptr;
        if (a.rebuild_map) {
            rebuild_rows(t.scores, t.ldn, rows, s.columns, a.scale, bias_rows, a.bias.row, lse + i);
        } else {
            softmax_rows(t.scores, t.ldn, rows, s.columns, a.scale, bias_rows, a.bias.row, inverse,
                         lse + i);
            if (map)
                store_map(t.scores, t.ldn, rows, s.columns, inverse, map + i * a.map.row,
                          a.map_pitch);
        }
        gemm(rows, t.ldv, s.columns, {t.scores, t.ldn, 1}, t.values, t.ldv, t.block, t.ldv, false);
        epilogue.write(t.block, a.rebuild_map ? nullptr : inverse, i, rows);
    }
}

struct ApplyScratch {
    int64_t ldn, ldv, floats;
    float *values, *mean, *map_rows, *block;

    ApplyScratch(const Sizes& s, float* memory)
        : ldn(padded_columns(s.columns)), ldv(round_up(s.depth_v, W)) {
        Arena arena(memory);
        values = arena.take(s.columns * ldv);
        mean = arena.take(ldv);
        map_rows = arena.take(BLOCK * ldn);
        block = arena.take(BLOCK * ldv);
        floats = arena.used;
    }
};

template <typename T>
void apply_task(const ApplyArgs& a, int64_t task, const RowSplit& split, float* memory) {
    const Sizes& s = a.size;
    int64_t unit = task / split.parts;
    int64_t b = unit / s.heads, h = unit % s.heads;
    int64_t donor = a.head_index ? a.head_index[h] : h;
    ApplyScratch t(s, memory);

    pack_rows(head<T>(a.v, b, h), a.v.row, s.columns, s.depth_v, t.values, t.ldv);
    const float* correction = a.correction ? a.correction + 3 * h : nullptr;
    if (correction) mean_of_rows(t.values, s.columns, t.ldv, t.mean);
    Epilogue<T> epilogue = {head<T>(a.out, b, h), a.out.row, s.depth_v, t.ldv,
                            t.values,             t.mean,    correction};
    const T* map = head<T>(a.map, b, donor);

    int64_t end = split.first(task % split.parts + 1);
    for (int64_t i = split.first(task % split.parts); i < end; i += BLOCK) {
        int64_t rows = smaller(BLOCK, end - i);
        Matrix p = float_rows(map + i * a.map.row, a.map.row, rows, s.columns, t.map_rows, t.ldn);
        gemm(rows, t.ldv, s.columns, p, t.values, t.ldv, t.block, t.ldv, false);
        epilogue.write(t.block, nullptr, i, rows);
    }
}

template <typename T>
void attention_as(const AttentionArgs& a) {
    int64_t heads = a.size.batch * a.size.heads;
    RowSplit split(heads, a.size.rows, a.threads);
    parallel_tasks(heads * split.parts, a.threads, AttentionScratch(a.size, nullptr).floats,
                   [&](int64_t task, float* memory) { attention_task<T>(a, task, split, memory); });
}

template <typename T>
void apply_as(const ApplyArgs& a) {
    int64_t heads = a.size.batch * a.size.heads;
    RowSplit split(heads, a.size.rows, a.threads);
    parallel_tasks(heads * split.parts, a.threads, ApplyScratch(a.size, nullptr).floats,
                   [&](int64_t task, float* memory) { apply_task<T>(a, task, split, memory); });
}

}  // namespace

void attention(const AttentionArgs& a) {
    a.dtype == Dtype::float32 ? attention_as<float>(a) : attention_as<bf16>(a);
}

void apply(const ApplyArgs& a) {
    a.dtype == Dtype::float32 ? apply_as<float>(a) : apply_as<bf16>(a);
}

}  // namespace psvit::PSVIT_ISA
