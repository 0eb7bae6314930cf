// token_pool: windows of tokens straight from (B, N, C), with the residual sum before and LayerNorm
// after, in one pass.
//
// A token of the result belongs to 1 to 32 neighbouring threads of a warp (pool_window.h), which
// keep all its channels in registers from the first tap to the last store.
#include <cmath>

#include "launch.h"
#include "pool_window.h"

namespace psvit::cuda {

namespace {

constexpr int THREADS = 128;

struct Params {
    PoolArgs a;
    int tokens;     // of an image of the result
    int64_t total;  // of all images
    int chunk;      // of a block
    int lanes;      // threads of a token
};

// Of all channels, those of this thread: 8 from at(v) on, for each vector v with inside(v).
struct Channels {
    int first, step, count;

    PSVIT_DEVICE int at(int v) const { return first + v * step; }
    PSVIT_DEVICE bool inside(int v) const { return at(v) < count; }
};

template <Half T>
PSVIT_DEVICE void widen(float (&to)[8], uint4 from) {
    const u32 pairs[4] = {from.x, from.y, from.z, from.w};
    for (int i = 0; i < 4; ++i) {
        const float2 both = unpack<T>(pairs[i]);
        to[2 * i] = both.x;
        to[2 * i + 1] = both.y;
    }
}

PSVIT_DEVICE void copy_floats(float (&to)[8], const float* low_half, const float* high_half) {
    const float4 low = *reinterpret_cast<const float4*>(low_half);
    const float4 high = *reinterpret_cast<const float4*>(high_half);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <Half T>
PSVIT_DEVICE void load_parameters(float (&to)[8], const void* from, int channel, bool half) {
    if (half) {
        widen<T>(to, load_global(static_cast<const uint16_t*>(from) + channel));
    } else {
        const float* const eight = static_cast<const float*>(from) + channel;
        copy_floats(to, eight, eight + 4);
    }
}

// Weights of a depthwise convolution, a tap's side by side, and a tap of ones (pool_window.h).
template <Half T>
PSVIT_DEVICE void stage_weights(float* to, const PoolArgs& a) {
    const int taps = a.kernel_h * a.kernel_w, all = taps * a.channels;
    for (int i = threadIdx.x; i < all; i += THREADS)
        to[weight_place(i % taps, i / taps, a.channels)] =
            a.half_parameters ? unpack<T>(static_cast<const uint16_t*>(a.weight)[i]).x
                              : static_cast<const float*>(a.weight)[i];
    for (int i = threadIdx.x; i < a.channels; i += THREADS) to[all + i] = 1.0f;
}

// --- the window -------------------------------------------------------------------------------

// Taps of which a thread has the loads under way at once: about 9 vectors.
PSVIT_HOST_DEVICE constexpr int taps_at_once(int vectors, bool residual) {
    const int loads = residual ? 2 * vectors : vectors;
    return loads < 9 ? 9 / loads : 1;
}

// The token whose first channel is number `offset` of an image.
template <int VECTORS>
PSVIT_DEVICE void load_token(uint4 (&to)[VECTORS], const uint16_t* image, u32 offset, Channels c) {
    for (int v = 0; v < VECTORS; ++v)
        if (c.inside(v)) to[v] = load_global(image + (offset + c.at(v)));
}

template <Half T>
PSVIT_DEVICE uint4 maximum8(uint4 a, uint4 b) {
    return {maximum2<T>(a.x, b.x), maximum2<T>(a.y, b.y), maximum2<T>(a.z, b.z),
            maximum2<T>(a.w, b.w)};
}

// What the window's value starts as: adding to -0, not to 0, leaves a single -0 as it was.
template <PoolKind KIND>
constexpr float START = KIND == PoolKind::max ? -INFINITY : -0.0f;

// One tap more; `weights` is where the staged ones of these 8 channels start.
template <PoolKind KIND>
PSVIT_DEVICE void take(float (&at)[8], const float (&value)[8], const float* weights,
                       int channels) {
    float weight[8];
    if constexpr (KIND == PoolKind::depthwise)
        copy_floats(weight, weights, weights + channels / 2);
    for (int i = 0; i < 8; ++i) {
        if constexpr (KIND == PoolKind::max)
            at[i] = maximum(at[i], value[i]);
        else if constexpr (KIND == PoolKind::depthwise)
            at[i] += value[i] * weight[i];
        else
            at[i] += value[i];
    }
}

template <Half T, PoolKind KIND, bool RESIDUAL, int VECTORS>
PSVIT_DEVICE void pool(float (&at)[VECTORS][8], const PoolArgs& a, int64_t image, Window w,
                       Channels c, const float* weights) {
    constexpr int TAPS = taps_at_once(VECTORS, RESIDUAL);
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < 8; ++i) at[v][i] = c.inside(v) ? START<KIND> : 0.0f;

    // Inside of an image 32 bits suffice (kernels.h).
    const u32 step = u32(a.x_stride_n), other_step = u32(a.residual_stride_n);
    auto* const x = computed_once(static_cast<const uint16_t*>(a.x) + image * a.x_stride_b);
    auto* const other = computed_once(static_cast<const uint16_t*>(a.residual) +
                                      image * a.residual_stride_b);
    for (int row = 0; row < w.rows; ++row)
        for (int column = 0; column < w.columns; column += TAPS) {
            const u32 token = w.first + row * a.width + column;
            uint4 terms[TAPS][VECTORS], others[TAPS][VECTORS];
            for (int j = 0; j < TAPS; ++j) {
                if (column + j >= w.columns) break;
                load_token(terms[j], x, (token + j) * step, c);
                if constexpr (RESIDUAL) load_token(others[j], other, (token + j) * other_step, c);
            }
            int taps = w.columns - column;
            if constexpr (KIND == PoolKind::max && !RESIDUAL) {
                // As they lie in memory, halves are compared two at a time.
                for (int j = 1; j < TAPS; ++j)
                    for (int v = 0; v < VECTORS; ++v)
                        if (j < taps && c.inside(v))
                            terms[0][v] = maximum8<T>(terms[0][v], terms[j][v]);
                taps = 1;
            }
            const float* tap = weights + (w.tap + row * a.kernel_w + column) * a.channels;
            for (int j = 0; j < TAPS; ++j, tap += a.channels) {
                if (j >= taps) break;
                for (int v = 0; v < VECTORS; ++v) {
                    if (!c.inside(v)) break;
                    float value[8], added[8];
                    widen<T>(value, terms[j][v]);
                    if constexpr (RESIDUAL) {
                        widen<T>(added, others[j][v]);
                        for (int i = 0; i < 8; ++i) value[i] += added[i];
                    }
                    take<KIND>(at[v], value, tap + c.at(v) / 2, a.channels);
                }
            }
        }
}

// --- after the window -------------------------------------------------------------------------

template <Half T, int VECTORS>
PSVIT_DEVICE void add_bias(float (&at)[VECTORS][8], const PoolArgs& a, Channels c) {
    for (int v = 0; v < VECTORS; ++v) {
        if (!c.inside(v)) break;
        float bias[8];
        load_parameters<T>(bias, a.bias, c.at(v), a.half_parameters);
        for (int i = 0; i < 8; ++i) at[v][i] += bias[i];
    }
}

PSVIT_DEVICE float sum_of_token(float value, int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// LayerNorm, by the deviations from the mean: what is subtracted is still there.
template <Half T, int VECTORS>
PSVIT_DEVICE void normalize(float (&at)[VECTORS][8], const PoolArgs& a, Channels c, int lanes) {
    float sum = 0.0f, squares = 0.0f;
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < 8; ++i) sum += at[v][i];  // zero outside
    const float mean = sum_of_token(sum, lanes) / float(a.channels);
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < 8; ++i) {
            at[v][i] -= mean;
            squares += c.inside(v) ? at[v][i] * at[v][i] : 0.0f;
        }
    const float variance = sum_of_token(squares, lanes) / float(a.channels);
    const float rstd = 1.0f / sqrtf(variance + a.norm_eps);
    for (int v = 0; v < VECTORS; ++v) {
        if (!c.inside(v)) break;
        float weight[8], bias[8] = {};
        load_parameters<T>(weight, a.norm_weight, c.at(v), a.half_parameters);
        if (a.norm_bias) load_parameters<T>(bias, a.norm_bias, c.at(v), a.half_parameters);
        for (int i = 0; i < 8; ++i) at[v][i] = at[v][i] * rstd * weight[i] + bias[i];
    }
}

template <Half T, int VECTORS>
PSVIT_DEVICE void store_token(uint16_t* token, const float (&at)[VECTORS][8], Channels c) {
    for (int v = 0; v < VECTORS; ++v) {
        if (!c.inside(v)) break;
        const float(&f)[8] = at[v];
        *reinterpret_cast<uint4*>(token + c.at(v)) = {pack<T>(f[0], f[1]), pack<T>(f[2], f[3]),
                                                      pack<T>(f[4], f[5]), pack<T>(f[6], f[7])};
    }
}

// --- the kernel -------------------------------------------------------------------------------

PSVIT_HOST_DEVICE constexpr int blocks_per_multiprocessor(int vectors) { return 16 / vectors; }

template <Half T, PoolKind KIND, bool RESIDUAL, int VECTORS>
__global__ void __launch_bounds__(THREADS, blocks_per_multiprocessor(VECTORS))
    pool_kernel(const __grid_constant__ Params p) {
    const PoolArgs& a = p.a;
    PSVIT_SHARED(shared);
    float* const weights = reinterpret_cast<float*>(shared);
    if constexpr (KIND == PoolKind::depthwise) {
        stage_weights<T>(weights, a);
        block_sync();
    }
    const int64_t first = int64_t(blockIdx.x) * p.chunk;
    const int chunk = p.total - first < p.chunk ? int(p.total - first) : p.chunk;
    const int64_t first_image = first / p.tokens;
    const u32 first_token = u32(first % p.tokens);
    const Channels c = {int(threadIdx.x) % p.lanes * 8, p.lanes * 8, a.channels};

    // Every thread of a warp comes along, with a token or without: the sums need them all.
    for (int start = 0; start < chunk; start += THREADS / p.lanes) {
        const int i = start + int(threadIdx.x) / p.lanes;
        const u32 token = first_token + i;
        Window window = window_of(a, token % p.tokens);
        if (i >= chunk) window.rows = 0;

        float at[VECTORS][8];
        pool<T, KIND, RESIDUAL>(at, a, first_image + token / p.tokens, window, c, weights);
        if constexpr (KIND == PoolKind::avg) {
            const float share = 1.0f / float(window.rows * window.columns);
            for (int v = 0; v < VECTORS; ++v)
                for (int e = 0; e < 8; ++e) at[v][e] *= share;
        }
        if (KIND == PoolKind::depthwise && a.bias && int(token % p.tokens) >= a.prefix)
            add_bias<T>(at, a, c);
        if (a.norm_weight) normalize<T>(at, a, c, p.lanes);
        if (i < chunk)
            store_token<T>(static_cast<uint16_t*>(a.out) + (first + i) * a.channels, at, c);
    }
}

template <Half T, PoolKind KIND, bool RESIDUAL, int VECTORS>
void launch_pool(const PoolArgs& a, int lanes, Launch where) {
    const int tokens = a.prefix + a.out_height * a.out_width;
    const int64_t total = int64_t(a.batch) * tokens;
    const int blocks = blocks_per_multiprocessor(VECTORS) * multiprocessors(where.device);
    const Chunks chunks = chunks_of(total, THREADS / lanes, blocks);
    const int shared = KIND == PoolKind::depthwise ? weight_bytes(a) : 0;
    launch("token_pool", a, pool_kernel<T, KIND, RESIDUAL, VECTORS>,
           Grid{chunks.blocks, THREADS, shared}, where,
           Params{a, tokens, total, chunks.chunk, lanes});
}

template <Half T, PoolKind KIND, bool RESIDUAL>
void choose_vectors(const PoolArgs& a, Launch where) {
    const Share share = share_of(a.channels);
    if (share.vectors == 3)
        launch_pool<T, KIND, RESIDUAL, 3>(a, share.lanes, where);
    else if (share.vectors == 4)
        launch_pool<T, KIND, RESIDUAL, 4>(a, share.lanes, where);
    else
        launch_pool<T, KIND, RESIDUAL, 8>(a, share.lanes, where);
}

template <Half T, PoolKind KIND>
void choose_residual(const PoolArgs& a, Launch where) {
    a.residual ? choose_vectors<T, KIND, true>(a, where) : choose_vectors<T, KIND, false>(a, where);
}

// A stride is the average of windows of one token.
template <Half T>
void choose_kind(const PoolArgs& a, Launch where) {
    if (a.kind == PoolKind::max)
        choose_residual<T, PoolKind::max>(a, where);
    else if (a.kind == PoolKind::depthwise)
        choose_residual<T, PoolKind::depthwise>(a, where);
    else
        choose_residual<T, PoolKind::avg>(a, where);
}

}  // namespace

void token_pool(const PoolArgs& a, Launch where) {
    if (a.batch == 0 || a.prefix + a.out_height * a.out_width == 0) return;
    if (a.dtype == Half::bfloat16)
        choose_kind<Half::bfloat16>(a, where);
    else
        choose_kind<Half::float16>(a, where);
}

}  // namespace psvit::cuda
