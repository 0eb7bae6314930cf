// O = P V from a stored map, on every GPU from sm_80 on: cp.async, mma.sync.
//
// A block makes 128 rows of O of one head. Pieces of 64 columns of P and the 64 rows of V that
// belong to them pass through a ring in shared memory; each of four warps multiplies 32 rows.
#include "ampere.h"
#include "codes.h"
#include "fragments.h"
#include "launch.h"

namespace psvit::cuda {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int WARP_ROWS = 32, ROWS = WARPS * WARP_ROWS, COLUMNS = 64;

// One stage of the ring: a tile of the map, then the tokens of V.
template <Code CODE, int DIM>
struct Stage {
    static constexpr int MAP_UNITS = CODE == Code::half ? 8 : 4, MAP_BYTES = ROWS * MAP_UNITS * 16;
    static constexpr int V_UNITS = DIM / 8, BYTES = MAP_BYTES + COLUMNS * V_UNITS * 16;
    // Columns of the map that a lane has side by side in a fragment.
    static constexpr int RUN = CODE == Code::half ? 2 : 4;
    // Two blocks of all of them fit in the shared memory of a multiprocessor.
    static constexpr int STAGES = MAP_UNITS == 8 && V_UNITS == 16 ? 2 : 3;
};

// The rows of one block: where its map and V start, and which rows of O are its own.
template <Code CODE>
struct Head {
    static constexpr int MAP_ELEMENT = CODE == Code::half ? 2 : 1;

    const ApplyArgs& a;
    int64_t batch, head, donor, map_batch;
    int first_row;

    PSVIT_DEVICE explicit Head(const ApplyArgs& args) : a(args) {
        const Part part = part_of(blockIdx.x, a.heads, ceil_div(a.rows, ROWS));
        batch = part.batch, head = part.head, first_row = part.index * ROWS;
        donor = a.head_index ? a.head_index[head] : head;
        map_batch = a.map_batch == 1 ? 0 : batch;
    }
    PSVIT_DEVICE const char* map() const {
        const int64_t offset = map_batch * a.map.stride_b + donor * a.map.stride_h +
                               first_row * a.map.stride_n;
        return static_cast<const char*>(a.map.data) + offset * MAP_ELEMENT;
    }
    PSVIT_DEVICE float row_scale(int row) const {
        const Tensor4& t = a.row_scale;
        const int64_t offset = map_batch * t.stride_b + donor * t.stride_h + row * t.stride_n;
        return static_cast<const float*>(t.data)[offset];
    }
    PSVIT_DEVICE const uint16_t* v(int64_t token) const {
        const int64_t offset = batch * a.v.stride_b + head * a.v.stride_h + token * a.v.stride_n;
        return static_cast<const uint16_t*>(a.v.data) + offset;
    }
    PSVIT_DEVICE uint16_t* out(int row) const {
        return static_cast<uint16_t*>(a.out) + ((batch * a.rows + row) * a.heads + head) * a.dim;
    }
};

// Starts the copies of a piece of the map and of its rows of V, zeros beyond them.
template <Code CODE, int DIM>
PSVIT_DEVICE void fetch(const Head<CODE>& head, u32 stage, int piece) {
    using S = Stage<CODE, DIM>;
    const ApplyArgs& a = head.a;
    const int column = piece * COLUMNS;
    constexpr int element = Head<CODE>::MAP_ELEMENT;
    copy_tile<THREADS, ROWS, S::MAP_UNITS>(stage, head.map() + int64_t(column) * element,
                                           a.map.stride_n * element, a.rows - head.first_row,
                                           (a.map_pitch - column) * element / 16);
    copy_tile<THREADS, COLUMNS, S::V_UNITS>(stage + S::MAP_BYTES, head.v(column),
                                            a.v.stride_n * 2, a.tokens - column, a.dim / 8);
}

// A of the 32 rows of this warp and 16 columns of a tile of the map.
template <Half T, Code CODE>
PSVIT_DEVICE void load_map(u32 (&p)[2][4], u32 tile, int step) {
    const int warp_row = threadIdx.x / 32 * WARP_ROWS, lane = threadIdx.x % 32;
    if constexpr (CODE == Code::half) {
        const int of_lane = unit_at<8>(warp_row + fragment_row(lane), fragment_unit(lane));
#pragma unroll
        for (int m = 0; m < 2; ++m)
            ldmatrix_x4(p[m], tile + (of_lane ^ unit_at<8>(16 * m, 2 * step)));
    } else {
        // Bytes as if they were halves: a lane gets four codes of each eight rows.
        u32 codes[4];
        ldmatrix_x4(codes, tile + (unit_at<4>(warp_row + lane, 0) ^ unit_at<4>(0, step)));
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                p[m][half] = decode2<T, CODE, 0>(codes[2 * m + half]);
                p[m][half + 2] = decode2<T, CODE, 1>(codes[2 * m + half]);
            }
    }
}

// What a warp accumulates: P V of its 32 rows, and the sums of the columns of V.
template <Half T, Code CODE, int DIM, bool CORRECTED>
struct Accumulators {
    float pv[2][DIM / 8][4] = {};
    // Of 16 columns each: sums of the first eight in the upper rows, of the others in the lower.
    float sums[CORRECTED ? DIM / 16 : 1][4] = {};

