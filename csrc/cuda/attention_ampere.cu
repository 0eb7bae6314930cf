// Attention over short rows and its map, on every GPU from sm_80 on: cp.async, mma.sync.
//
// K and V of a head lie in shared memory. A warp makes 16 rows at a time, with all their scores in
// registers: one exact softmax, and the probabilities are there to be written and multiplied by V.
// Keys are numbered in runs (tiles.h), so that 16 bytes of a row of the map are in one lane.
#include <algorithm>
#include <cmath>

#include "ampere.h"
#include "codes.h"
#include "fragments.h"
#include "launch.h"

namespace psvit::cuda {
namespace {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int ROWS = 16;  // of a warp at a time

// A kind of kernel. That of maps in halves also serves calls without a map.
template <Half T_, Code CODE_, int WIDTH_, int DIM_>
struct Kind {
    static constexpr Half T = T_;
    static constexpr Code CODE = CODE_;
    static constexpr int WIDTH = WIDTH_;  // keys at most
    static constexpr int DIM = DIM_;      // of q, k and v at most
    static constexpr int BLOCKS = WIDTH / 8, UNITS = DIM / 8;
    static constexpr int RUN = CODE == Code::half ? 8 : 16;  // 16 bytes of the map
    // Fewer keys than this and a narrower kind serves: only columns from here on are masked.
    static constexpr int SURE = WIDTH == 272 ? 208 : WIDTH == 208 ? 128 : WIDTH == 128 ? 64 : 0;
    static constexpr int TILE = WIDTH * UNITS * 16;
    // As many blocks on a multiprocessor as the registers for all scores allow, and two tiles.
    static constexpr int WARPS = DIM == 128 ? 8 : 4, THREADS = 32 * WARPS;
    static constexpr bool MANY_REGISTERS = WIDTH == 272 || (WIDTH == 208 && CODE != Code::half);
    static constexpr int AT_ONCE = DIM == 128 ? 1 : MANY_REGISTERS ? 2 : 3;
};

// Whether every column of a block is one of the keys, however many there are in this kind.
template <class K>
PSVIT_HOST_DEVICE constexpr bool sure(int block) {
    constexpr int group = K::RUN / 2;
    return (block / group + 1) * group * 8 <= K::SURE;
}

PSVIT_DEVICE const uint16_t* row_of(const Tensor4& t, const Part& part, int64_t row) {
    return static_cast<const uint16_t*>(t.data) + int64_t(part.batch) * t.stride_b +
           int64_t(part.head) * t.stride_h + row * t.stride_n;
}

// 16 rows of a warp. Of each pair of values, [0] is of row lane / 4, [1] of the row eight below.
template <class K>
struct Rows {
    const AttentionArgs& a;
    const Part& part;
    int lane, row;  // the upper one
    float scores[K::BLOCKS][4];
    u32 p[K::BLOCKS / 2][4];  // in halves, as A of 16 columns
    float top[2] = {-INFINITY, -INFINITY};
    float sum[2] = {}, factor[2];  // of exponentials, and 1 / sum
    float weights[2] = {};         // what codes stand for, added up
    float out[K::UNITS][4] = {};

    PSVIT_DEVICE Rows(const AttentionArgs& args, const Part& place, int first_row)
        : a(args), part(place), lane(opaque(threadIdx.x) % 32), row(first_row + lane / 4) {}

    // The first of the two columns that this lane has of a block.
    PSVIT_DEVICE int column(int block) const {
        return column_of(run_at(K::WIDTH, K::RUN, block), block * 8 + lane % 4 * 2);
    }
    PSVIT_DEVICE bool inside(int half) const { return row + half * 8 < a.rows; }
    PSVIT_DEVICE int line(int half) const {
        return (part.batch * a.heads + part.head) * a.rows + row + half * 8;
    }

    PSVIT_DEVICE void load_queries(u32 (&q)[K::DIM / 16][4]) const {
        uint4 loaded[2][K::DIM / 32];  // all under way before the first is used
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < K::DIM / 32; ++group)
                loaded[half][group] =
                    load_unit(row_of(a.q, part, row + half * 8), group * 4 + lane % 4,
                              inside(half) ? a.dim / 8 : 0);
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < K::DIM / 32; ++group) {
                const uint4& x = loaded[half][group];
                u32 pairs[4] = {x.x, x.y, x.z, x.w};
                quad_transpose(pairs);
#pragma unroll
                for (int j = 0; j < 4; ++j) q[group * 2 + j / 2][j % 2 * 2 + half] = pairs[j];
            }
    }

