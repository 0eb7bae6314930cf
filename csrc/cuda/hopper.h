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
