// Vectors of floats for one instruction set.
//
// Every file in this folder is compiled once per instruction set, with PSVIT_ISA naming the
// namespace, so that the linker never merges code that was compiled for different machines.
// Written with the vector extensions of GCC and Clang; intrinsics only where those have no word
// for it (partial loads and stores).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#ifndef PSVIT_ISA
#error "PSVIT_ISA names the instruction set: portable, avx2 or avx512"
#endif

namespace psvit::PSVIT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;          // floats in a vector
constexpr int TILE_ROWS = 6;   // 6 x 4 accumulators, 4 vectors of B, one broadcast: 29 of 32
constexpr int TILE_VECS = 4;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int TILE_ROWS = 6;   // 6 x 2 accumulators, 2 vectors of B, one broadcast: 15 of 16
constexpr int TILE_VECS = 2;
#else
constexpr int W = 4;
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECS = 2;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

#define PSVIT_INLINE static inline __attribute__((always_inline))
#define PSVIT_MEMBER inline __attribute__((always_inline))

PSVIT_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
PSVIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

PSVIT_INLINE vf splat(float x) { return x - vf{}; }
PSVIT_INLINE vi lane_numbers() {
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    return lanes;
}

PSVIT_INLINE float to_float(float x) { return x; }
PSVIT_INLINE float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

PSVIT_INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
PSVIT_INLINE vf load(const bf16* p) {
    return (vf)(__builtin_convertvector(*(const vh_unaligned*)p, vu) << 16);
}

// Rounds to nearest even; every NaN becomes the quiet NaN.
PSVIT_INLINE vh round_to_bf16(vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x != x ? vu{} + 0x7fc0u : rounded, vh);
}

PSVIT_INLINE void store(float* p, vf x) { *(vf_unaligned*)p = x; }
PSVIT_INLINE void store(bf16* p, vf x) { *(vh_unaligned*)p = round_to_bf16(x); }

// The first n < W elements; the other lanes are zero.
PSVIT_INLINE vf load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vf)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < int32_t(n)));
#else
    vf x = {};
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return x;
#endif
}
PSVIT_INLINE vf load_first(const bf16* p, int64_t n) {
#if defined(__AVX512F__)
    __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    return (vf)(__builtin_convertvector((vh)half, vu) << 16);
#else
    uint16_t half[W] = {};
    memcpy(half, p, size_t(n) * 2);
    return load((const bf16*)half);
#endif
}
PSVIT_INLINE void store_first(float* p, vf x, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < int32_t(n)), (__m256)x);
#else
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
#endif
}
PSVIT_INLINE void store_first(bf16* p, vf x, int64_t n) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)round_to_bf16(x));
#else
    vh half = round_to_bf16(x);
    memcpy(p, &half, size_t(n) * 2);
#endif
}

// Any number of leading elements: whole vectors, partial ones and none through the same call.
template <typename T>
PSVIT_INLINE vf load_upto(const T* p, int64_t n) {
    return n >= W ? load(p) : n > 0 ? load_first(p, n) : vf{};
}
template <typename T>
PSVIT_INLINE void store_upto(T* p, vf x, int64_t n) {
    if (n >= W)
        store(p, x);
    else
        store_first(p, x, n);
}

// base[index[i]] in lane i.
PSVIT_INLINE vf gather(const float* base, const int32_t* index) {
#if defined(__AVX512F__)
    return (vf)_mm512_i32gather_ps(_mm512_loadu_si512(index), base, 4);
#elif defined(__AVX2__)
    return (vf)_mm256_i32gather_ps(base, _mm256_loadu_si256((const __m256i*)index), 4);
#else
    vf x;
    for (int i = 0; i < W; i++) x[i] = base[index[i]];
    return x;
#endif
}

// a > b ? a : b, so a NaN in a is passed over.
PSVIT_INLINE vf maximum(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

PSVIT_INLINE bool any_nan(vf x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q)) != 0;
#else
    for (int i = 0; i < W; i++)
        if (x[i] != x[i]) return true;
    return false;
#endif
}

PSVIT_INLINE float sum_lanes(vf x) {
    float lanes[W];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
PSVIT_INLINE float max_lanes(vf x) {
    float lanes[W];
    memcpy(lanes, &x, sizeof lanes);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// exp(x) for x <= 88, within 2 units in the last place; exactly 0 where float32 would underflow.
PSVIT_INLINE vf exponential(vf x) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float lowest = -87.33654f;
    vf t = x * 1.44269504f + shifter;
    vf n = t - shifter;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vu exponent = ((vu)t - (vu)splat(shifter) + 127u) << 23;  // below lowest it wraps
    vf result = p * (vf)exponent;
    return x < lowest ? vf{} : result;  // a NaN compares false and stays one
}

}  // namespace psvit::PSVIT_ISA