    // Scores in units of log 2, or half of that where codes are made of square roots.
    PSVIT_DEVICE void multiply_keys(u32 keys) {
        u32 q[K::DIM / 16][4];
        load_queries(q);
        const float unit = a.scale * (K::CODE == Code::half ? LOG2E : LOG2E / 2);
#pragma unroll
        for (int block = 0; block < K::BLOCKS; block += 2) {
            float(&upper)[4] = scores[block], (&lower)[4] = scores[block + 1];
#pragma unroll
            for (int i = 0; i < 4; ++i) upper[i] = lower[i] = 0;
            const int run = run_at(K::WIDTH, K::RUN, block);
            const int of_lane =
                unit_at<K::UNITS>(column_of(run, lane / 16 * 8 + lane % 8), lane / 8 % 2);
#pragma unroll
            for (int step = 0; step < K::DIM / 16; ++step) {
                const int of_step = unit_at<K::UNITS>(column_of(run, block * 8), 2 * step);
                u32 k[4];
                ldmatrix_x4(k, keys + (of_lane ^ of_step));
                mma<K::T>(upper, q[step], k[0], k[1]);
                mma<K::T>(lower, q[step], k[2], k[3]);
            }
            finish_scores(block, unit);
            finish_scores(block + 1, unit);
        }
        top[0] = quad_max(top[0]);
        top[1] = quad_max(top[1]);
    }

    PSVIT_DEVICE void finish_scores(int block, float unit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[block][i];
            score *= unit;
            if (!sure<K>(block) && column(block) + i % 2 >= a.tokens) score = -INFINITY;
            top[i / 2] = fmaxf(top[i / 2], score);
        }
    }

    // Scores become exponentials, and their sums are known.
    PSVIT_DEVICE void exponentiate() {
#pragma unroll
        for (int block = 0; block < K::BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[block][i] = exp2_approx(scores[block][i] - top[i / 2]);
                sum[i / 2] += scores[block][i];
            }
        add_up();
    }

    PSVIT_DEVICE void add_up() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] = quad_sum(sum[half]);
            factor[half] = 1 / sum[half];
        }
    }

    // Writes the map; what multiplies V is left in `p`. For codes that is e: the output is divided
    // at the end, and each e is made where it is used, with the root that its code is made of.
    PSVIT_DEVICE void make_map() {
        constexpr int group = K::RUN / 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[4];  // 16 bytes of the map, of a group of blocks
#pragma unroll
            for (int block = 0; block < K::BLOCKS; ++block) {
                float x = scores[block][half * 2], y = scores[block][half * 2 + 1];
                u32& pair = p[block / 2][block % 2 * 2 + half];
                if constexpr (K::CODE == Code::half) {
                    pair = words[block % group] = pack<K::T>(x * factor[half], y * factor[half]);
                } else {
                    x = exp2_approx(x - top[half]), y = exp2_approx(y - top[half]);
                    const u32 codes = encode2<K::CODE>(x, y, weights[half]);
                    u32& word = words[block % group / 2];
                    word = block % 2 == 0 ? codes : word | codes << 16;
                    x *= x, y *= y;
                    sum[half] += x + y;
                    pair = pack<K::T>(x, y);
                }
                if (block % group == group - 1 || block == K::BLOCKS - 1)
                    store_map(block / group * group, half, words);
            }
        }
    }

    // Of a group of blocks, this lane has columns of the map that are side by side.
    PSVIT_DEVICE void store_map(int first, int half, u32 (&words)[4]) {
        constexpr int element = K::CODE == Code::half ? 2 : 1, in_a_word = 4 / element;
        const int start = column(first);
        if (!a.has_map || !inside(half) || start >= a.map_pitch) return;
        if (!sure<K>(first))  // zeros beyond the keys, of rows of NaN too
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int left = a.tokens - start - i * in_a_word;
                if (left < in_a_word) words[i] &= left > 0 ? (1u << left * 8 * element) - 1 : 0;
            }
        void* to = static_cast<char*>(a.map) +
                   (int64_t(line(half)) * a.map_pitch + start) * element;
        if (run_at(K::WIDTH, K::RUN, first) == K::RUN)
            *static_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
        else if (K::CODE == Code::half)
            *static_cast<uint2*>(to) = {words[0], words[1]};
        else
            *static_cast<u32*>(to) = words[0];
    }

    PSVIT_DEVICE void multiply_values(u32 values) {
#pragma unroll
        for (int step = 0; step < K::BLOCKS / 2; ++step) {
            const int run = run_at(K::WIDTH, K::RUN, step * 2);
#pragma unroll
            for (int pair = 0; pair < K::DIM / 16; ++pair) {
                u32 v[4];
                load_values<K::UNITS>(v, values, lane, run, step * 16, pair);
                mma<K::T>(out[2 * pair], p[step], v[0], v[1]);
                mma<K::T>(out[2 * pair + 1], p[step], v[2], v[3]);
            }
        }
    }

    PSVIT_DEVICE void store_out() const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < K::DIM / 32; ++group) {
                u32 pairs[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* o = out[group * 4 + j] + half * 2;
                    const float scale = K::CODE == Code::half ? 1 : factor[half];
                    pairs[j] = pack<K::T>(o[0] * scale, o[1] * scale);
                }
                const int64_t token = part.batch * a.rows + row + half * 8;
                uint16_t* to = static_cast<uint16_t*>(a.out) +
                               (token * a.heads + part.head) * a.value_dim + group * 32;
                store_halves(to, inside(half) ? a.value_dim - group * 32 : 0, pairs);
            }
    }

    PSVIT_DEVICE void store_statistics() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float weight = quad_sum(weights[half]);
            if (lane % 4 != 0 || !inside(half)) continue;
            const float log2_max = K::CODE == Code::half ? top[half] : top[half] * 2;
            a.lse[line(half)] = (log2_max + log2f(sum[half])) * LN2;
            // No code stands for NaN: the row's scale carries it.
            if (K::CODE != Code::half)
                a.row_scale[line(half)] = sum[half] > 0 ? 1 / weight : NAN;
        }
    }
};

