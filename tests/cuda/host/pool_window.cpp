// The index arithmetic of token_pool against the definition, on the host: which tokens a window
// covers, who holds which channels, which block makes which tokens. Exits with 1 at what is wrong.
#include "pool_window.h"
#include "require.h"

#include <vector>

using namespace psvit::cuda;

namespace {

PoolArgs pool_args(int height, int width, int kernel, int stride, int padding, int prefix) {
    PoolArgs a = {};
    a.prefix = prefix, a.height = height, a.width = width;
    a.kernel_h = kernel, a.kernel_w = kernel + 1;
    a.stride_h = stride, a.stride_w = stride % 3 + 1;
    a.padding_h = padding, a.padding_w = padding;
    a.out_height = (height + 2 * padding - a.kernel_h) / a.stride_h + 1;
    a.out_width = (width + 2 * padding - a.kernel_w) / a.stride_w + 1;
    return a;
}

// Every tap of every window: in the grid exactly if the window has it, and then at its place.
void check_windows(const PoolArgs& a) {
    for (int t = 0; t < a.prefix; ++t) {
        const Window w = window_of(a, t);
        const bool alone = w.first == t && w.rows == 1 && w.columns == 1;
        require(alone && w.tap == a.kernel_h * a.kernel_w, "prefix token", t, w.first, w.tap);
    }
    for (int i = 0; i < a.out_height * a.out_width; ++i) {
        const Window w = window_of(a, a.prefix + i);
        std::vector<int> found(a.kernel_h * a.kernel_w, -1);
        for (int row = 0; row < w.rows; ++row)
            for (int column = 0; column < w.columns; ++column)
                found.at(w.tap + row * a.kernel_w + column) = w.first + row * a.width + column;
        for (int tap = 0; tap < a.kernel_h * a.kernel_w; ++tap) {
            const int y = i / a.out_width * a.stride_h - a.padding_h + tap / a.kernel_w;
            const int x = i % a.out_width * a.stride_w - a.padding_w + tap % a.kernel_w;
            const bool inside = 0 <= y && y < a.height && 0 <= x && x < a.width;
            const int token = inside ? a.prefix + y * a.width + x : -1;
            require(found[tap] == token, "token of a tap", found[tap], token, tap);
        }
        require(w.rows > 0 && w.columns > 0, "empty window", i, w.rows, w.columns);
    }
}

void check_all_windows() {
    for (int height = 1; height <= 9; ++height)
        for (int width = 1; width <= 9; ++width)
            for (int kernel = 1; kernel <= 6; ++kernel)
                for (int padding = 0; 2 * padding <= kernel; ++padding) {
                    const int least = kernel - 2 * padding;
                    for (int stride = 1; stride <= 7 && height >= least && width > least; ++stride)
                        check_windows(
                            pool_args(height, width, kernel, stride, padding, stride % 3));
                }
}

void check_shares() {
    for (int channels = 8; channels <= MAX_POOL_CHANNELS; channels += 8) {
        const Share s = share_of(channels);
        const int places = s.lanes * s.vectors, all = channels / 8;
        require(places >= all && 32 % s.lanes == 0, "share", channels, s.lanes, s.vectors);
        // No more than a third is idle from 24 vectors to 4 a thread of a whole warp.
        const bool busy = all < 24 || all > 128 || 3 * all >= 2 * places;
        require(busy, "idle threads", channels, s.lanes, s.vectors);
    }
}

void check_chunks() {
    for (int64_t tokens = 1; tokens < 5000; tokens += tokens < 300 ? 1 : 37)
        for (int at_once : {4, 8, 128})
            for (int most : {3, 15, 660}) {
                const Chunks c = chunks_of(tokens, at_once, most);
                const bool all = int64_t(c.blocks) * c.chunk >= tokens;
                const bool none_idle = int64_t(c.blocks - 1) * c.chunk < tokens;
                require(all && none_idle && c.blocks <= most, "chunks", int(tokens), at_once, most);
            }
}

// Each weight has a place of its own, and 4 neighbouring channels neighbouring ones.
void check_weight_places() {
    for (int channels : {8, 24, 64, 384}) {
        std::vector<bool> taken(5 * channels);
        for (int tap = 0; tap < 5; ++tap)
            for (int channel = 0; channel < channels; ++channel) {
                const int place = weight_place(tap, channel, channels);
                require(!taken.at(place), "place taken twice", channels, tap, channel);
                taken[place] = true;
                const int four = weight_place(tap, channel / 4 * 4, channels);
                const bool together = place == four + channel % 4 && four % 4 == 0;
                require(together, "place of a weight", channels, tap, channel);
            }
    }
}

}  // namespace

int main() {
    check_all_windows();
    check_shares();
    check_chunks();
    check_weight_places();
}
