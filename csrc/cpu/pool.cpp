// Pooling of a grid of tokens, straight on (B, N, C), and its gradients.
//
// Channels are contiguous, so a vector holds channels of one token and no layout ever changes.
// Forward: a task is one row of the pooled grid. Backward: a task is one image and a run of
// channels, and every input token gathers from the windows it is in, so nothing is added to twice.
#include <cmath>

#include "../parallel.h"
#include "kernels.h"
#include "simd.h"

namespace psvit::PSVIT_ISA {
namespace {

constexpr int64_t CHANNELS = 64;  // of a backward task

// One window along one axis: input positions [first, last), and the tap of the first.
struct Span {
    int64_t first, last, tap;

    Span(int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t length) {
        int64_t start = out * stride - padding;
        first = start > 0 ? start : 0;
        last = smaller(start + kernel, length);
        tap = first - start;
    }
    int64_t count() const { return last - first; }
};

// The windows along one axis that an input position is in: [first, last).
struct Windows {
    int64_t first, last;

    Windows(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t out_length) {
        int64_t behind = in + padding - kernel + 1;
        first = behind > 0 ? (behind + stride - 1) / stride : 0;
        last = smaller((in + padding) / stride + 1, out_length);
    }
};

struct Grid {
    const PoolArgs& a;