template <class K>
__global__ void __launch_bounds__(K::THREADS, K::AT_ONCE)
    attention_kernel(const __grid_constant__ AttentionArgs a) {
    PSVIT_SHARED(memory);
    const u32 keys = shared_address(memory), values = keys + K::TILE;
    const int parts = gridDim.x / (a.batch * a.heads);
    const Part part = part_of(blockIdx.x, a.heads, parts);
    copy_tile<K::THREADS, K::WIDTH, K::UNITS>(keys, row_of(a.k, part, 0), a.k.stride_n * 2,
                                              a.tokens, a.dim / 8);
    copy_tile<K::THREADS, K::WIDTH, K::UNITS>(values, row_of(a.v, part, 0), a.v.stride_n * 2,
                                              a.tokens, a.value_dim / 8);
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
    // Of lane 0: a number that the compiler knows to be one of the whole warp.
    const int warp = part.index * K::WARPS + shuffle(threadIdx.x / 32, 0);
    for (int row = warp * ROWS; row < a.rows; row += parts * K::WARPS * ROWS) {
        Rows<K> rows(a, part, row);
        rows.multiply_keys(keys);
        if (K::CODE == Code::half) rows.exponentiate();
        rows.make_map();
        if (K::CODE != Code::half) rows.add_up();
        rows.multiply_values(values);
        rows.store_out();
        rows.store_statistics();
    }
}

template <class K>
void run(const AttentionArgs& a, Launch where) {
    // Few heads are shared by several blocks, up to one for each WARPS x ROWS rows.
    const int heads = a.batch * a.heads;
    const int parts = std::min(ceil_div(multiprocessors(where.device), heads),
                               ceil_div(a.rows, K::WARPS * ROWS));
    const Grid grid = {heads * parts, K::THREADS, 2 * K::TILE};
    launch("attention_ampere", a, attention_kernel<K>, grid, where, a);
}

template <Half T, Code CODE, int WIDTH>
void choose(const AttentionArgs& a, Launch where) {
    if (a.dim <= 64 && a.value_dim <= 64)
        run<Kind<T, CODE, WIDTH, 64>>(a, where);
    else
        run<Kind<T, CODE, WIDTH, 128>>(a, where);
}

int width_for(int tokens) {
    return tokens <= 64 ? 64 : tokens <= 128 ? 128 : tokens <= 208 ? 208 : SHORT_TOKENS;
}

template <Half T, Code CODE>
void choose(const AttentionArgs& a, Launch where) {
    switch (width_for(a.tokens)) {
        case 64: return choose<T, CODE, 64>(a, where);
        case 128: return choose<T, CODE, 128>(a, where);
        case 208: return choose<T, CODE, 208>(a, where);
        default: return choose<T, CODE, SHORT_TOKENS>(a, where);
    }
}

template <Half T>
void choose(const AttentionArgs& a, Launch where) {
    switch (a.has_map ? a.code : Code::half) {
        case Code::half: return choose<T, Code::half>(a, where);
        case Code::uint8: return choose<T, Code::uint8>(a, where);
        case Code::e4m3: return choose<T, Code::e4m3>(a, where);
    }
}

}  // namespace

int attention_ampere_shared(int tokens, int dim) {
    return 2 * width_for(tokens) * (dim <= 64 ? 64 : MAX_DIM) * 2;
}

void attention_ampere(const AttentionArgs& a, Launch where) {
    if (a.batch == 0 || a.heads == 0 || a.rows == 0) return;
    if (a.dtype == Half::bfloat16)
        choose<Half::bfloat16>(a, where);
    else
        choose<Half::float16>(a, where);
}

}  // namespace psvit::cuda