    PSVIT_DEVICE void add(u32 stage, int columns) {
        using S = Stage<CODE, DIM>;
        const int lane = threadIdx.x % 32;
        const u32 one = both<T>(1.0f);
        const u32 upper[4] = {one, 0, one, 0}, lower[4] = {0, one, 0, one};
#pragma unroll
        for (int step = 0; step < COLUMNS / 16; ++step) {
            if (step * 16 >= columns) break;
            u32 p[2][4];
            load_map<T, CODE>(p, stage, step);
#pragma unroll
            for (int pair = 0; pair < DIM / 16; ++pair) {
                u32 v[4];
                load_values<S::V_UNITS>(v, stage + S::MAP_BYTES, lane, S::RUN, step * 16, pair);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma<T>(pv[m][2 * pair], p[m], v[0], v[1]);
                    mma<T>(pv[m][2 * pair + 1], p[m], v[2], v[3]);
                }
                if constexpr (CORRECTED) {
                    mma<T>(sums[pair], upper, v[0], v[1]);
                    mma<T>(sums[pair], lower, v[2], v[3]);
                }
            }
        }
    }
};

// Writes the rows of this warp: P V, or alpha (P V) + beta V + gamma mean(V).
template <Half T, Code CODE, int DIM, bool CORRECTED>
PSVIT_DEVICE void store(const Accumulators<T, CODE, DIM, CORRECTED>& c, const Head<CODE>& head) {
    const ApplyArgs& a = head.a;
    float alpha = 1, beta = 0, gamma = 0;
    if constexpr (CORRECTED) {
        const float* correction = a.correction + head.head * 3;
        alpha = correction[0], beta = correction[1], gamma = correction[2] / a.tokens;
    }
#pragma unroll
    for (int part = 0; part < WARP_ROWS / 8; ++part) {
        const int m = part / 2, half = part % 2 * 2;
        const int row = head.first_row + threadIdx.x / 32 * WARP_ROWS + part * 8 +
                        threadIdx.x % 32 / 4;
        const bool inside = row < a.rows;
        float scale = alpha;
        if constexpr (CODE != Code::half) scale *= inside ? head.row_scale(row) : 0.0f;
#pragma unroll
        for (int group = 0; group < DIM / 32; ++group) {
            const int end = inside ? a.dim - group * 32 : 0;
            u32 own[4], pairs[4];
            if constexpr (CORRECTED) load_halves(head.v(row) + group * 32, end, own);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* pv = c.pv[m][group * 4 + j] + half;
                float x = pv[0] * scale, y = pv[1] * scale;
                if constexpr (CORRECTED) {
                    const float* sum = c.sums[group * 2 + j / 2] + j % 2 * 2;
                    const float2 v = unpack<T>(own[j]);
                    x += beta * v.x + gamma * sum[0];
                    y += beta * v.y + gamma * sum[1];
                }
                pairs[j] = pack<T>(x, y);
            }
            store_halves(head.out(row) + group * 32, end, pairs);
        }
    }
}

template <Half T, Code CODE, int DIM, bool CORRECTED>
__global__ void __launch_bounds__(THREADS, 2) apply_kernel(const __grid_constant__ ApplyArgs a) {
    PSVIT_SHARED(memory);
    const u32 ring = shared_address(memory);
    constexpr int STAGES = Stage<CODE, DIM>::STAGES;
    const auto stage = [&](int piece) { return ring + piece % STAGES * Stage<CODE, DIM>::BYTES; };
    const Head<CODE> head(a);
    const int pieces = ceil_div(a.tokens, COLUMNS);
    for (int piece = 0; piece < STAGES - 1; ++piece) {
        if (piece < pieces) fetch<CODE, DIM>(head, stage(piece), piece);
        copy_async_commit();
    }
    Accumulators<T, CODE, DIM, CORRECTED> c;
    for (int piece = 0; piece < pieces; ++piece) {
        copy_async_wait<STAGES - 2>();
        // Everybody's copies of this piece are there, and nobody reads the stage refilled below.
        block_sync();
        const int next = piece + STAGES - 1;
        if (next < pieces) fetch<CODE, DIM>(head, stage(next), next);
        copy_async_commit();
        c.add(stage(piece), a.tokens - piece * COLUMNS);
    }
    store(c, head);
}

template <Half T, Code CODE, int DIM, bool CORRECTED>
void run(const ApplyArgs& a, Launch where) {
    const Grid grid = {a.batch * a.heads * ceil_div(a.rows, ROWS), THREADS,
                       Stage<CODE, DIM>::STAGES * Stage<CODE, DIM>::BYTES};
    launch("apply_ampere", a, apply_kernel<T, CODE, DIM, CORRECTED>, grid, where, a);
}

template <Half T, Code CODE>
void choose(const ApplyArgs& a, Launch where) {
    if (a.dim <= 64)
        a.correction ? run<T, CODE, 64, true>(a, where) : run<T, CODE, 64, false>(a, where);
    else
        a.correction ? run<T, CODE, 128, true>(a, where) : run<T, CODE, 128, false>(a, where);
}

template <Half T>
void choose(const ApplyArgs& a, Launch where) {
    switch (a.code) {
        case Code::half: return choose<T, Code::half>(a, where);
        case Code::uint8: return choose<T, Code::uint8>(a, where);
        case Code::e4m3: return choose<T, Code::e4m3>(a, where);
    }
}

}  // namespace

void apply_ampere(const ApplyArgs& a, Launch where) {
    if (a.batch == 0 || a.heads == 0 || a.rows == 0 || a.dim == 0) return;
    a.dtype == Half::bfloat16 ? choose<Half::bfloat16>(a, where) : choose<Half::float16>(a, where);
}

}  // namespace psvit::cuda
