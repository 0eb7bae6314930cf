// From the accumulators of the tensor cores to rows in memory, 16 bytes a store.
//
// A quad is four neighbouring lanes, which hold one row of an accumulator: of each block of eight
// columns, lane q has columns 2 q and 2 q + 1.
#pragma once
#include "ptx.h"

namespace psvit::cuda {

// Register j of lane i of a quad becomes register i of lane j. Twice is as it was.
PSVIT_DEVICE void quad_transpose(u32 (&r)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            // One of each pair stays, the other is exchanged with the lane across.
            const u32 received = shuffle_xor(upper ? r[i] : r[i + bit], bit);
            r[i] = upper ? received : r[i];
            r[i + bit] = upper ? r[i + bit] : received;
        }
    }
}

PSVIT_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

PSVIT_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// 32 columns of a row, of four neighbouring blocks: pairs[j] is what this lane has of block j.
// Columns before `end`, a multiple of 8, are written; by all lanes of the warp, or by none.
PSVIT_DEVICE void store_halves(uint16_t* columns, int end, u32 (&pairs)[4]) {
    quad_transpose(pairs);
    const int first = threadIdx.x % 4 * 8;
    if (first < end)
        *reinterpret_cast<uint4*>(columns + first) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// 16 bytes of a row of halves, or zeros from `units` on.
PSVIT_DEVICE uint4 load_unit(const uint16_t* row, int unit, int units) {
    return unit < units ? reinterpret_cast<const uint4*>(row)[unit] : uint4{0, 0, 0, 0};
}

// What `store_halves` wrote, or zeros, as it takes it.
PSVIT_DEVICE void load_halves(const uint16_t* columns, int end, u32 (&pairs)[4]) {
    const uint4 loaded = load_unit(columns, threadIdx.x % 4, end / 8);
    pairs[0] = loaded.x, pairs[1] = loaded.y, pairs[2] = loaded.z, pairs[3] = loaded.w;
    quad_transpose(pairs);
}

// 64 columns of a row in 8 bits, of eight blocks: codes[j] is this lane's pair of block 2 j in the
// low 16 bits, and of block 2 j + 1. Columns before `end`, a multiple of 16, are written.
PSVIT_DEVICE void store_codes(uint8_t* columns, int end, u32 (&codes)[4]) {
    quad_transpose(codes);
    const int first = threadIdx.x % 4 * 16;
    if (first < end)
        *reinterpret_cast<uint4*>(columns + first) = {
            byte_permute(codes[0], codes[1], 0x5410), byte_permute(codes[2], codes[3], 0x5410),
            byte_permute(codes[0], codes[1], 0x7632), byte_permute(codes[2], codes[3], 0x7632)};
}

}  // namespace psvit::cuda
