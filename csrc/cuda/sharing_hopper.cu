// A whole sharing layer up to its projection, on sm_90a: O = P V, V = LayerNorm(x) W^T + b, for at
// most 256 tokens and 64 numbers a head. V never leaves shared memory.
//
// LayerNorm is folded into what follows the product: with the norm's weight in W, row n of V is
// (x[n] W^T - mean[n] sums(W)) / std[n] + b; mean and std are found while the tensor cores work on
// the same boxes of x. Both products, x by W and P by V, stream their left side through one ring,
// a box of 64 columns of all rows after the other.
#include "fragments.h"
#include "hopper.h"
#include "schedule.h"

namespace psvit::cuda {
namespace {

constexpr int TILES = 4, TILES_OF_WARPGROUP = TILES / WARPGROUPS;  // of 64 rows
constexpr int TILE = 64 * ROW_BYTES;                               // 64 rows of a box
constexpr int EPILOGUE = 1;  // barrier of the warpgroups that multiply

// Shared memory: a ring of boxes of x or P with one of W each, V, barriers.
struct Memory {
    static constexpr int STAGES = 4, STAGE = (TILES + 1) * TILE;
    static constexpr int V = STAGES * STAGE, BARRIERS = V + TILES * TILE;
    static constexpr int BYTES = BARRIERS + 16 * STAGES;

    static PSVIT_HOST_DEVICE int full(int stage) { return BARRIERS + 16 * stage; }
    static PSVIT_HOST_DEVICE int empty(int stage) { return full(stage) + 8; }
};
static_assert(Memory::BYTES <= ApplyMemory::MOST);

struct Parameters {
    TensorMap x_boxes, weight_boxes, map_boxes;
    int items, heads, tokens, channels, dim;
    int row_boxes_bytes;  // of 64 columns of all rows
    bool one_map;
    float eps;
    const float* weight_sums;
    const float* bias;
    void* out;
};

// --- the thread that copies ---------------------------------------------------------------------

PSVIT_DEVICE void copy(const Parameters& p, u32 base) {
    Place ring;
    const auto next = [&](int bytes) {
        mbarrier_wait(base + Memory::empty(ring.stage), ring.parity ^ 1);
        mbarrier_arrive_expect(base + Memory::full(ring.stage), bytes);
        return base + ring.stage * Memory::STAGE;
    };
    for (int i = blockIdx.x; i < p.items; i += gridDim.x) {
        const int batch = i / p.heads, head = i % p.heads;
        for (int channel = 0; channel < p.channels; channel += 64) {
            const u32 to = next(p.row_boxes_bytes + TILE), full = base + Memory::full(ring.stage);
            tma_load(to, p.x_boxes, full, channel, 0, 0, batch);
            tma_load(to + TILES * TILE, p.weight_boxes, full, channel, head * p.dim, 0, 0);
            ring.advance(Memory::STAGES);
        }
        for (int token = 0; token < p.tokens; token += 64) {
            const u32 to = next(p.row_boxes_bytes), full = base + Memory::full(ring.stage);
            tma_load(to, p.map_boxes, full, token, 0, head, p.one_map ? 0 : batch);
            ring.advance(Memory::STAGES);
        }
    }
}

// --- the warpgroups that multiply ---------------------------------------------------------------

// Rows 64 (warpgroup + 2 i) and on of a product.
struct Accumulators {
    float tile[TILES_OF_WARPGROUP][32];

