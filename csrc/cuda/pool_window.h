// Which tokens make a token of token_pool's result, and which threads hold its channels.
#pragma once
#include "kernels.h"
#include "ptx.h"

namespace psvit::cuda {

// Of one axis: a window covers the positions [first, first + count), the first of them by its tap
// `tap`; those before are padding.
struct Span {
    int first, count, tap;
};

PSVIT_HOST_DEVICE Span span_of(int out, int kernel, int stride, int padding, int length) {
    const int start = out * stride - padding;
    const int first = start > 0 ? start : 0;
    const int last = start + kernel < length ? start + kernel : length;
    return {first, last - first, first - start};
}

// Token `first` of an image, prefix tokens counted, and those right of it and below it. `tap` is
// the window's own number of the first one, row by row.
struct Window {
    int first, rows, columns, tap;
};

// A prefix token is a window of its own, with a tap that no other window has.
PSVIT_HOST_DEVICE Window window_of(const PoolArgs& a, int token) {
    if (token < a.prefix) return {token, 1, 1, a.kernel_h * a.kernel_w};
    const int place = token - a.prefix;
    const Span y = span_of(place / a.out_width, a.kernel_h, a.stride_h, a.padding_h, a.height);
    const Span x = span_of(place % a.out_width, a.kernel_w, a.stride_w, a.padding_w, a.width);
    return {a.prefix + y.first * a.width + x.first, y.count, x.count, y.tap * a.kernel_w + x.tap};
}

// Vectors of 8 channels are dealt out to the `lanes` threads of a token in turn, `vectors` to each
// at most. The widths of vision transformers, mostly 3 times a power of two, leave no thread idle.
struct Share {
    int lanes, vectors;
};

PSVIT_HOST_DEVICE Share share_of(int channels) {
    const int all = channels / 8;
    int lanes = 1;
    while (lanes < 32 && 4 * lanes < all) lanes *= 2;
    return {lanes, all <= 3 * lanes ? 3 : all <= 4 * lanes ? 4 : 8};
}

// The result's tokens are counted through all images; each block makes `chunk` in a row, so that
// windows that overlap are mostly read by one multiprocessor. No more blocks than run at once: the
// weights of a convolution are fetched once for each.
struct Chunks {
    int blocks, chunk;
};

PSVIT_HOST_DEVICE Chunks chunks_of(int64_t tokens, int tokens_at_once, int most_blocks) {
    const int64_t share = (tokens + most_blocks - 1) / most_blocks;
    const int64_t chunk = share > tokens_at_once ? share : tokens_at_once;
    return {int((tokens + chunk - 1) / chunk), int(chunk)};
}

// Where the weight of a tap and channel is in shared memory. The halves of a vector lie apart:
// neighbouring threads then read neighbouring 16 bytes, and no bank twice.
PSVIT_HOST_DEVICE int weight_place(int tap, int channel, int channels) {
    return tap * channels + channel % 8 / 4 * (channels / 2) + channel / 8 * 4 + channel % 4;
}

// One more tap, of ones, takes the prefix tokens along.
PSVIT_HOST_DEVICE int weight_bytes(const PoolArgs& a) {
    return (a.kernel_h * a.kernel_w + 1) * a.channels * int(sizeof(float));
}

}  // namespace psvit::cuda
