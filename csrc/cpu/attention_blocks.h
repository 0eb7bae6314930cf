// What the forward and backward of attention do to a block of rows of scores.
#pragma once

#include <cmath>

#include "../parallel.h"
#include "gemm.h"
#include "kernels.h"

namespace psvit::PSVIT_ISA {

template <typename T>
PSVIT_INLINE T* head(const View& view, int64_t b, int64_t h) {
    return (T*)view.data + b * view.batch + h * view.head;
}

// Columns of a row of scores in scratch memory: whole vectors, and never less than the pitch of a
// stored row of either dtype.
PSVIT_INLINE int64_t padded_columns(int64_t columns) { return round_up(columns, W < 8 ? 8 : W); }

// Pieces of a thread's scratch memory, each aligned to 64 bytes. Without memory it only counts.
class Arena {
public:
    explicit Arena(float* memory) : memory_(memory) {}
    float* take(int64_t floats) {
        float* piece = memory_ ? memory_ + used : nullptr;
        used += round_up(floats, 16);
        return piece;
    }
    int64_t used = 0;

private:
    float* memory_;
};

// Rows as floats that gemm can read: in place for float32, else converted into `to`.
PSVIT_INLINE Matrix float_rows(const float* from, int64_t stride, int64_t, int64_t, float*,
                               int64_t) {
    return {from, stride, 1};
}
PSVIT_INLINE Matrix float_rows(const bf16* from, int64_t stride, int64_t rows, int64_t columns,
                               float* to, int64_t ld) {
    pack_rows(from, stride, rows, columns, to, ld);
    return {to, ld, 1};
}

// scores * scale + bias of vector c of a row; minus infinity beyond the last column.
template <typename T>
PSVIT_INLINE vf finished_score(const float* row, int64_t c, int64_t columns, float scale,
                               const T* bias) {
    vf x = load(row + c) * scale;
    if (bias) x += load_upto(bias + c, columns - c);
    if (columns - c < W) x = lane_numbers() < int32_t(columns - c) ? x : splat(-INFINITY);
    return x;
}

// Scores become exp(score - max of the row); `inverse` gets 1 / sum, `lse` the log-sum-exp.
template <typename T>
static void softmax_rows(float* scores, int64_t ld, int64_t rows, int64_t columns, float scale,
                         const T* bias, int64_t bias_row, float* inverse, float* lse) {
    for (int64_t r = 0; r < rows; r++) {
        float* row = scores + r * ld;
        const T* bias_of_row = bias ? bias + r * bias_row : nullptr;
        vf highest = splat(-INFINITY);
        for (int64_t c = 0; c < ld; c += W) {
            vf x = finished_score(row, c, columns, scale, bias_of_row);
            highest = maximum(x, highest);
            store(row + c, x);
        }
        float top = max_lanes(highest);
        vf total = {};
        for (int64_t c = 0; c < ld; c += W) {
            vf x = exponential(load(row + c) - top);
            total += x;
            store(row + c, x);
        }
        float sum = sum_lanes(total);
        inverse[r] = 1.0f / sum;
        lse[r] = top + logf(sum);
    }
}

// Scores become the probabilities exp(score - lse).
template <typename T>
static void rebuild_rows(float* scores, int64_t ld, int64_t rows, int64_t columns, float scale,
                         const T* bias, int64_t bias_row, const float* lse) {
    for (int64_t r = 0; r < rows; r++) {
        float* row = scores + r * ld;
        const T* bias_of_row = bias ? bias + r * bias_row : nullptr;
        for (int64_t c = 0; c < ld; c += W)
            store(row + c, exponential(finished_score(row, c, columns, scale, bias_of_row) -
                                       lse[r]));
    }
}

// Scratch memory for a block of rows of a map.
struct MapScratch {
    int64_t ldn, ldd;
    float *keys, *queries, *rows;

    MapScratch(const Sizes& s, int64_t block, Arena& arena)
        : ldn(padded_columns(s.columns)), ldd(round_up(s.depth, W)) {
        keys = arena.take(s.depth * ldn);  // (d, N), transposed
        queries = arena.take(block * ldd);
        rows = arena.take(block * ldn);
    }
};

// One head of a map, read a block of rows at a time.
template <typename T>
struct MapHead {
    const Map& map;
    const Sizes& size;
    const MapScratch& t;
    int64_t b, h;

    void pack_keys() const {
        pack_transposed(head<T>(map.k, b, h), map.k.row, size.columns, size.depth, t.keys, t.ldn);
    }

    const T* bias(int64_t first) const {
        return map.bias.data ? head<T>(map.bias, b, h) + first * map.bias.row : nullptr;
    }

    float* lse(int64_t first) const { return head<float>(map.lse, b, h) + first; }

    // q k^T in t.rows. Needs the packed keys.
    void scores(int64_t first, int64_t rows) const {
        const T* q = head<T>(map.q, b, h) + first * map.q.row;
        Matrix queries = float_rows(q, map.q.row, rows, size.depth, t.queries, t.ldd);
        gemm(rows, t.ldn, size.depth, queries, t.keys, t.ldn, t.rows, t.ldn, false);
    }

    // P in t.rows, zero beyond its columns. Needs the packed keys unless the map is stored.
    void read(int64_t first, int64_t rows) const {
        if (map.stored.data)
            return pack_rows(stored(first), map.stored.row, rows, size.columns, t.rows, t.ldn);
        scores(first, rows);
        rebuild_rows(t.rows, t.ldn, rows, size.columns, map.scale, bias(first), map.bias.row,
                     lse(first));
    }

    // P where it lies, if it can be read there. For products along its rows: the transpose takes
    // a step of a row at every load, which is slow where the cache has none of it yet.
    Matrix in_place(int64_t first, int64_t rows) const {
        if (map.stored.data)
            return float_rows(stored(first), map.stored.row, rows, size.columns, t.rows, t.ldn);
        read(first, rows);
        return {t.rows, t.ldn, 1};
    }

    const T* stored(int64_t first) const {
        return head<T>(map.stored, b, h) + first * map.stored.row;
    }
};

// Writes normalised rows in the map's own pitch; its padding gets the zeros beyond `columns`.
template <typename T>
static void store_map(const float* exps, int64_t ld, int64_t rows, int64_t columns,
                      const float* inverse, T* map, int64_t pitch) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < pitch; c += W) {
            vf x = load(exps + r * ld + c) * inverse[r];
            if (columns - c < W) x = lane_numbers() < int32_t(columns - c) ? x : vf{};
            store_upto(map + r * pitch + c, x, pitch - c);
        }
}

}  // namespace psvit::PSVIT_ISA
