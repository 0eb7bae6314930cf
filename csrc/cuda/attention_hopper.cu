// O = P V with P = softmax(scale Q K^T) and P itself, for rows of at most 272 columns, on sm_90a.
//
// A block is one warpgroup with the K and V of a head in shared memory. It takes 64 queries at a
// time; all their scores are in registers, so the softmax is exact in one pass, and P leaves for
// memory from where the tensor cores read it. Two or three blocks on a multiprocessor hide each
// other's waits.
#include "codes.h"
#include "fragments.h"
#include "hopper.h"
#include "schedule.h"

namespace psvit::cuda {
namespace {

constexpr int THREADS = 128, ROWS = 64;
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

enum class MapKind { none, dense, uint8, e4m3 };
PSVIT_HOST_DEVICE constexpr bool is_coded(MapKind kind) {
    return kind == MapKind::uint8 || kind == MapKind::e4m3;
}

struct Parameters {
    TensorMap q_boxes, k_boxes, v_boxes;
    Schedule schedule;
    int heads, rows, tokens, value_dim, map_pitch;
    float scale;  // times log2(e)
    void* out;
    void* map;
    float* row_scale;
    float* lse;
};

// Keys that a block has room for; beyond 256, wgmma takes them in two parts.
template <int WIDTH>
struct Keys {
    static constexpr int PARTS = WIDTH > 256 ? 2 : 1, OF_PART = WIDTH / PARTS;
    static constexpr int BOX = WIDTH * ROW_BYTES;  // of 64 numbers of each
    static constexpr int BLOCKS = WIDTH / 8;
    // Keys that are there whenever this width is chosen: no mask.
    static constexpr int CERTAIN = WIDTH > 208 ? 208 : WIDTH > 128 ? 128 : WIDTH > 64 ? 64 : 0;
};

// Shared memory: Q of the 64 queries, K, V, as boxes of 64 numbers; then the barriers.
template <int WIDTH, int HEAD_BOXES>
struct Memory {
    static constexpr int Q_BOX = ROWS * ROW_BYTES, KEY_BOX = Keys<WIDTH>::BOX;
    static constexpr int Q = 0, K = Q + HEAD_BOXES * Q_BOX, V = K + HEAD_BOXES * KEY_BOX;
    static constexpr int Q_FULL = V + HEAD_BOXES * KEY_BOX, V_FULL = Q_FULL + 8;
    static constexpr int BYTES = V_FULL + 8;
};

// --- copies, started by one thread --------------------------------------------------------------

template <int WIDTH, int HEAD_BOXES>
PSVIT_DEVICE void load_keys(u32 to, const TensorMap& boxes, u32 full, const Item& item) {
    for (int box = 0; box < HEAD_BOXES; ++box)
        for (int first = 0; first < WIDTH; first += Keys<WIDTH>::OF_PART)
            tma_load(to + box * Keys<WIDTH>::BOX + first * ROW_BYTES, boxes, full, 64 * box, first,
                     item.head, item.batch);
}

template <int HEAD_BOXES>
PSVIT_DEVICE void load_queries(u32 to, const TensorMap& boxes, u32 full, const Item& item,
                               int tile) {
    for (int box = 0; box < HEAD_BOXES; ++box)
        tma_load(to + box * ROWS * ROW_BYTES, boxes, full, 64 * box, tile * ROWS, item.head,
                 item.batch);
}

template <int WIDTH, int HEAD_BOXES>
PSVIT_DEVICE void start(const Parameters& p, u32 base, const Item& item) {
    using M = Memory<WIDTH, HEAD_BOXES>;
    mbarrier_init(base + M::Q_FULL, 1);
    mbarrier_init(base + M::V_FULL, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(base + M::Q_FULL, M::V - M::Q);  // the first time, K as well
    load_keys<WIDTH, HEAD_BOXES>(base + M::K, p.k_boxes, base + M::Q_FULL, item);
    load_queries<HEAD_BOXES>(base + M::Q, p.q_boxes, base + M::Q_FULL, item, item.first_tile);
    mbarrier_arrive_expect(base + M::V_FULL, M::Q_FULL - M::V);
    load_keys<WIDTH, HEAD_BOXES>(base + M::V, p.v_boxes, base + M::V_FULL, item);
}

// --- scores, and what becomes of them -----------------------------------------------------------

// (64, WIDTH) of float32. Thread: two rows, of which a quad has all columns.
template <int WIDTH>
struct Scores {
    float part[Keys<WIDTH>::PARTS][Keys<WIDTH>::OF_PART / 2];

    // Of 8 columns, in row `lower` 0 or 1, this thread's number i of 2.
    PSVIT_DEVICE float& at(int block, int lower, int i) {
        constexpr int BLOCKS = Keys<WIDTH>::OF_PART / 8;
        return part[block / BLOCKS][4 * (block % BLOCKS) + 2 * lower + i];
    }
    // Whether a block may have columns beyond the last key.
    static PSVIT_DEVICE constexpr bool masked(int block) {
        return 8 * block + 8 > Keys<WIDTH>::CERTAIN;
    }

    template <Half T, int HEAD_BOXES>
    PSVIT_DEVICE void multiply(u32 base) {
        using M = Memory<WIDTH, HEAD_BOXES>;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Keys<WIDTH>::PARTS; ++i)
#pragma unroll
            for (int k = 0; k < 64 * HEAD_BOXES; k += 16) {
                const int box = k / 64, bytes = 2 * (k % 64);
                const int key = i * Keys<WIDTH>::OF_PART;
                wgmma<T, false>(part[i], box_descriptor(base + M::Q + box * M::Q_BOX + bytes),
                                box_descriptor(base + M::K + box * M::KEY_BOX + key * ROW_BYTES +
                                               bytes),
                                k > 0);
            }
        wgmma_commit();
        wgmma_wait<0>();
        hold();
    }
    // What was computed from the scores until here is not kept in case it is needed again.
    PSVIT_DEVICE void hold() {
#pragma unroll
        for (int i = 0; i < Keys<WIDTH>::PARTS; ++i) wgmma_hold(part[i]);
    }

    // -inf in columns beyond the last key; the largest of each row.
    PSVIT_DEVICE float2 mask_and_maximum(int tokens) {
        float2 most = {-INFINITY, -INFINITY};
#pragma unroll
        for (int block = 0; block < Keys<WIDTH>::BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool beyond = masked(block) && column_of(block, i) >= tokens;
                if (beyond) at(block, 0, i) = at(block, 1, i) = -INFINITY;
                most.x = fmaxf(most.x, at(block, 0, i));
                most.y = fmaxf(most.y, at(block, 1, i));
            }
        return {quad_max(most.x), quad_max(most.y)};
    }

    static PSVIT_DEVICE int column_of(int block, int i) {
        return 8 * block + 2 * (threadIdx.x % 4) + i;
    }
};

// P, or what is proportional to it, as the A of a product with V: 16 columns after 16.
template <int WIDTH>
struct Weights {
    u32 a[WIDTH / 16][4];

