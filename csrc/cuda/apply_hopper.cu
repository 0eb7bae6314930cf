// O = P V from a stored map, on sm_90a. Reading P decides the time.
//
// One thread starts copies: V of a head, which then stays in shared memory, and the map, box after
// box, into a ring, as far ahead as the ring has room. Two warpgroups multiply, 64 rows each, with
// the accumulators in registers: a map of halves straight from the ring, an 8-bit one decoded in
// registers on the way.
#include "codes.h"
#include "fragments.h"
#include "hopper.h"
#include "schedule.h"

namespace psvit::cuda {
namespace {

constexpr int ROWS = ApplyMemory::ROWS;
static_assert(ROWS == 64 * WARPGROUPS);

struct Parameters {
    TensorMap map_boxes, v_boxes;
    Schedule schedule;
    ApplyMemory memory;
    int heads, rows, tokens, dim;
    bool one_map;  // for all sequences
    Tensor4 row_scale, v;
    void* out;
    const int32_t* head_index;
    const float* correction;
};

PSVIT_DEVICE void initialise_barriers(const ApplyMemory& memory, u32 base) {
    for (int i = 0; i < memory.stages + memory.v_buffers; ++i) {
        mbarrier_init(base + memory.full(i), 1);
        mbarrier_init(base + memory.empty(i), MULTIPLYING_WARPS);
    }
}

// --- the thread that copies ---------------------------------------------------------------------

PSVIT_DEVICE void load_values(const Parameters& p, const Item& item, u32 base, int buffer) {
    const u32 full = base + p.memory.v_full(buffer);
    mbarrier_arrive_expect(full, p.memory.v_bytes);
    u32 to = base + p.memory.v(buffer);
    for (int dim = 0; dim < p.dim; dim += 64)
        for (int box = 0; box < p.memory.v_boxes; ++box, to += ApplyMemory::V_BOX)
            tma_load(to, p.v_boxes, full, dim, 64 * box, item.head, item.batch);
}

template <Code CODE>
PSVIT_DEVICE void copy(const Parameters& p, u32 base) {
    const ApplyMemory& memory = p.memory;
    Place ring, values;
    for (int i = blockIdx.x; i < p.schedule.items; i += gridDim.x) {
        const Item item = item_of(p.schedule, i);
        const int donor = p.head_index ? p.head_index[item.head] : item.head;
        const int batch = p.one_map ? 0 : item.batch;
        mbarrier_wait(base + memory.v_empty(values.stage), values.parity ^ 1);
        load_values(p, item, base, values.stage);
        values.advance(memory.v_buffers);
        for (int tile = item.first_tile; tile < item.last_tile; ++tile)
            for (int column = 0; column < p.tokens; column += box_columns(CODE)) {
                const u32 full = base + memory.full(ring.stage);
                mbarrier_wait(base + memory.empty(ring.stage), ring.parity ^ 1);
                mbarrier_arrive_expect(full, ApplyMemory::BOX);
                tma_load(base + memory.box(ring.stage), p.map_boxes, full, column, tile * ROWS,
                         donor, batch);
                ring.advance(memory.stages);
            }
    }
}

// --- the warpgroups that multiply ---------------------------------------------------------------

// (64, 64 x HEAD_BOXES) of float32.
template <Half T, int HEAD_BOXES>
struct Accumulators {
    float box[HEAD_BOXES][32];

    // = or += 16 columns of P times 16 tokens of V, whose boxes of 64 numbers lie `apart`.
    template <class A>
    PSVIT_DEVICE void multiply(const A& a, u32 values, int apart, bool add) {
#pragma unroll
        for (int i = 0; i < HEAD_BOXES; ++i)
            wgmma<T, true>(box[i], a, box_descriptor(values + i * apart), add);
    }
    PSVIT_DEVICE void hold() {
#pragma unroll
        for (int i = 0; i < HEAD_BOXES; ++i) wgmma_hold(box[i]);
    }
};

// What a warpgroup reads: its 64 rows of the boxes in the ring, and V of the head.
struct Operands {
    const ApplyMemory& memory;
    u32 base, values;
    int tokens, apart;  // bytes between the boxes of V of the same tokens
    int warpgroup;

