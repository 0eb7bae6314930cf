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

// Cuts the rows of every head into equal parts where whole heads would leave threads idle.
struct RowSplit {
    int64_t rows, parts = 1;

    RowSplit(int64_t heads, int64_t rows_, int threads) : rows(rows_) {
        if (heads == 0) return;
        auto wasteful = [&] {
            int64_t tasks = heads * parts;
            return (tasks + threads - 1) / threads * threads * 10 > tasks * 11;
        };
        while (wasteful() && parts < 8 && rows >= 32 * (parts + 1)) parts++;
    }
    int64_t first(int64_t part) const { return rows * part / parts; }
};

struct Scratch {
    Arena arena;
    MapScratch map;
    int64_t ldv;
    float *values, *mean, *block;

    Scratch(const Sizes& s, float* memory)
        : arena(memory), map(s, BLOCK, arena), ldv(round_up(s.depth_v, W)) {
        values = arena.take(s.columns * ldv);
        mean = arena.take(ldv);
        block = arena.take(BLOCK * ldv);
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

// One head of O = alpha P V + beta V + gamma mean(V); without a correction the first term alone.
template <typename T>
struct OutputHead {
    const Sizes& size;
    const Scratch& t;
    T* out;
    int64_t out_row;
    const float* correction;  // alpha, beta, gamma, or null

    void pack_values(const View& v, int64_t b, int64_t h) const {
        pack_rows(head<T>(v, b, h), v.row, size.columns, size.depth_v, t.values, t.ldv);
        if (correction) mean_of_rows(t.values, size.columns, t.ldv, t.mean);
    }

    // P is multiplied by `row_scale`, if there is one.
    void write(Matrix p, const float* row_scale, int64_t first, int64_t rows) const {
        gemm(rows, t.ldv, size.columns, p, t.values, t.ldv, t.block, t.ldv, false);
        for (int64_t r = 0; r < rows; r++) {
            float s = row_scale ? row_scale[r] : 1.0f;
            if (correction) s *= correction[0];
            T* to = out + (first + r) * out_row;
            for (int64_t c = 0; c < size.depth_v; c += W) {
                vf x = load(t.block + r * t.ldv + c) * s;
                if (correction)
                    x += correction[1] * load(t.values + (first + r) * t.ldv + c) +
                         correction[2] * load(t.mean + c);
                store_upto(to + c, x, size.depth_v - c);
            }
        }
    }
};

template <typename T>
void attention_rows(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end,
                    float* memory) {
    Scratch t(a.size, memory);
    MapHead<T> map = {a.map, a.size, t.map, b, h};
    OutputHead<T> output = {a.size, t, head<T>(a.out, b, h), a.out.row, nullptr};
    map.pack_keys();
    output.pack_values(a.v, b, h);
    for (int64_t i = begin; i < end; i += BLOCK) {
        int64_t rows = smaller(BLOCK, end - i);
        float inverse[BLOCK];
        map.scores(i, rows);
        softmax_rows(t.map.rows, t.map.ldn, rows, a.size.columns, a.map.scale, map.bias(i),
                     a.map.bias.row, inverse, map.lse(i));
        if (a.map.stored.data)
            store_map(t.map.rows, t.map.ldn, rows, a.size.columns, inverse,
                      head<T>(a.map.stored, b, h) + i * a.map.stored.row, a.map_pitch);
        output.write({t.map.rows, t.map.ldn, 1}, inverse, i, rows);
    }
}

template <typename T>
void apply_rows(const ApplyArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end,
                float* memory) {
    Scratch t(a.size, memory);
    MapHead<T> map = {a.map, a.size, t.map, b, a.head_index ? a.head_index[h] : h};
    OutputHead<T> output = {a.size, t, head<T>(a.out, b, h), a.out.row,
                            a.correction ? a.correction + 3 * h : nullptr};
    if (!a.map.stored.data) map.pack_keys();
    output.pack_values(a.v, b, h);
    for (int64_t i = begin; i < end; i += BLOCK) {
        int64_t rows = smaller(BLOCK, end - i);
        output.write(map.in_place(i, rows), nullptr, i, rows);
    }
}

// Calls rows_of_head(a, b, h, first row, end, scratch memory) until all rows of all heads are done.
template <typename Args>
void parallel_heads(const Args& a, void (*rows_of_head)(const Args&, int64_t, int64_t, int64_t,
                                                        int64_t, float*)) {
    const Sizes& s = a.size;
    int64_t heads = s.batch * s.heads;
    RowSplit split(heads, s.rows, a.threads);
    parallel_tasks(heads * split.parts, a.threads, Scratch(s, nullptr).arena.used,
                   [&](int64_t task, float* memory) {
                       int64_t unit = task / split.parts, part = task % split.parts;
                       rows_of_head(a, unit / s.heads, unit % s.heads, split.first(part),
                                    split.first(part + 1), memory);
                   });
}

}  // namespace

void attention(const AttentionArgs& a) {
    parallel_heads(a, a.dtype == Dtype::float32 ? attention_rows<float> : attention_rows<bf16>);
}

void apply(const ApplyArgs& a) {
    parallel_heads(a, a.dtype == Dtype::float32 ? apply_rows<float> : apply_rows<bf16>);
}

}  // namespace psvit::PSVIT_ISA