    // The pair of a block of 8 columns in row `lower`.
    PSVIT_DEVICE u32& at(int block, int lower) { return a[block / 2][block % 2 * 2 + lower]; }
};

// e = exp(score - largest), or its root where a code is made of it; the sum of e.
template <bool ROOT, int WIDTH>
PSVIT_DEVICE float exponentials(Scores<WIDTH>& s, int lower, float scale, float most) {
    const float factor = ROOT ? 0.5f * scale : scale, offset = ROOT ? 0.5f * most : most;
    float sum = 0;
#pragma unroll
    for (int block = 0; block < Keys<WIDTH>::BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float e = exp2_approx(s.at(block, lower, i) * factor - offset);
            sum += ROOT ? e * e : e;
            s.at(block, lower, i) = e;
        }
    return quad_sum(sum);
}

// Row after row, the scores' registers would be free only when both are done.
template <Half T, int WIDTH>
PSVIT_DEVICE void weigh(Weights<WIDTH>& w, Scores<WIDTH>& e, float upper, float lower) {
#pragma unroll
    for (int block = 0; block < Keys<WIDTH>::BLOCKS; ++block) {
        w.at(block, 0) = pack<T>(e.at(block, 0, 0) * upper, e.at(block, 0, 1) * upper);
        w.at(block, 1) = pack<T>(e.at(block, 1, 0) * lower, e.at(block, 1, 1) * lower);
    }
}

// --- the map ------------------------------------------------------------------------------------

// The pair that a thread has of the block in which the keys end: `bits` for each that is a key.
// Padding is zero even where a row is NaN.
PSVIT_DEVICE u32 keys_of_last_block(int tokens, int bits) {
    const int keys = tokens % 8 - 2 * int(threadIdx.x % 4);
    return keys <= 0 ? 0 : keys == 1 ? (1u << bits) - 1 : (1u << (2 * bits - 1)) * 2u - 1;
}

// A row of P in halves.
template <int WIDTH>
PSVIT_DEVICE void store_dense(Weights<WIDTH>& w, int lower, uint16_t* row, int pitch, int tokens) {
    const u32 last = keys_of_last_block(tokens, 16);
#pragma unroll
    for (int block = 0; block < Keys<WIDTH>::BLOCKS; block += 4) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            pairs[j] = block + j < Keys<WIDTH>::BLOCKS ? w.at(block + j, lower) : 0;
            if (Scores<WIDTH>::masked(block + j) && 8 * (block + j) + 8 > tokens) pairs[j] &= last;
        }
        store_halves(row + 8 * block, pitch - 8 * block, pairs);
    }
}