    PSVIT_DEVICE void hold() {
#pragma unroll
        for (int i = 0; i < TILES_OF_WARPGROUP; ++i) wgmma_hold(tile[i]);
    }
};

// += 64 columns of the box at `rows` times B: its boxes of 16 columns or rows lie `step` apart.
template <Half T, bool TRANSPOSED>
PSVIT_DEVICE void multiply_box(Accumulators& acc, u32 rows, u32 b, int step, bool first) {
#pragma unroll
    for (int i = 0; i < TILES_OF_WARPGROUP; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            wgmma<T, TRANSPOSED>(acc.tile[i],
                                 box_descriptor(rows + i * WARPGROUPS * TILE + 32 * k),
                                 box_descriptor(b + k * step), !first || k > 0);
}

// Sums over a row of x, of which this thread reads one half: row thread / 2 of each tile.
struct RowSums {
    float sum[TILES_OF_WARPGROUP], squares[TILES_OF_WARPGROUP];

    template <Half T>
    PSVIT_DEVICE void add(u32 rows) {
        const int row = threadIdx.x % 128 / 2, half = threadIdx.x % 2;
#pragma unroll
        for (int i = 0; i < TILES_OF_WARPGROUP; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // Neighbouring rows begin with another 16 bytes, for the sake of the banks.
                const int sixteenth = (j + row) % 4 + 4 * half;
                const uint4 eight = load_shared_16(rows + i * WARPGROUPS * TILE + row * ROW_BYTES +
                                                   16 * sixteenth);
                add_pair<T>(i, eight.x), add_pair<T>(i, eight.y);
                add_pair<T>(i, eight.z), add_pair<T>(i, eight.w);
            }
    }
    template <Half T>
    PSVIT_DEVICE void add_pair(int i, u32 pair) {
        const float2 x = unpack<T>(pair);
        sum[i] += x.x + x.y;
        squares[i] += x.x * x.x + x.y * x.y;
    }
    // Mean and 1 / std of row lane / 4 (+ 8) of this warp's 16 rows of a tile.
    PSVIT_DEVICE float2 statistics(int i, int lower, const Parameters& p) const {
        const float mean = (sum[i] + shuffle_xor(sum[i], 1)) / p.channels;
        const float square = (squares[i] + shuffle_xor(squares[i], 1)) / p.channels;
        const float variance = fmaxf(square - mean * mean, 0.0f);
        const float inverse = 1 / sqrtf(variance + p.eps);
        const int keeper = 2 * (threadIdx.x % 32 / 4 + 8 * lower);
        return {shuffle(mean, keeper), shuffle(inverse, keeper)};
    }
};

// x W^T of a head, and the sums of the rows of x.
template <Half T>
PSVIT_DEVICE void project(Accumulators& acc, RowSums& sums, const Parameters& p, u32 base,
                          Place& ring, int warpgroup) {
    sums = {};
    for (int channel = 0; channel < p.channels; channel += 64) {
        const u32 box = base + ring.stage * Memory::STAGE, rows = box + warpgroup * TILE;
        mbarrier_wait(base + Memory::full(ring.stage), ring.parity);
        wgmma_fence();
        multiply_box<T, false>(acc, rows, box + TILES * TILE, 32, channel == 0);
        wgmma_commit();
        sums.add<T>(rows);
        wgmma_wait<0>();
        release(base + Memory::empty(ring.stage));
        ring.advance(Memory::STAGES);
    }
    acc.hold();
}

// Makes V of the products and puts it where the other product reads it: a token's 64 numbers in 128
// bytes, exchanged as box_descriptor expects.
template <Half T>
PSVIT_DEVICE void keep_values(const Accumulators& acc, const RowSums& sums, const Parameters& p,
                              u32 values, int head, int warpgroup) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILES_OF_WARPGROUP; ++i)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const float2 row = sums.statistics(i, lower, p);
            const int token = 64 * (warpgroup + i * WARPGROUPS) +
                              threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * lower;
            const u32 to = values + token * ROW_BYTES + lane % 4 * 4;
#pragma unroll
            for (int block = 0; block < 8; ++block) {
                const int column = 8 * block + 2 * (lane % 4), d = 4 * block + 2 * lower;
                float v[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const bool inside = column + j < p.dim;
                    const int c = head * p.dim + column + j;
                    const float weights = inside ? p.weight_sums[c] : 0;
                    const float bias = inside ? p.bias[c] : 0;
                    v[j] = (acc.tile[i][d + j] - row.x * weights) * row.y + bias;
                }
                store_shared(to + ((block ^ token % 8) * 16), pack<T>(v[0], v[1]));
            }
        }
}

// P V of a head.
template <Half T>
PSVIT_DEVICE void apply(Accumulators& acc, const Parameters& p, u32 base, Place& ring,
                        int warpgroup) {
    for (int token = 0; token < p.tokens; token += 64) {
        mbarrier_wait(base + Memory::full(ring.stage), ring.parity);
        wgmma_fence();
        multiply_box<T, true>(acc, base + ring.stage * Memory::STAGE + warpgroup * TILE,
                              base + Memory::V + token * ROW_BYTES, 16 * ROW_BYTES, token == 0);
        wgmma_commit();
        wgmma_wait<0>();
        release(base + Memory::empty(ring.stage));
        ring.advance(Memory::STAGES);
    }
    acc.hold();
}

