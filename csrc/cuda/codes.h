// The 8-bit codes of maps (psvit_kernels/codes.py) in registers, two at a time, as packed halves.
#pragma once
#include "ptx.h"

namespace psvit::cuda {

// Two equal halves, packed.
template <Half T>
PSVIT_DEVICE u32 both(float x) {
    return pack<T>(x, x);
}

// a b, rounded once: a product and not a sum, since bfloat16 has no packed product before sm_90.
template <Half T>
PSVIT_DEVICE u32 multiply2(u32 a, u32 b) {
    return fma2<T>(a, b, 0x80008000u);  // - 0: it leaves the sign of a zero as it is
}

// The weights, up to the scale of their row, of codes 2 PAIR and 2 PAIR + 1 of the four in `codes`.
//
// No code but of a row that is NaN stands for NaN, and that row's scale is NaN as well: here it is
// some number.
template <Half T, Code CODE, int PAIR = 0>
PSVIT_DEVICE u32 decode2(u32 codes) {
    static_assert(CODE != Code::half);
    constexpr bool WIDE_EXPONENT = T == Half::bfloat16;
    constexpr u32 SPREAD = PAIR ? 0x4342 : 0x4140;  // a byte of codes, a byte of the other word
    if constexpr (CODE == Code::uint8) {
        // 0.5 + root has few enough digits for a float16 too: three bits further left in it.
        const u32 shifted = WIDE_EXPONENT ? byte_permute(codes, 0x3F, SPREAD)
                                          : byte_permute(codes, 0, SPREAD) * 8 + 0x38003800u;
        const u32 root = fma2<T>(shifted, both<T>(1.0f), both<T>(-0.5f));  // exact
        return multiply2<T>(root, root);
    } else {
        // The same bits with an exponent that counts from elsewhere; exact, subnormal or not.
        const u32 bits = byte_permute(codes, 0, SPREAD) << (WIDE_EXPONENT ? 4 : 7);
        return multiply2<T>(bits, both<T>(WIDE_EXPONENT ? 0x1p120f : 0x1p8f));
    }
}

// Two codes, in the low 16 bits, of e = root^2; `weights` grows by what they stand for, exactly.
// The root, because exp2(x / 2) costs what exp2(x) does, and a square root as much again.
template <Code CODE>
PSVIT_DEVICE u32 encode2(float root0, float root1, float& weights) {
    static_assert(CODE != Code::half);
    if constexpr (CODE == Code::uint8) {
        constexpr float SPAN = 1.4921875f;
        const u32 shifted = pack<Half::bfloat16>(SPAN * root0 + 0.5f, SPAN * root1 + 0.5f);
        const float2 x = unpack<Half::bfloat16>(shifted);
        weights += (x.x - 0.5f) * (x.x - 0.5f) + (x.y - 0.5f) * (x.y - 0.5f);
        return byte_permute(shifted, 0, 0x4420);
    } else {
        // As float16, e has the exponents that 256 e has as e4m3, and seven bits more, which are
        // rounded away here. The conversion is an instruction of sm_89 and up only, and a slow one.
        const u32 e = pack<Half::float16>(root0 * root0, root1 * root1);
        const u32 rounded = e + 0x003F003Fu + (e >> 7 & 0x00010001u);
        const float2 x = unpack<Half::float16>(rounded & 0x7F807F80u);
        weights += 256.0f * (x.x + x.y);
        return byte_permute(rounded >> 7, 0, 0x4420);
    }
}

}  // namespace psvit::cuda