    PSVIT_DEVICE u32 rows(int stage) const {
        return base + memory.box(stage) + warpgroup * 64 * ROW_BYTES;
    }
    PSVIT_DEVICE u32 tokens_from(int token) const { return values + token * ROW_BYTES; }
};

// A row of tiles of a map of halves: the tensor cores read both operands from shared memory.
template <Half T, int HEAD_BOXES>
PSVIT_DEVICE void multiply_halves(Accumulators<T, HEAD_BOXES>& acc, const Operands& o,
                                  Place& ring) {
    u32 previous = 0;
    for (int column = 0; column < o.tokens; column += 64) {
        mbarrier_wait(o.base + o.memory.full(ring.stage), ring.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 64; k += 16)
            acc.multiply(box_descriptor(o.rows(ring.stage) + 2 * k), o.tokens_from(column + k),
                         o.apart, column + k > 0);
        wgmma_commit();
        if (column) {
            wgmma_wait<1>();  // the box before has been read
            release(previous);
        }
        previous = o.base + o.memory.empty(ring.stage);
        ring.advance(o.memory.stages);
    }
    wgmma_wait<0>();
    release(previous);
    acc.hold();
}

// A of 16 columns from a box of codes: rows 16 warp + lane / 4 (+ 8), columns 2 (lane % 4) (+ 8).
template <Half T, Code CODE>
PSVIT_DEVICE void decode_columns(u32 (&a)[4], u32 rows, int sixteenth) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    const u32 upper = rows + (threadIdx.x / 32 % 4 * 16 + row) * ROW_BYTES +
                      ((sixteenth ^ row) * 16) + lane % 4 * 2;
    const u32 lower = upper + EIGHT_ROWS;
    a[0] = decode2<T, CODE>(load_shared_u16(upper));
    a[1] = decode2<T, CODE>(load_shared_u16(lower));
    a[2] = decode2<T, CODE>(load_shared_u16(upper + 8));
    a[3] = decode2<T, CODE>(load_shared_u16(lower + 8));
}

// A row of tiles of an 8-bit map: while the tensor cores work on 64 columns, the next are decoded.
template <Half T, Code CODE, int HEAD_BOXES>
PSVIT_DEVICE void multiply_codes(Accumulators<T, HEAD_BOXES>& acc, const Operands& o, Place& ring) {
    u32 a[2][4][4];
    for (int column = 0; column < o.tokens; column += 128) {
        mbarrier_wait(o.base + o.memory.full(ring.stage), ring.parity);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            wgmma_wait<1>();  // a[half] has been read
#pragma unroll
            for (int k = 0; k < 4; ++k)
                decode_columns<T, CODE>(a[half][k], o.rows(ring.stage), 4 * half + k);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k)
                acc.multiply(a[half][k], o.tokens_from(column + 64 * half + 16 * k), o.apart,
                             column + half + k > 0);
            wgmma_commit();
        }
        release(o.base + o.memory.empty(ring.stage));
        ring.advance(o.memory.stages);
    }
    wgmma_wait<0>();
    acc.hold();
}

// Sums of V over the tokens. Lanes 4 j to 4 j + 3 of each warp keep those of the columns 8 j and on
// of each box, in the places that they have in accumulators.
template <Half T, int HEAD_BOXES>
struct ValueSums {
    float2 kept[HEAD_BOXES];

    // Ones times V: the same sums in all rows.
    PSVIT_DEVICE void add_up(const Operands& o) {
        const u32 one = pack<T>(1, 1), ones[4] = {one, one, one, one};
#pragma unroll
        for (int box = 0; box < HEAD_BOXES; ++box) {
            float rows[32];
            wgmma_fence();
            for (int token = 0; token < o.tokens; token += 16)
                wgmma<T, true>(rows, ones, box_descriptor(o.tokens_from(token) + box * o.apart),
                               token > 0);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_hold(rows);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                // Read first, chosen then: an index that depends on the lane is local memory.
                const float2 sum = {rows[4 * j], rows[4 * j + 1]};
                kept[box] = threadIdx.x % 32 / 4 == j ? sum : kept[box];
            }
        }
    }
    PSVIT_DEVICE float2 of_block(int box, int j) const {
        const int keeper = 4 * j + threadIdx.x % 4;
        return {shuffle(kept[box].x, keeper), shuffle(kept[box].y, keeper)};
    }
};