// Two rows of codes, and their weights, from the roots of e; for each row 1 / the sum of what its
// codes stand for.
template <Half T, Code CODE, int WIDTH>
PSVIT_DEVICE float2 store_coded(Weights<WIDTH>& w, Scores<WIDTH>& roots, uint8_t* const (&row)[2],
                                const int (&pitch)[2], int tokens) {
    const u32 last = keys_of_last_block(tokens, 8);
    float stands_for[2] = {};
#pragma unroll
    for (int block = 0; block < Keys<WIDTH>::BLOCKS; block += 8)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            u32 codes[4] = {};
            float of_eight = 0;
#pragma unroll
            for (int j = 0; j < 8 && block + j < Keys<WIDTH>::BLOCKS; ++j) {
                const float x = roots.at(block + j, lower, 0), y = roots.at(block + j, lower, 1);
                w.at(block + j, lower) = pack<T>(x * x, y * y);
                u32 pair = encode2<CODE>(x, y, of_eight);
                const int beyond = 8 * (block + j) + 8 - tokens;
                if (Scores<WIDTH>::masked(block + j) && beyond > 0)
                    pair = beyond < 8 ? pair & last : 0;
                codes[j / 2] |= pair << 16 * (j % 2);
            }
            stands_for[lower] += of_eight;
            store_codes(row[lower] + 8 * block, pitch[lower] - 8 * block, codes);
        }
    return {1 / quad_sum(stands_for[0]), 1 / quad_sum(stands_for[1])};
}

// --- 64 queries ---------------------------------------------------------------------------------

