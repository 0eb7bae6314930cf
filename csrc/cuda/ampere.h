// What the kernels for every GPU from sm_80 on share: tiles in shared memory as operands.
#pragma once
#include "ptx.h"
#include "tiles.h"

namespace psvit::cuda {

// Starts the copies of rows that are `stride` bytes apart into a tile of ROWS rows of UNITS units.
// Rows from `rows` and units from `units` on become zeros.
template <int THREADS, int ROWS, int UNITS>
PSVIT_DEVICE void copy_tile(u32 tile, const void* from, int64_t stride, int rows, int units) {
    constexpr int AT_ONCE = THREADS / UNITS;
    static_assert(ROWS % AT_ONCE == 0);
    const int unit = threadIdx.x % UNITS;
    int row = threadIdx.x / UNITS;
    const char* source = static_cast<const char*>(from) + row * stride + unit * 16;
#pragma unroll
    for (int i = 0; i < ROWS / AT_ONCE; ++i) {
        const bool inside = row < rows && unit < units;
        copy_async(tile + unit_at<UNITS>(row, unit), inside ? source : from, inside);
        row += AT_ONCE, source += AT_ONCE * stride;
    }
}

// B of 16 tokens, in the order of runs, and of 16 columns (units 2 PAIR and 2 PAIR + 1) of a tile
// whose rows are tokens: b[0], b[1] of the first eight columns, b[2], b[3] of the others.
template <int UNITS>
PSVIT_DEVICE void load_values(u32 (&b)[4], u32 tile, int lane, int run, int first_number,
                              int pair) {
    const int of_lane = unit_at<UNITS>(column_of(run, fragment_row(lane)), fragment_unit(lane));
    ldmatrix_x4_transposed(
        b, tile + (of_lane ^ unit_at<UNITS>(column_of(run, first_number), 2 * pair)));
}

}  // namespace psvit::cuda
