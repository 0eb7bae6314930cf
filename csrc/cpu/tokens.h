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

template <typename T>
static void layer_norm(const float* row, int64_t channels, const float* weight, const float* bias,
                       float eps, T* out) {
    vf total = {};
    for (int64_t c = 0; c < channels; c += W) total += load_upto(row + c, channels - c);
    const float mean = sum_lanes(total) / float(channels);
    total = vf{};
    for (int64_t c = 0; c < channels; c += W) {
        vf x = load_upto(row + c, channels - c) - mean;
        if (channels - c < W) x = lane_numbers() < int32_t(channels - c) ? x : vf{};
        total += x * x;
    }
    const float scale = 1.0f / sqrtf(sum_lanes(total) / float(channels) + eps);
    for (int64_t c = 0; c < channels; c += W) {
        const int64_t left = channels - c;
        vf x = (load_upto(row + c, left) - mean) * scale * load_upto(weight + c, left);
        if (bias) x += load_upto(bias + c, left);
        store_upto(out + c, x, left);
    }
}

}  // namespace psvit::PSVIT_ISA