// --- the epilogue -------------------------------------------------------------------------------

// The scale of a row of codes, which its decoded weights are to be multiplied with.
PSVIT_DEVICE float row_scale(const Parameters& p, const Item& item, int row) {
    const int donor = p.head_index ? p.head_index[item.head] : item.head;
    const Tensor4& t = p.row_scale;
    return static_cast<const float*>(t.data)[(p.one_map ? 0 : item.batch) * t.stride_b +
                                             donor * t.stride_h + row * t.stride_n];
}

// alpha (P V) + beta V + gamma mean(V)
template <Half T>
struct Correction {
    float alpha, beta, gamma_over_tokens;

    PSVIT_DEVICE float2 of(float2 pv, u32 own_value, float2 sum) const {
        const float2 v = unpack<T>(own_value);
        return {alpha * pv.x + beta * v.x + gamma_over_tokens * sum.x,
                alpha * pv.y + beta * v.y + gamma_over_tokens * sum.y};
    }
};

// Writes the 64 rows of this warpgroup, from `first_row` on.
template <Half T, Code CODE, int HEAD_BOXES, bool CORRECTED>
PSVIT_DEVICE void store(const Parameters& p, const Item& item, int first_row,
                        const Accumulators<T, HEAD_BOXES>& acc,
                        const ValueSums<T, HEAD_BOXES>& sums) {
    Correction<T> correction = {};
    if constexpr (CORRECTED) {
        const float* c = p.correction + 3 * item.head;
        correction = {c[0], c[1], c[2] / p.tokens};
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // this thread has a part of two rows, a quad all columns
        const int row = first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
        const bool inside = row < p.rows;
        float scale = 1;
        if (CODE != Code::half && inside) scale = row_scale(p, item, row);
        auto* out = static_cast<uint16_t*>(p.out) +
                    ((int64_t(item.batch) * p.rows + row) * p.heads + item.head) * p.dim;
        const auto* v = static_cast<const uint16_t*>(p.v.data) + item.batch * p.v.stride_b +
                        item.head * p.v.stride_h + row * p.v.stride_n;
#pragma unroll
        for (int block = 0; block < 8 * HEAD_BOXES; block += 4) {  // of 8 columns
            const int columns = inside ? p.dim - 8 * block : 0;
            u32 own[4], pairs[4];
            if constexpr (CORRECTED) {
                warp_sync();  // or the compiler loads all blocks first, for which registers lack
                load_halves(v + 8 * block, columns, own);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int box = block / 8, d = 4 * (block % 8 + j) + 2 * i;
                float2 pv = {acc.box[box][d] * scale, acc.box[box][d + 1] * scale};
                if constexpr (CORRECTED)
                    pv = correction.of(pv, own[j], sums.of_block(box, block % 8 + j));
                pairs[j] = pack<T>(pv.x, pv.y);
            }
            store_halves(out + 8 * block, columns, pairs);
        }
    }
}

template <Half T, Code CODE, int HEAD_BOXES, bool CORRECTED>
PSVIT_DEVICE void multiply(const Parameters& p, u32 base, int warpgroup) {
    const ApplyMemory& memory = p.memory;
    Place ring, values;
    ValueSums<T, HEAD_BOXES> sums;
    for (int i = blockIdx.x; i < p.schedule.items; i += gridDim.x) {
        const Item item = item_of(p.schedule, i);
        mbarrier_wait(base + memory.v_full(values.stage), values.parity);
        const Operands operands = {memory,   base, base + memory.v(values.stage),
                                   p.tokens, memory.v_boxes * ApplyMemory::V_BOX, warpgroup};
        if constexpr (CORRECTED) sums.add_up(operands);
        for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
            Accumulators<T, HEAD_BOXES> acc;
            if constexpr (CODE == Code::half)
                multiply_halves(acc, operands, ring);
            else
                multiply_codes<T, CODE>(acc, operands, ring);
            store<T, CODE, HEAD_BOXES, CORRECTED>(p, item, tile * ROWS + warpgroup * 64, acc, sums);
        }
        release(base + memory.v_empty(values.stage));
        values.advance(memory.v_buffers);
    }
}

