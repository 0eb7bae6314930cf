// Where things are: in shared memory, in the fragments of the tensor cores, in a grid. Arithmetic
// alone; tests/cuda/host/tiles.cpp goes through it.
#pragma once
#include <cstdint>

#include "ptx.h"

namespace psvit::cuda {

PSVIT_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --- tiles in shared memory, of rows of UNITS units of 16 bytes ---------------------------------

// Byte at which a unit of a row is. Units of a row are exchanged so that the eight rows which
// ldmatrix reads at once lie in different banks: rows that follow each other, as well as those of
// `column_of` for any run. Linear in the bits of row and unit: of sums of numbers that share no bit
// it is the exclusive or, so that a lane's part is computed once, and the rest by the compiler.
template <int UNITS>
PSVIT_HOST_DEVICE constexpr int unit_at(int row, int unit) {
    static_assert(UNITS == 4 || UNITS % 8 == 0);
    const int exchanged = UNITS == 4 ? row >> 1 & 3 : (row ^ row >> 2 ^ row >> 4) & 7;
    return (row * UNITS + (unit ^ exchanged)) * 16;
}

// --- fragments ----------------------------------------------------------------------------------

// The tensor cores number the columns of a matrix in blocks of eight, of which lane q of a quad has
// the columns 2 q and 2 q + 1. Which column stands at which number is free where the rows of the
// other operand are fetched in the same order. Here those of one lane make a run: of `run` / 2
// neighbouring blocks, it has run q, .., run q + run - 1. A run of 2 is the order as it is, one of
// 4 is how ldmatrix hands out bytes, one of 8 halves or 16 bytes leaves as one store. Linear as
// `unit_at` is.
PSVIT_HOST_DEVICE constexpr int column_of(int run, int number) {
    const int block = number / 8, blocks = run / 2;
    return block / blocks * (4 * run) + number % 8 / 2 * run + block % blocks * 2 + number % 2;
}

// Run of a block of eight in a row of `width` columns: as long as there are enough blocks for it;
// the last 16 columns may be left.
PSVIT_HOST_DEVICE constexpr int run_at(int width, int longest, int block) {
    return block * 8 < width / (4 * longest) * (4 * longest) ? longest : 4;
}

// Of the lane, for ldmatrix: which row of 16, and which of two units, it gives the address of. The
// four matrices are, in this order, upper and lower rows of the first unit, then of the second.
PSVIT_HOST_DEVICE constexpr int fragment_row(int lane) { return lane % 16; }
PSVIT_HOST_DEVICE constexpr int fragment_unit(int lane) { return lane / 16; }

// --- grids --------------------------------------------------------------------------------------

struct Part {
    int batch, head;
    int index;  // of the parts of the head
};

// The parts of a head are neighbours in the grid: what they all read comes from memory once, and
// from the L2 cache then.
PSVIT_HOST_DEVICE constexpr Part part_of(int block, int heads, int parts) {
    const int head = block / parts;
    return {head / heads, head % heads, block % parts};
}

}  // namespace psvit::cuda