// From the scores of rows first_row and first_row + 8 to their weights; writes the map and the
// log-sum-exp; gives what the output is still to be multiplied with.
template <Half T, MapKind MAP, int WIDTH>
PSVIT_DEVICE float2 softmax(Scores<WIDTH>& s, Weights<WIDTH>& w, const Parameters& p,
                            const Item& item, int first_row) {
    constexpr bool CODED = is_coded(MAP);
    const float2 largest = s.mask_and_maximum(p.tokens);
    const float most[2] = {largest.x * p.scale, largest.y * p.scale};
    const float sum[2] = {exponentials<CODED>(s, 0, p.scale, most[0]),
                          exponentials<CODED>(s, 1, p.scale, most[1])};
    s.hold();
    const int64_t first = (int64_t(item.batch) * p.heads + item.head) * p.rows + first_row;
    const int pitch[2] = {first_row < p.rows ? p.map_pitch : 0,
                          first_row + 8 < p.rows ? p.map_pitch : 0};
    const bool writes[2] = {first_row < p.rows && threadIdx.x % 4 == 0,
                            first_row + 8 < p.rows && threadIdx.x % 4 == 0};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (writes[i]) p.lse[first + 8 * i] = (most[i] + log2f(sum[i])) * LN2;
    if constexpr (CODED) {
        constexpr Code CODE = MAP == MapKind::uint8 ? Code::uint8 : Code::e4m3;
        auto* map = static_cast<uint8_t*>(p.map) + first * p.map_pitch;
        const float2 scale = store_coded<T, CODE>(w, s, {map, map + 8 * p.map_pitch}, pitch,
                                                  p.tokens);
        // No code stands for NaN: the scale carries it.
        if (writes[0]) p.row_scale[first] = sum[0] > 0 ? scale.x : NAN;
        if (writes[1]) p.row_scale[first + 8] = sum[1] > 0 ? scale.y : NAN;
    } else if constexpr (MAP == MapKind::dense) {
        auto* map = static_cast<uint16_t*>(p.map) + first * p.map_pitch;
        weigh<T>(w, s, 1 / sum[0], 1 / sum[1]);
        store_dense(w, 0, map, pitch[0], p.tokens);
        store_dense(w, 1, map + 8 * p.map_pitch, pitch[1], p.tokens);
        return {1, 1};
    } else {
        weigh<T>(w, s, 1, 1);
    }
    return {1 / sum[0], 1 / sum[1]};
}

template <Half T, int WIDTH, int HEAD_BOXES>
PSVIT_DEVICE void multiply_values(float (&out)[HEAD_BOXES][32], const Weights<WIDTH>& w, u32 v) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
        for (int box = 0; box < HEAD_BOXES; ++box)
            wgmma<T, true>(out[box], w.a[k],
                           box_descriptor(v + box * Keys<WIDTH>::BOX + 16 * k * ROW_BYTES), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int box = 0; box < HEAD_BOXES; ++box) wgmma_hold(out[box]);
}

template <Half T, int HEAD_BOXES>
PSVIT_DEVICE void store_out(const float (&acc)[HEAD_BOXES][32], const Parameters& p,
                            const Item& item, int row, int lower, float factor) {
    auto* out = static_cast<uint16_t*>(p.out) +
                ((int64_t(item.batch) * p.rows + row) * p.heads + item.head) * p.value_dim;
    const int columns = row < p.rows ? p.value_dim : 0;
#pragma unroll
    for (int block = 0; block < 8 * HEAD_BOXES; block += 4) {
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int box = block / 8, d = 4 * (block % 8 + j) + 2 * lower;
            pairs[j] = pack<T>(acc[box][d] * factor, acc[box][d + 1] * factor);
        }
        store_halves(out + 8 * block, columns - 8 * block, pairs);
    }
}

// As many as their registers leave room for without spills: 168 a thread for three, 255 for two.
constexpr int blocks_per_multiprocessor(MapKind map, int width) {
    return width < 208 || (width == 208 && map == MapKind::none) ? 3 : 2;
}