template <Half T, Code CODE, int HEAD_BOXES, bool CORRECTED>
__global__ void __launch_bounds__(RING_THREADS, 1)
    apply_hopper_kernel(const __grid_constant__ Parameters p) {
    copy_and_multiply([&](u32 base) { initialise_barriers(p.memory, base); },
                      [&](u32 base) { copy<CODE>(p, base); },
                      [&](u32 base, int warpgroup) {
                          multiply<T, CODE, HEAD_BOXES, CORRECTED>(p, base, warpgroup);
                      });
}

// --- the host -----------------------------------------------------------------------------------

template <Half T, Code CODE, int HEAD_BOXES, bool CORRECTED>
void launch_with(const ApplyArgs& a, Launch where, const Parameters& p, int blocks) {
    launch("apply_hopper", a, apply_hopper_kernel<T, CODE, HEAD_BOXES, CORRECTED>,
           Grid{blocks, RING_THREADS, p.memory.bytes()}, where, p);
}

template <Half T, Code CODE>
void launch_for_dim(const ApplyArgs& a, Launch where, const Parameters& p, int blocks) {
    if (a.dim <= 64)
        a.correction ? launch_with<T, CODE, 1, true>(a, where, p, blocks)
                     : launch_with<T, CODE, 1, false>(a, where, p, blocks);
    else
        a.correction ? launch_with<T, CODE, 2, true>(a, where, p, blocks)
                     : launch_with<T, CODE, 2, false>(a, where, p, blocks);
}

template <Half T>
void launch_for_code(const ApplyArgs& a, Launch where, const Parameters& p, int blocks) {
    if (a.code == Code::half) launch_for_dim<T, Code::half>(a, where, p, blocks);
    if (a.code == Code::uint8) launch_for_dim<T, Code::uint8>(a, where, p, blocks);
    if (a.code == Code::e4m3) launch_for_dim<T, Code::e4m3>(a, where, p, blocks);
}

}  // namespace

int apply_hopper_shared(int tokens, int dim, Code code) {
    ApplyMemory least = apply_memory(tokens, dim, code);
    least.v_buffers = 1, least.stages = ApplyMemory::MIN_STAGES;
    return least.bytes();
}

void apply_hopper(const ApplyArgs& a, Launch where) {
    if (!a.batch || !a.heads) return;
    const int sms = multiprocessors(where.device);
    Parameters p = {};
    p.schedule = schedule(a.batch, a.heads, a.rows, ROWS, sms);
    p.memory = apply_memory(a.tokens, a.dim, a.code);
    p.heads = a.heads, p.rows = a.rows, p.tokens = a.tokens, p.dim = a.dim;
    p.one_map = a.map_batch == 1;
    p.row_scale = a.row_scale, p.v = a.v, p.out = a.out;
    p.head_index = a.head_index, p.correction = a.correction;
    const char* trouble =
        encode(p.map_boxes, tensor_shape(a.map, a.code == Code::half ? 2 : 1, a.tokens, a.rows,
                                         a.map_heads, a.map_batch, ROWS));
    if (!trouble)
        trouble = encode(p.v_boxes, tensor_shape(a.v, 2, a.dim, a.tokens, a.heads, a.batch, 64));
    if (trouble) refuse("apply_hopper", shape_of(a), trouble);
    const int blocks = p.schedule.items < sms ? p.schedule.items : sms;
    if (a.dtype == Half::bfloat16)
        launch_for_code<Half::bfloat16>(a, where, p, blocks);
    else
        launch_for_code<Half::float16>(a, where, p, blocks);
}

}  // namespace psvit::cuda
