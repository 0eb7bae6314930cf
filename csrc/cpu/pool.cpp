// Pooling of a grid of tokens, straight on (B, N, C), and its gradients.
//
// Channels are contiguous, so a vector holds channels of one token and no layout ever changes.
// Forward: a task is one row of the pooled grid. Backward: a task is one image and a run of
// channels, and every input token gathers from the windows it is in, so nothing is added to twice.
#include <cmath>

#include "../parallel.h"
#include "tokens.h"

namespace psvit::PSVIT_ISA {
namespace {


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

constexpr int64_t CHANNELS = 128;  // of a task

// One image and a run of channels.
struct Run {
    int64_t b, first, last;

    static int64_t count(const PoolArgs& a) { return (a.channels + CHANNELS - 1) / CHANNELS; }
    Run(const PoolArgs& a, int64_t task)
        : b(task / count(a)),
          first(task % count(a) * CHANNELS),
          last(smaller(first + CHANNELS, a.channels)) {}

    template <typename T>
    void copy_token(const View& from, const View& to, int64_t n) const {
        memcpy(token<T>(to, b, n) + first, token<T>(from, b, n) + first,
               size_t(last - first) * sizeof(T));
    }
};

// --- forward ---------------------------------------------------------------------------------

// A window as the inner loops see it: the first token, and how to step from tap to tap.
template <typename T>
struct Taps {
    const T* first;
    int64_t step, line;  // to the next column, to the next row
    int64_t columns, rows;
    const float* weight;  // of the first tap
    int64_t weight_step, weight_line;

    Taps(const PoolArgs& a, int64_t b, const Span& ys, const Span& xs)
        : first(token<T>(a.x, b, a.prefix + ys.first * a.width + xs.first)),
          step(a.x.row),
          line(a.x.row * a.width),
          columns(xs.count()),
          rows(ys.count()),
          weight(a.weight + (a.weight ? (ys.tap * a.kernel_w + xs.tap) * a.channels : 0)),
          weight_step(a.channels),
          weight_line(a.channels * a.kernel_w) {}

    // use(address of the tap's channels, address of its weights), in the order of PyTorch.
    template <typename Use>
    PSVIT_MEMBER void each(Use use) const {
        for (int64_t y = 0; y < rows; y++)
            for (int64_t x = 0; x < columns; x++)
                use(first + y * line + x * step, weight + y * weight_line + x * weight_step);
    }
};

// The maximum where a NaN wins and stays, as in PyTorch.
template <typename T>
vf careful_maximum(const Taps<T>& taps, int64_t c, int64_t n) {
    vf acc = splat(-INFINITY);
    taps.each([&](const T* from, const float*) {
        vf value = load_upto(from + c, n);
        acc = (value > acc) | (value != value) ? value : acc;
    });
    return acc;
}

// Running results of one window over VECS vectors of channels.
template <PoolKind KIND, int VECS>
struct Window {
    vf acc[VECS];
    vf sum[VECS];  // for the maximum: not finite where a value may have been NaN