    Span rows(int64_t oy) const {
        return {oy, a.kernel_h, a.stride_h, a.padding_h, a.height};
    }
    Span columns(int64_t ox) const {
        return {ox, a.kernel_w, a.stride_w, a.padding_w, a.width};
    }
    Windows windows_of_row(int64_t y) const {
        return {y, a.kernel_h, a.stride_h, a.padding_h, a.out_height};
    }
    Windows windows_of_column(int64_t x) const {
        return {x, a.kernel_w, a.stride_w, a.padding_w, a.out_width};
    }
    int64_t tap(int64_t y, int64_t x, int64_t oy, int64_t ox) const {
        int64_t ky = y + a.padding_h - oy * a.stride_h, kx = x + a.padding_w - ox * a.stride_w;
        return ky * a.kernel_w + kx;
    }
};

template <typename T>
PSVIT_INLINE T* token(const View& view, int64_t b, int64_t n) {
    return (T*)view.data + b * view.batch + n * view.row;
}

// --- forward ---------------------------------------------------------------------------------

// Calls use(c, value) for each vector of channels of pooled token (oy, ox).
template <typename T, PoolKind KIND, typename Use>
PSVIT_INLINE void pool_token(const PoolArgs& a, int64_t b, const Span& ys, const Span& xs, Use use) {
    const T* row = token<T>(a.x, b, a.prefix + ys.first * a.width + xs.first);
    const int64_t step = a.x.row, line = a.width * step;
    const int64_t ny = ys.count(), nx = xs.count();
    const float share = 1.0f / float(ny * nx);
    for (int64_t c = 0; c < a.channels; c += W) {
        const int64_t left = a.channels - c;
        vf acc = KIND == PoolKind::max ? splat(-INFINITY) : vf{};
        if (KIND == PoolKind::depthwise && a.bias) acc = load_upto(a.bias + c, left);
        for (int64_t y = 0; y < ny; y++)
            for (int64_t x = 0; x < nx; x++) {
                vf value = load_upto(row + y * line + x * step + c, left);
                if (KIND == PoolKind::max) {
                    acc = (value > acc) | (value != value) ? value : acc;  // NaN wins, and stays
                } else if (KIND == PoolKind::avg) {
                    acc += value;
                } else {
                    int64_t tap = (ys.tap + y) * a.kernel_w + xs.tap + x;
                    acc += value * load_upto(a.weight + tap * a.channels + c, left);
                }
            }
        use(c, KIND == PoolKind::avg ? acc * share : acc);
    }
}

template <typename T>
void normalise(const PoolArgs& a, float* row, T* out) {
    const int64_t channels = a.channels;
    vf total = {};
    for (int64_t c = 0; c < channels; c += W) total += load_upto(row + c, channels - c);
    const float mean = sum_lanes(total) / float(channels);
    total = vf{};
    for (int64_t c = 0; c < channels; c += W) {
        vf x = load_upto(row + c, channels - c) - mean;
        if (channels - c < W) x = lane_numbers() < int32_t(channels - c) ? x : vf{};
        total += x * x;
    }
    const float scale = 1.0f / sqrtf(sum_lanes(total) / float(channels) + a.norm_eps);
    for (int64_t c = 0; c < channels; c += W) {
        const int64_t left = channels - c;
        vf x = (load_upto(row + c, left) - mean) * scale * load_upto(a.norm_weight + c, left);
        if (a.norm_bias) x += load_upto(a.norm_bias + c, left);
        store_upto(out + c, x, left);
    }
}

template <typename T>
void pass_prefix(const PoolArgs& a, int64_t b, float* scratch) {
    for (int64_t n = 0; n < a.prefix; n++) {
        const T* from = token<T>(a.x, b, n);
        T* to = token<T>(a.out, b, n);
        if (!a.norm_weight) {
            memcpy(to, from, size_t(a.channels) * sizeof(T));
            continue;
        }
        for (int64_t c = 0; c < a.channels; c += W)
            store_upto(scratch + c, load_upto(from + c, a.channels - c), a.channels - c);
        normalise(a, scratch, to);
    }
}

template <typename T, PoolKind KIND>
void pool_row(const PoolArgs& a, int64_t task, float* scratch) {
    const int64_t b = task / a.out_height, oy = task % a.out_height;
    if (oy == 0) pass_prefix<T>(a, b, scratch);
    const Span ys = Grid{a}.rows(oy);
    for (int64_t ox = 0; ox < a.out_width; ox++) {
        const Span xs = Grid{a}.columns(ox);
        T* out = token<T>(a.out, b, a.prefix + oy * a.out_width + ox);
        if (a.norm_weight) {
            pool_token<T, KIND>(a, b, ys, xs, [&](int64_t c, vf value) {
                store_upto(scratch + c, value, a.channels - c);
            });
            normalise(a, scratch, out);
        } else {
            pool_token<T, KIND>(a, b, ys, xs, [&](int64_t c, vf value) {
                store_upto(out + c, value, a.channels - c);
            });
        }
    }
}

template <typename T, PoolKind KIND>
void pool(const PoolArgs& a) {
    parallel_tasks(a.batch * a.out_height, a.threads, round_up(a.channels, 16),
                   [&](int64_t task, float* scratch) { pool_row<T, KIND>(a, task, scratch); });
}

// --- backward --------------------------------------------------------------------------------

// For each pooled token of the task's channels, the tap that won: the first of equals, as PyTorch.
template <typename T>
void find_winners(const PoolArgs& a, int64_t b, int64_t c0, int64_t c1, float* winners) {
    for (int64_t oy = 0; oy < a.out_height; oy++)
        for (int64_t ox = 0; ox < a.out_width; ox++) {
            const Span ys = Grid{a}.rows(oy), xs = Grid{a}.columns(ox);
            float* to = winners + (oy * a.out_width + ox) * CHANNELS;
            for (int64_t c = c0; c < c1; c += W) {
                vf best = splat(-INFINITY);
                vf winner = splat(float(ys.tap * a.kernel_w + xs.tap));
                for (int64_t y = ys.first; y < ys.last; y++)
                    for (int64_t x = xs.first; x < xs.last; x++) {
                        const T* from = token<T>(a.x, b, a.prefix + y * a.width + x);
                        vf value = load_upto(from + c, c1 - c);
                        vi wins = (value > best) | (value != value);
                        best = wins ? value : best;
                        winner = wins ? splat(float(Grid{a}.tap(y, x, oy, ox))) : winner;
                    }
                store(to + c - c0, winner);
            }
        }
}

// What window (oy, ox) hands back to the input token at its tap, for one vector of channels.
template <PoolKind KIND>
PSVIT_INLINE vf share_of(const PoolArgs& a, vf g, int64_t oy, int64_t ox, int64_t tap, int64_t c,
                         int64_t c0, const float* winners) {
    if (KIND == PoolKind::max) {
        vf winner = load(winners + (oy * a.out_width + ox) * CHANNELS + c - c0);
        return winner == splat(float(tap)) ? g : vf{};
    }
    if (KIND == PoolKind::avg)
        return g * (1.0f / float(Grid{a}.rows(oy).count() * Grid{a}.columns(ox).count()));
    return g * load_upto(a.weight + tap * a.channels + c, a.channels - c);
}

template <typename T, PoolKind KIND>
void pool_backward_task(const PoolArgs& a, int64_t task, float* winners) {
    const int64_t runs = (a.channels + CHANNELS - 1) / CHANNELS;
    const int64_t b = task / runs, c0 = task % runs * CHANNELS;
    const int64_t c1 = smaller(c0 + CHANNELS, a.channels);
    if (KIND == PoolKind::max) find_winners<T>(a, b, c0, c1, winners);
    for (int64_t n = 0; n < a.prefix; n++)
        memcpy(token<T>(a.dx, b, n) + c0, token<T>(a.out, b, n) + c0, size_t(c1 - c0) * sizeof(T));
    for (int64_t y = 0; y < a.height; y++)
        for (int64_t x = 0; x < a.width; x++) {
            const Windows oys = Grid{a}.windows_of_row(y), oxs = Grid{a}.windows_of_column(x);
            T* dx = token<T>(a.dx, b, a.prefix + y * a.width + x);
            for (int64_t c = c0; c < c1; c += W) {
                vf acc = {};
                for (int64_t oy = oys.first; oy < oys.last; oy++)
                    for (int64_t ox = oxs.first; ox < oxs.last; ox++) {
                        const T* g = token<T>(a.out, b, a.prefix + oy * a.out_width + ox);
                        acc += share_of<KIND>(a, load_upto(g + c, c1 - c), oy, ox,
                                              Grid{a}.tap(y, x, oy, ox), c, c0, winners);
                    }
                store_upto(dx + c, acc, c1 - c);
            }
        }
}

// The gradient of the weights of W channels: one sum over all images and windows, in order.
template <typename T>
void weight_backward_task(const PoolArgs& a, int64_t c, float* sums) {
    const int64_t taps = a.kernel_h * a.kernel_w, left = a.channels - c;
    memset(sums, 0, size_t(taps * W) * sizeof(float));
    vf bias_sum = {};
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t oy = 0; oy < a.out_height; oy++)
            for (int64_t ox = 0; ox < a.out_width; ox++) {
                const Span ys = Grid{a}.rows(oy), xs = Grid{a}.columns(ox);
                const T* from = token<T>(a.out, b, a.prefix + oy * a.out_width + ox);
                vf g = load_upto(from + c, left);
                bias_sum += g;
                for (int64_t y = ys.first; y < ys.last; y++)
                    for (int64_t x = xs.first; x < xs.last; x++) {
                        const T* in = token<T>(a.x, b, a.prefix + y * a.width + x);
                        float* sum = sums + Grid{a}.tap(y, x, oy, ox) * W;
                        store(sum, load(sum) + g * load_upto(in + c, left));
                    }
            }
    for (int64_t tap = 0; tap < taps; tap++)
        store_upto(a.dweight + tap * a.channels + c, load(sums + tap * W), left);
    store_upto(a.dbias + c, bias_sum, left);
}

template <typename T, PoolKind KIND>
void pool_backward(const PoolArgs& a) {
    const int64_t runs = (a.channels + CHANNELS - 1) / CHANNELS;
    const int64_t winners =
        KIND == PoolKind::max ? a.out_height * a.out_width * CHANNELS : 0;
    parallel_tasks(a.batch * runs, a.threads, winners, [&](int64_t task, float* scratch) {
        pool_backward_task<T, KIND>(a, task, scratch);
    });
    if (KIND == PoolKind::depthwise)
        parallel_tasks((a.channels + W - 1) / W, a.threads, a.kernel_h * a.kernel_w * W,
                       [&](int64_t task, float* sums) {
                           weight_backward_task<T>(a, task * W, sums);
                       });
}

template <typename T>
void pool_as(const PoolArgs& a) {
    switch (a.kind) {
        case PoolKind::max: return pool<T, PoolKind::max>(a);
        case PoolKind::avg: return pool<T, PoolKind::avg>(a);
        case PoolKind::depthwise: return pool<T, PoolKind::depthwise>(a);
    }
}

template <typename T>
void pool_backward_as(const PoolArgs& a) {
    switch (a.kind) {
        case PoolKind::max: return pool_backward<T, PoolKind::max>(a);
        case PoolKind::avg: return pool_backward<T, PoolKind::avg>(a);
        case PoolKind::depthwise: return pool_backward<T, PoolKind::depthwise>(a);
    }
}

}  // namespace

void token_pool(const PoolArgs& a) {
    a.dtype == Dtype::float32 ? pool_as<float>(a) : pool_as<bf16>(a);
}

void token_pool_backward(const PoolArgs& a) {
    a.dtype == Dtype::float32 ? pool_backward_as<float>(a) : pool_backward_as<bf16>(a);
}

}  // namespace psvit::PSVIT_ISA
