// Tokens in memory, (B, N, C) with unit stride on C, and LayerNorm of one of them.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace psvit::PSVIT_ISA {

template <typename T>
PSVIT_INLINE T* token(const View& view, int64_t b, int64_t n) {
    return (T*)view.data + b * view.batch + n * view.row;
}

// The sum over the channels of what `f` makes of W of them from c on; four sums run side by side,
// as an addition has to wait for the one before.
template <typename F>
PSVIT_INLINE float sum_channels(int64_t channels, const F& f) {
    vf sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W)
        for (int i = 0; i < 4; i++) sums[i] += f(c + i * W);
    for (; c < channels; c += W) sums[0] += f(c);
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
static void layer_norm(const float* row, int64_t channels, const float* weight, const float* bias,
                       float eps, T* out) {
    const float mean = sum_channels(channels, [&](int64_t c) {
        return load_upto(row + c, channels - c);
    }) / float(channels);
    const float variance = sum_channels(channels, [&](int64_t c) {
        vf x = load_upto(row + c, channels - c) - mean;
        if (channels - c < W) x = lane_numbers() < int32_t(channels - c) ? x : vf{};
        return x * x;
    }) / float(channels);
    const float scale = 1.0f / sqrtf(variance + eps);
    for (int64_t c = 0; c < channels; c += W) {
        const int64_t left = channels - c;
        vf x = (load_upto(row + c, left) - mean) * scale * load_upto(weight + c, left);
        if (bias) x += load_upto(bias + c, left);
        store_upto(out + c, x, left);
    }
}

}  // namespace psvit::PSVIT_ISA