    PSVIT_MEMBER void clear() {
        for (int v = 0; v < VECS; v++) {
            acc[v] = KIND == PoolKind::max ? splat(-INFINITY) : vf{};
            sum[v] = vf{};
        }
    }
    PSVIT_MEMBER void start(int v, vf value) { acc[v] = sum[v] = value; }
    PSVIT_MEMBER void add(int v, vf value) {
        if (KIND == PoolKind::max) {
            acc[v] = maximum(value, acc[v]);
            sum[v] += value;
        } else {
            acc[v] += value;
        }
    }
    PSVIT_MEMBER void add(const Window& other) {
        for (int v = 0; v < VECS; v++) {
            if (KIND == PoolKind::max) {
                acc[v] = maximum(other.acc[v], acc[v]);
                sum[v] += other.sum[v];
            } else {
                acc[v] += other.acc[v];
            }
        }
    }
};

// n channels are left at p; less than a vector only with VECS = 1.
template <int VECS, typename T>
PSVIT_INLINE vf channels_at(const T* p, int v, int64_t n) {
    return VECS > 1 ? load(p + v * W) : load_upto(p, n);
}

// VECS vectors of channels at c of one pooled token.
template <typename T, PoolKind KIND, int VECS, typename Out>
PSVIT_INLINE void finish(const Taps<T>& taps, Window<KIND, VECS>& window, int64_t c, int64_t n,
                         Out* out) {
    for (int v = 0; v < VECS; v++) {
        vf x = window.acc[v];
        if (KIND == PoolKind::avg) x *= 1.0f / float(taps.rows * taps.columns);
        if (KIND == PoolKind::max && any_nan(window.sum[v] * 0.0f))
            x = careful_maximum(taps, c + v * W, n);
        store_upto(out + c + v * W, x, n);
    }
}

template <typename T, int VECS, typename Out>
PSVIT_INLINE void weighted_token(const PoolArgs& a, const Taps<T>& taps, int64_t c, int64_t n,
                                 Out* out) {
    vf acc[VECS];
    for (int v = 0; v < VECS; v++) acc[v] = a.bias ? channels_at<VECS>(a.bias + c, v, n) : vf{};
    taps.each([&](const T* from, const float* weight) {
        for (int v = 0; v < VECS; v++)
            acc[v] += channels_at<VECS>(from + c, v, n) * channels_at<VECS>(weight + c, v, n);
    });
    for (int v = 0; v < VECS; v++) store_upto(out + c + v * W, acc[v], n);
}

// A row of the pooled grid, for VECS vectors of channels at c. Columns are reduced over the rows
// of the window once; what the next window shares with this one is kept for it.
template <typename T, PoolKind KIND, int VECS, typename Out>
PSVIT_INLINE void pool_line(const PoolArgs& a, int64_t b, int64_t oy, int64_t c, int64_t n,
                            Out* out, int64_t out_step) {
    const Grid grid{a};
    const Span ys = grid.rows(oy);
    if (KIND == PoolKind::depthwise) {
        for (int64_t ox = 0; ox < a.out_width; ox++)
            weighted_token<T, VECS>(a, Taps<T>(a, b, ys, grid.columns(ox)), c, n,
                                    out + ox * out_step);
        return;
    }
    Window<KIND, VECS> current, next;
    next.clear();
    int64_t done = 0;  // columns before this one are in `current`, as far as they belong there
    for (int64_t ox = 0; ox < a.out_width; ox++) {
        const Span xs = grid.columns(ox);
        const int64_t shared = grid.columns(ox + 1).first;
        current = next;
        next.clear();
        for (int64_t x = xs.first > done ? xs.first : done; x < xs.last; x++) {
            const T* from = token<T>(a.x, b, a.prefix + ys.first * a.width + x) + c;
            Window<KIND, VECS> column;
            for (int v = 0; v < VECS; v++) column.start(v, channels_at<VECS>(from, v, n));
            for (int64_t y = 1; y < ys.count(); y++)
                for (int v = 0; v < VECS; v++)
                    column.add(v, channels_at<VECS>(from + y * a.width * a.x.row, v, n));
            current.add(column);
            if (x >= shared) next.add(column);
        }
        done = xs.last;
        finish<T, KIND, VECS>(Taps<T>(a, b, ys, xs), current, c, n, out + ox * out_step);
    }
}

// The same where a column may be in more than two windows.
template <typename T, PoolKind KIND, typename Out>
void pool_line_overlapping(const PoolArgs& a, int64_t b, int64_t oy, int64_t first, int64_t last,
                           Out* out, int64_t out_step) {
    const Grid grid{a};
    for (int64_t ox = 0; ox < a.out_width; ox++)
        for (int64_t c = first; c < last; c += W) {
            const Taps<T> taps(a, b, grid.rows(oy), grid.columns(ox));
            Window<KIND, 1> window;
            window.clear();
            taps.each([&](const T* from, const float*) {
                window.add(0, load_upto(from + c, a.channels - c));
            });
            finish<T, KIND, 1>(taps, window, c, a.channels - c, out + ox * out_step);
        }
}

// Channels [first, last) of a row of the pooled grid.
template <typename T, PoolKind KIND, typename Out>
void pool_row(const PoolArgs& a, int64_t b, int64_t oy, int64_t first, int64_t last, Out* out,
              int64_t out_step) {
    if (KIND != PoolKind::depthwise && a.kernel_w > 2 * a.stride_w)
        return pool_line_overlapping<T, KIND>(a, b, oy, first, last, out, out_step);
    constexpr int VECS = W == 16 ? 4 : 2;
    int64_t c = first;
    for (; c + VECS * W <= last; c += VECS * W)
        pool_line<T, KIND, VECS>(a, b, oy, c, VECS * W, out, out_step);
    for (; c < last; c += W) pool_line<T, KIND, 1>(a, b, oy, c, last - c, out, out_step);
}

template <typename T>
void normalise(const PoolArgs& a, const float* row, T* out) {
    layer_norm(row, a.channels, a.norm_weight, a.norm_bias, a.norm_eps, out);
}

// Whole rows of whole tokens, because the normalisation needs every channel.
template <typename T, PoolKind KIND>
void pool_and_normalise(const PoolArgs& a, int64_t task, float* scratch) {
    const int64_t b = task / a.out_height, oy = task % a.out_height;
    for (int64_t n = 0; n < (oy == 0 ? a.prefix : 0); n++) {
        const T* from = token<T>(a.x, b, n);
        for (int64_t c = 0; c < a.channels; c += W)
            store_upto(scratch + c, load_upto(from + c, a.channels - c), a.channels - c);
        normalise(a, scratch, token<T>(a.out, b, n));
    }
    pool_row<T, KIND>(a, b, oy, 0, a.channels, scratch, a.channels);
    T* out = token<T>(a.out, b, a.prefix + oy * a.out_width);
    for (int64_t ox = 0; ox < a.out_width; ox++)
        normalise(a, scratch + ox * a.channels, out + ox * a.out.row);
}

// A run of channels of a whole image: the rows that two windows share are still in the first-level
// cache when the second one needs them.
template <typename T, PoolKind KIND>
void pool_channels(const PoolArgs& a, const Run& run) {
    for (int64_t n = 0; n < a.prefix; n++) run.copy_token<T>(a.x, a.out, n);
    for (int64_t oy = 0; oy < a.out_height; oy++)
        pool_row<T, KIND>(a, run.b, oy, run.first, run.last,
                          token<T>(a.out, run.b, a.prefix + oy * a.out_width), a.out.row);
}

template <typename T, PoolKind KIND>
void pool(const PoolArgs& a) {
    if (a.norm_weight)
        parallel_tasks(
            a.batch * a.out_height, a.threads, a.out_width * a.channels,
            [&](int64_t task, float* memory) { pool_and_normalise<T, KIND>(a, task, memory); });
    else
        parallel_tasks(a.batch * Run::count(a), a.threads, 0, [&](int64_t task, float*) {
            pool_channels<T, KIND>(a, Run(a, task));
        });
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
void pool_backward_run(const PoolArgs& a, const Run& run, float* winners) {
    const int64_t b = run.b, c0 = run.first, c1 = run.last;
    if (KIND == PoolKind::max) find_winners<T>(a, b, c0, c1, winners);
    for (int64_t n = 0; n < a.prefix; n++) run.copy_token<T>(a.out, a.dx, n);
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
    const int64_t winners = KIND == PoolKind::max ? a.out_height * a.out_width * CHANNELS : 0;
    parallel_tasks(a.batch * Run::count(a), a.threads, winners, [&](int64_t task, float* scratch) {
        pool_backward_run<T, KIND>(a, Run(a, task), scratch);
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
