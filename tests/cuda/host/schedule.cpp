// The schedule of the Hopper kernels against its definition, on the host: every row of every head
// in exactly one item, nothing in shared memory twice. Exits with 1 at what is wrong.
#include "require.h"
#include "schedule.h"

#include <cstdio>
#include <utility>
#include <vector>

using namespace psvit::cuda;

namespace {

void check_items(int batch, int heads, int rows, int tile_rows, int multiprocessors) {
    const Schedule s = schedule(batch, heads, rows, tile_rows, multiprocessors);
    std::vector<int> made(batch * heads * rows, 0);
    int widest = 0;
    for (int i = 0; i < s.items; ++i) {
        const Item item = item_of(s, i);
        const bool inside = 0 <= item.batch && item.batch < batch && 0 <= item.head &&
                            item.head < heads && item.first_tile < item.last_tile;
        require(inside, "item outside", i, item.batch, item.head);
        widest = std::max(widest, item.last_tile - item.first_tile);
        for (int row = item.first_tile * tile_rows; row < item.last_tile * tile_rows; ++row)
            if (row < rows) ++made[(item.batch * heads + item.head) * rows + row];
    }
    for (int i = 0; i < int(made.size()); ++i) require(made[i] == 1, "row made", i, made[i], rows);
    // Heads are cut only where whole ones would leave multiprocessors without work.
    const bool whole = batch * heads >= 2 * multiprocessors;
    require(!whole || s.splits == 1, "a head cut", batch * heads, s.splits, multiprocessors);
    require(s.items >= 2 * multiprocessors || widest <= 1 || s.splits * widest >= s.row_tiles,
            "too few items", s.items, widest, multiprocessors);
}

// Boxes of the ring, boxes of V and barriers: aligned, one after the other, within what there is.
void check_memory(int tokens, int dim, Code code) {
    const ApplyMemory m = apply_memory(tokens, dim, code);
    if (m.stages < ApplyMemory::MIN_STAGES) return;
    require(m.stages <= ApplyMemory::MAX_STAGES, "stages", tokens, dim, m.stages);
    require(m.bytes() <= ApplyMemory::MOST, "shared memory", tokens, dim, m.bytes());
    require(m.v_boxes * 64 >= tokens, "tokens of V", tokens, dim, m.v_boxes);
    require((m.v_boxes * 64 - tokens) < box_columns(code), "boxes of V", tokens, dim, m.v_boxes);
    const int boxes_of_the_map = ceil_div(tokens, box_columns(code));
    require(m.v_boxes * 64 == boxes_of_the_map * box_columns(code), "columns", tokens, dim, 0);
    std::vector<std::pair<int, int>> parts;  // from, bytes
    for (int i = 0; i < m.stages; ++i) parts.push_back({m.box(i), ApplyMemory::BOX});
    for (int i = 0; i < m.v_buffers; ++i) parts.push_back({m.v(i), m.v_bytes});
    for (auto [from, bytes] : parts) require(from % 1024 == 0, "alignment", from, bytes, tokens);
    for (int i = 0; i < m.stages; ++i)
        parts.push_back({m.full(i), 8}), parts.push_back({m.empty(i), 8});
    for (int i = 0; i < m.v_buffers; ++i)
        parts.push_back({m.v_full(i), 8}), parts.push_back({m.v_empty(i), 8});
    int end = 0;
    for (auto [from, bytes] : parts) {
        require(from == end, "a gap or an overlap", from, end, tokens);
        end = from + bytes;
    }
    require(end == m.bytes(), "the end", end, m.bytes(), tokens);
}

}  // namespace

int main() {
    for (int rows = 1; rows <= 300; ++rows)
        for (auto [batch, heads] : {std::pair{1, 1}, {1, 3}, {2, 6}, {7, 12}, {32, 12}})
            for (int multiprocessors : {1, 3, 108, 132})
                for (int tile_rows : {64, 128})
                    check_items(batch, heads, rows, tile_rows, multiprocessors);
    for (int tokens = 1; tokens <= 2000; ++tokens)
        for (int dim = 8; dim <= 128; dim += 8)
            for (Code code : {Code::half, Code::uint8, Code::e4m3})
                check_memory(tokens, dim, code);
    std::puts("right");
}
