// Which block makes which rows of which head, and what fits in its shared memory.
#pragma once
#include "kernels.h"
#include "tiles.h"

namespace psvit::cuda {

// The rows of all heads cut in items of `tiles` tiles of ROWS rows, the items of a head together:
// blocks that run at the same time work on neighbouring heads of one image, whose rows of V lie in
// the same lines of L2. Block i makes items i, i + blocks, ...
struct Schedule {
    int heads;       // of one sequence
    int row_tiles;   // of one head
    int tiles;       // of one item
    int splits;      // items of a head
    int items;
};

struct Item {
    int batch, head;
    int first_tile, last_tile;  // of row tiles, the last one not included
};

// Whole heads, so that V is read once, unless that would leave multiprocessors without work.
PSVIT_HOST_DEVICE Schedule schedule(int batch, int heads, int rows, int tile_rows,
                                    int multiprocessors) {
    const int row_tiles = ceil_div(rows, tile_rows);
    const int wanted = ceil_div(2 * multiprocessors, batch * heads);
    const int tiles = ceil_div(row_tiles, wanted < row_tiles ? wanted : row_tiles);
    const int splits = ceil_div(row_tiles, tiles);
    return {heads, row_tiles, tiles, splits, batch * heads * splits};
}

PSVIT_HOST_DEVICE Item item_of(const Schedule& s, int index) {
    const int head = index / s.splits, first = index % s.splits * s.tiles;
    const int last = first + s.tiles < s.row_tiles ? first + s.tiles : s.row_tiles;
    return {head / s.heads, head % s.heads, first, last};
}

// Columns of a map in a box, which is 128 bytes wide.
PSVIT_HOST_DEVICE constexpr int box_columns(Code code) { return code == Code::half ? 64 : 128; }

// Shared memory of a block of apply_hopper: a ring of boxes of the map, V of one head or two, and
// their barriers. A box of the map has 128 rows; V is kept in boxes of 64 tokens by 64 numbers.
struct ApplyMemory {
    static constexpr int BOX = 128 * 128, V_BOX = 64 * 128, ROWS = 128;
    static constexpr int MOST = 227 * 1024;  // what a block may have on sm_90
    static constexpr int MAX_STAGES = 8, MIN_STAGES = 3;

    int v_boxes;    // for 64 numbers of a head: all tokens that boxes of the map have columns for
    int v_bytes;    // of a head
    int v_buffers;  // 2: V of the next head is fetched while this one is in use
    int stages;     // below MIN_STAGES: V is too big

    PSVIT_HOST_DEVICE int box(int stage) const { return stage * BOX; }
    PSVIT_HOST_DEVICE int v(int buffer) const { return stages * BOX + buffer * v_bytes; }
    // Barriers: full and empty of each stage, then of each buffer of V.
    PSVIT_HOST_DEVICE int full(int stage) const { return v(v_buffers) + 16 * stage; }
    PSVIT_HOST_DEVICE int empty(int stage) const { return full(stage) + 8; }
    PSVIT_HOST_DEVICE int v_full(int buffer) const { return full(stages + buffer); }
    PSVIT_HOST_DEVICE int v_empty(int buffer) const { return v_full(buffer) + 8; }
    PSVIT_HOST_DEVICE int bytes() const { return full(stages + v_buffers); }
};

PSVIT_HOST_DEVICE ApplyMemory apply_memory(int tokens, int dim, Code code) {
    const int columns = box_columns(code);
    const int v_boxes = ceil_div(tokens, columns) * columns / 64;
    const int v_bytes = v_boxes * ceil_div(dim, 64) * ApplyMemory::V_BOX;
    const int room = ApplyMemory::MOST - 16 * (ApplyMemory::MAX_STAGES + 2);
    // Two buffers if they leave as many stages as the latency of memory needs: 64 KiB under way.
    const int buffers = 2 * v_bytes + 4 * ApplyMemory::BOX <= room ? 2 : 1;
    const int left = (room - buffers * v_bytes) / ApplyMemory::BOX;
    return {v_boxes, v_bytes, buffers,
            left < ApplyMemory::MAX_STAGES ? left : ApplyMemory::MAX_STAGES};
}

}  // namespace psvit::cuda
