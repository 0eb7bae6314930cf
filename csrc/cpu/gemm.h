// Small matrix products on packed operands: C = A B or C += A B, in float32.
//
// A is read one element at a time and broadcast, so it may have any strides (a transposed A costs
// nothing). B and C have rows of a multiple of W floats. A tile of C lives in registers: with
// 6 x 4 vectors, one step of k takes 10 loads for 24 fused multiply-adds, so the arithmetic units
// are the limit, not the loads.
#pragma once

#include "simd.h"

namespace psvit::PSVIT_ISA {

struct Matrix {
    const float* at;
    int64_t row, col;  // strides in elements
};

template <int ROWS, int VECS>
PSVIT_INLINE void gemm_tile(Matrix a, const float* b, int64_t ldb, int64_t depth, float* c,
                            int64_t ldc, bool accumulate) {
    vf acc[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) acc[r][v] = accumulate ? load(c + r * ldc + v * W) : vf{};
    for (int64_t k = 0; k < depth; k++) {
        vf row[VECS];
        for (int v = 0; v < VECS; v++) row[v] = load(b + k * ldb + v * W);
        for (int r = 0; r < ROWS; r++) {
            float x = a.at[r * a.row + k * a.col];
            for (int v = 0; v < VECS; v++) acc[r][v] += x * row[v];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECS; v++) store(c + r * ldc + v * W, acc[r][v]);
}

template <int VECS>
static void gemm_columns(int64_t rows, Matrix a, const float* b, int64_t ldb, int64_t depth,
                         float* c, int64_t ldc, bool accumulate) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
        gemm_tile<TILE_ROWS, VECS>({a.at + r * a.row, a.row, a.col}, b, ldb, depth, c + r * ldc,
                                   ldc, accumulate);
    Matrix rest = {a.at + r * a.row, a.row, a.col};
    float* c_rest = c + r * ldc;
    switch (rows - r) {
        case 5: gemm_tile<5, VECS>(rest, b, ldb, depth, c_rest, ldc, accumulate); break;
        case 4: gemm_tile<4, VECS>(rest, b, ldb, depth, c_rest, ldc, accumulate); break;
        case 3: gemm_tile<3, VECS>(rest, b, ldb, depth, c_rest, ldc, accumulate); break;
        case 2: gemm_tile<2, VECS>(rest, b, ldb, depth, c_rest, ldc, accumulate); break;
        case 1: gemm_tile<1, VECS>(rest, b, ldb, depth, c_rest, ldc, accumulate); break;
        default: break;
    }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or += ; columns is a multiple of W.
static void gemm(int64_t rows, int64_t columns, int64_t depth, Matrix a, const float* b,
                 int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    int64_t vecs = columns / W;
    int64_t tiles = (vecs + TILE_VECS - 1) / TILE_VECS;
    for (int64_t t = 0, v = 0; t < tiles; t++) {
        int64_t width = (vecs - v + tiles - t - 1) / (tiles - t);  // as even as possible
        const float* bt = b + v * W;
        float* ct = c + v * W;
        switch (width) {
#if defined(__AVX512F__)
            case 4: gemm_columns<4>(rows, a, bt, ldb, depth, ct, ldc, accumulate); break;
            case 3: gemm_columns<3>(rows, a, bt, ldb, depth, ct, ldc, accumulate); break;
#endif
            case 2: gemm_columns<2>(rows, a, bt, ldb, depth, ct, ldc, accumulate); break;
            default: gemm_columns<1>(rows, a, bt, ldb, depth, ct, ldc, accumulate); break;
        }
        v += width;
    }
}

// --- packing ---------------------------------------------------------------------------------

// (rows, columns) with unit stride on columns -> float32 rows of `ld`, zero beyond `columns`.
template <typename T>
static void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                      int64_t ld) {
    for (int64_t r = 0; r < rows; r++) {
        const T* row = from + r * stride;
        int64_t c = 0;
        for (; c < columns; c += W) store(to + r * ld + c, load_upto(row + c, columns - c));
        for (; c < ld; c += W) store(to + r * ld + c, vf{});
    }
}

typedef float v4 __attribute__((vector_size(16)));
typedef float v4_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

PSVIT_INLINE v4 load4(const float* p) { return *(const v4_unaligned*)p; }
PSVIT_INLINE v4 load4(const bf16* p) {
    return v4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

// (rows, columns) -> its transpose, float32, rows of `ld` >= rows; zero beyond.
template <typename T>
static void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns,
                            float* to, int64_t ld) {
    typedef int32_t m4 __attribute__((vector_size(16)));
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const T* p = from + r * stride;
        float* q = to + r;
        int64_t c = 0;
        for (; c + 4 <= columns; c += 4) {
            v4 a = load4(p + c), b = load4(p + stride + c);
            v4 d = load4(p + 2 * stride + c), e = load4(p + 3 * stride + c);
            v4 ab_lo = __builtin_shuffle(a, b, m4{0, 4, 1, 5});
            v4 ab_hi = __builtin_shuffle(a, b, m4{2, 6, 3, 7});
            v4 de_lo = __builtin_shuffle(d, e, m4{0, 4, 1, 5});
            v4 de_hi = __builtin_shuffle(d, e, m4{2, 6, 3, 7});
            *(v4_unaligned*)(q + (c + 0) * ld) = __builtin_shuffle(ab_lo, de_lo, m4{0, 1, 4, 5});
            *(v4_unaligned*)(q + (c + 1) * ld) = __builtin_shuffle(ab_lo, de_lo, m4{2, 3, 6, 7});
            *(v4_unaligned*)(q + (c + 2) * ld) = __builtin_shuffle(ab_hi, de_hi, m4{0, 1, 4, 5});
            *(v4_unaligned*)(q + (c + 3) * ld) = __builtin_shuffle(ab_hi, de_hi, m4{2, 3, 6, 7});
        }
        for (; c < columns; c++)
            for (int i = 0; i < 4; i++) q[c * ld + i] = to_float(p[i * stride + c]);
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * ld + r] = to_float(from[r * stride + c]);
    for (int64_t c = 0; c < columns; c++)
        for (int64_t i = rows; i < ld; i++) to[c * ld + i] = 0.0f;
}

}  // namespace psvit::PSVIT_ISA