template <Half T>
PSVIT_DEVICE void store(const Accumulators& acc, const Parameters& p, int batch, int head,
                        int warpgroup) {
#pragma unroll
    for (int i = 0; i < TILES_OF_WARPGROUP; ++i)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int token = 64 * (warpgroup + i * WARPGROUPS) + threadIdx.x % 128 / 32 * 16 +
                              threadIdx.x % 32 / 4 + 8 * lower;
            auto* out = static_cast<uint16_t*>(p.out) +
                        ((int64_t(batch) * p.tokens + token) * p.heads + head) * p.dim;
            const int columns = token < p.tokens ? p.dim : 0;
#pragma unroll
            for (int block = 0; block < 8; block += 4) {
                u32 pairs[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int d = 4 * (block + j) + 2 * lower;
                    pairs[j] = pack<T>(acc.tile[i][d], acc.tile[i][d + 1]);
                }
                store_halves(out + 8 * block, columns - 8 * block, pairs);
            }
        }
}

template <Half T>
PSVIT_DEVICE void multiply(const Parameters& p, u32 base, int warpgroup) {
    Place ring;
    for (int i = blockIdx.x; i < p.items; i += gridDim.x) {
        const int batch = i / p.heads, head = i % p.heads;
        Accumulators acc;
        RowSums sums;
        project<T>(acc, sums, p, base, ring, warpgroup);
        barrier_sync(EPILOGUE, 32 * MULTIPLYING_WARPS);  // V of the head before is needed no longer
        keep_values<T>(acc, sums, p, base + Memory::V, head, warpgroup);
        proxy_fence();
        barrier_sync(EPILOGUE, 32 * MULTIPLYING_WARPS);
        apply<T>(acc, p, base, ring, warpgroup);
        store<T>(acc, p, batch, head, warpgroup);
    }
}

PSVIT_DEVICE void initialise_barriers(u32 base) {
    for (int i = 0; i < Memory::STAGES; ++i) {
        mbarrier_init(base + Memory::full(i), 1);
        mbarrier_init(base + Memory::empty(i), MULTIPLYING_WARPS);
    }
}

template <Half T>
__global__ void __launch_bounds__(RING_THREADS, 1)
    sharing_hopper_kernel(const __grid_constant__ Parameters p) {
    copy_and_multiply([&](u32 base) { initialise_barriers(base); },
                      [&](u32 base) { copy(p, base); },
                      [&](u32 base, int warpgroup) { multiply<T>(p, base, warpgroup); });
}

}  // namespace

void sharing_hopper(const SharingArgs& a, Launch where) {
    if (!a.batch || !a.heads) return;
    Parameters p = {};
    const auto describe = [&](TensorMap& map, const TensorShape& shape) {
        const char* trouble = encode(map, shape);
        if (trouble) refuse("sharing_hopper", shape_of(a), trouble);
    };
    const int rows = ceil_div(a.tokens, 64) * 64;
    const Tensor4 x = {const_cast<void*>(a.x), a.x_stride_b, 0, a.x_stride_n};
    const Tensor4 weight = {const_cast<void*>(a.weight), 0, 0, a.channels};
    describe(p.x_boxes, tensor_shape(x, 2, a.channels, a.tokens, 1, a.batch, rows));
    describe(p.weight_boxes, tensor_shape(weight, 2, a.channels, a.heads * a.dim, 1, 1, 64));
    describe(p.map_boxes,
             tensor_shape(a.map, 2, a.tokens, a.tokens, a.heads, a.map_batch, rows));
    p.items = a.batch * a.heads, p.heads = a.heads, p.tokens = a.tokens;
    p.channels = a.channels, p.dim = a.dim, p.row_boxes_bytes = rows * ROW_BYTES;
    p.one_map = a.map_batch == 1, p.eps = a.eps;
    p.weight_sums = a.weight_sums, p.bias = a.bias, p.out = a.out;
    const int sms = multiprocessors(where.device);
    const Grid grid = {p.items < sms ? p.items : sms, RING_THREADS, Memory::BYTES};
    if (a.dtype == Half::bfloat16)
        launch("sharing_hopper", a, sharing_hopper_kernel<Half::bfloat16>, grid, where, p);
    else
        launch("sharing_hopper", a, sharing_hopper_kernel<Half::float16>, grid, where, p);
}

}  // namespace psvit::cuda