template <Half T, MapKind MAP, int WIDTH, int HEAD_BOXES>
__global__ void __launch_bounds__(THREADS, blocks_per_multiprocessor(MAP, WIDTH))
    attention_hopper_kernel(const __grid_constant__ Parameters p) {
    using M = Memory<WIDTH, HEAD_BOXES>;
    PSVIT_SHARED(shared);
    const u32 base = shared_address(shared);
    const Item item = item_of(p.schedule, blockIdx.x);
    if (threadIdx.x == 0) start<WIDTH, HEAD_BOXES>(p, base, item);
    block_sync();
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
        Scores<WIDTH> s;
        mbarrier_wait(base + M::Q_FULL, (tile - item.first_tile) & 1);
        s.template multiply<T, HEAD_BOXES>(base);
        block_sync();  // all have read Q
        if (threadIdx.x == 0 && tile + 1 < item.last_tile) {
            mbarrier_arrive_expect(base + M::Q_FULL, M::K - M::Q);
            load_queries<HEAD_BOXES>(base + M::Q, p.q_boxes, base + M::Q_FULL, item, tile + 1);
        }
        const int row = tile * ROWS + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        Weights<WIDTH> w;
        const float2 factor = softmax<T, MAP>(s, w, p, item, row);
        mbarrier_wait(base + M::V_FULL, 0);
        float out[HEAD_BOXES][32];
        multiply_values<T>(out, w, base + M::V);
        store_out<T>(out, p, item, row, 0, factor.x);
        store_out<T>(out, p, item, row + 8, 1, factor.y);
    }
}

// --- the host -----------------------------------------------------------------------------------

template <Half T, MapKind MAP, int WIDTH, int HEAD_BOXES>
void launch_with(const AttentionArgs& a, Launch where) {
    Parameters p = {};
    const auto describe = [&](TensorMap& map, const Tensor4& t, int dim, int rows, int box_rows) {
        const char* trouble =
            encode(map, tensor_shape(t, 2, dim, rows, a.heads, a.batch, box_rows));
        if (trouble) refuse("attention_hopper", shape_of(a), trouble);
    };
    describe(p.q_boxes, a.q, a.dim, a.rows, ROWS);
    describe(p.k_boxes, a.k, a.dim, a.tokens, Keys<WIDTH>::OF_PART);
    describe(p.v_boxes, a.v, a.value_dim, a.tokens, Keys<WIDTH>::OF_PART);
    p.schedule = schedule(a.batch, a.heads, a.rows, ROWS, 2 * multiprocessors(where.device));
    p.heads = a.heads, p.rows = a.rows, p.tokens = a.tokens, p.value_dim = a.value_dim;
    p.map_pitch = a.map_pitch, p.scale = a.scale * LOG2E;
    p.out = a.out, p.map = a.map, p.row_scale = a.row_scale, p.lse = a.lse;
    launch("attention_hopper", a, attention_hopper_kernel<T, MAP, WIDTH, HEAD_BOXES>,
           Grid{p.schedule.items, THREADS, Memory<WIDTH, HEAD_BOXES>::BYTES}, where, p);
}

template <Half T, MapKind MAP, int WIDTH>
void launch_for_dim(const AttentionArgs& a, Launch where) {
    if (a.dim <= 64 && a.value_dim <= 64)
        launch_with<T, MAP, WIDTH, 1>(a, where);
    else
        launch_with<T, MAP, WIDTH, 2>(a, where);
}

template <Half T, MapKind MAP>
void launch_for_width(const AttentionArgs& a, Launch where) {
    if (a.tokens <= 64)
        launch_for_dim<T, MAP, 64>(a, where);
    else if (a.tokens <= 128)
        launch_for_dim<T, MAP, 128>(a, where);
    else if (a.tokens <= 208)
        launch_for_dim<T, MAP, 208>(a, where);
    else
        launch_for_dim<T, MAP, 272>(a, where);
}

template <Half T>
void launch_for_map(const AttentionArgs& a, Launch where) {
    if (!a.has_map)
        launch_for_width<T, MapKind::none>(a, where);
    else if (a.code == Code::half)
        launch_for_width<T, MapKind::dense>(a, where);
    else if (a.code == Code::uint8)
        launch_for_width<T, MapKind::uint8>(a, where);
    else
        launch_for_width<T, MapKind::e4m3>(a, where);
}

}  // namespace

void attention_hopper(const AttentionArgs& a, Launch where) {
    if (!a.batch || !a.heads) return;
    if (a.dtype == Half::bfloat16)
        launch_for_map<Half::bfloat16>(a, where);
    else
        launch_for_map<Half::float16>(a, where);
}

}  // namespace psvit::cuda
