// What the two sm_90a kernels share: boxes that the copy engine has brought, as operands of wgmma.
#pragma once
#include "launch.h"
#include "ptx.h"

namespace psvit::cuda {

// Rows of 128 bytes, their 16-byte columns exchanged as SWIZZLE_128B does, eight rows after eight.
constexpr int ROW_BYTES = 128, EIGHT_ROWS = 8 * ROW_BYTES;

// The operand that starts at this address of a box: 16 columns of its rows, whose next 16 are 32
// bytes further on; or, transposed, 16 of its rows, the next 16 after 16 x ROW_BYTES.
PSVIT_DEVICE u64 box_descriptor(u32 address) {
    constexpr u64 swizzle_128_bytes = u64(1) << 62, stride = u64(EIGHT_ROWS >> 4) << 32;
    constexpr u64 leading = u64(1) << 16;  // of no meaning where a row is one box wide
    return swizzle_128_bytes | stride | leading | (address & 0x3FFFF) >> 4;
}

// A block of one warpgroup that starts copies, by its first thread, and two that multiply.
constexpr int WARPGROUPS = 2, MULTIPLYING_WARPS = 4 * WARPGROUPS;
constexpr int RING_THREADS = 128 * (WARPGROUPS + 1);
// Of 168 a thread: what copying does without, multiplying gets.
constexpr int COPYING_REGISTERS = 24, MULTIPLYING_REGISTERS = 240;

// Both get the address of shared memory, `multiply` the number of its warpgroup as well.
template <class Initialise, class Copy, class Multiply>
PSVIT_DEVICE void copy_and_multiply(Initialise initialise, Copy copy, Multiply multiply) {
    PSVIT_SHARED(shared);
    const u32 base = shared_address(shared);
    if (threadIdx.x == 0) {
        initialise(base);
        mbarrier_init_fence();
    }
    block_sync();
    const int warp = shuffle(threadIdx.x / 32, 0);  // the same for all, as the compiler now knows
    if (warp < MULTIPLYING_WARPS) {
        registers_acquire<MULTIPLYING_REGISTERS>();
        multiply(base, warp / 4);
    } else {
        registers_release<COPYING_REGISTERS>();
        if (threadIdx.x == 32 * MULTIPLYING_WARPS) copy(base);
    }
}

// Tells that this warp needs what a barrier guards no longer.
PSVIT_DEVICE void release(u32 empty) {
    warp_sync();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

// A place in a ring of buffers, and the parity of the phase in which it is filled.
struct Place {
    int stage = 0;
    u32 parity = 0;

    PSVIT_DEVICE void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A tensor map of a Tensor4, (columns, rows, heads, batch) innermost first.
inline TensorShape tensor_shape(const Tensor4& t, int element_bytes, int columns, int rows,
                                int heads, int batch, int box_rows) {
    // The stride of a dimension of size 1 may be anything, but must be one that the driver takes.
    const auto stride = [&](int64_t elements, int size) {
        return size > 1 ? u64(elements * element_bytes) : u64(16);
    };
    return {t.data,
            element_bytes,
            {u64(columns), u64(rows), u64(heads), u64(batch)},
            {u64(element_bytes), stride(t.stride_n, rows), stride(t.stride_h, heads),
             stride(t.stride_b, batch)},
            u32(box_rows)};
}

}  // namespace psvit::cuda
