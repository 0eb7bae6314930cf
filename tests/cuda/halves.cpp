// Halves: their arithmetic, and where mma and ldmatrix have them in the registers of a warp.
#include "emulator.h"

namespace emulator {
namespace {

constexpr int WARP = 32;

uint32_t bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    return b;
}

float from_bits(uint32_t b) {
    float x;
    std::memcpy(&x, &b, 4);
    return x;
}

}  // namespace

float widen(uint16_t half, bool bfloat16) {
    if (bfloat16) return from_bits(uint32_t(half) << 16);
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(float(mantissa | 1024), int(exponent) - 25)
                             : std::ldexp(float(mantissa), -24);
    return half >> 15 ? -x : x;
}

uint16_t narrow(float value, bool bfloat16) {
    const uint32_t b = bits(value);
    if (bfloat16) {
        if (std::isnan(value)) return 0x7FFF;
        return uint16_t((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
    const uint16_t sign = uint16_t(b >> 16 & 0x8000);
    const float x = std::fabs(value);
    if (std::isnan(value)) return 0x7FFF;
    if (x >= 65520.0f) return sign | 0x7C00;
    const int exponent = std::max(-14, x > 0 ? std::ilogb(x) : -14);
    // In units of the last place, rounded to the nearest even by the current rounding mode.
    const int units = int(std::nearbyint(std::ldexp(x, 10 - exponent)));
    return sign | uint16_t(((exponent + 14) << 10) + units);
}

// float64 holds the product; float32 takes the sum rounded to odd, of which `narrow` makes the half
// that is nearest to the sum itself.
uint16_t fused(float a, float b, float c, bool bfloat16) {
    const double product = double(a) * b, sum = product + c;
    float x = float(sum);
    if (!std::isfinite(sum)) return narrow(x, bfloat16);
    const double of_c = sum - product, lost = (product - (sum - of_c)) + (c - of_c);
    const double left = (sum - x) + lost;
    if (left != 0 && bits(x) % 2 == 0) x = std::nextafter(x, left > 0 ? INFINITY : -INFINITY);
    return narrow(x, bfloat16);
}

void mma(void** lanes) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int l = 0; l < WARP; ++l) {
        const Mma& m = *static_cast<Mma*>(lanes[l]);
        const int row = l / 4, pair = l % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r)
                a[row + r % 2 * 8][pair + r / 2 * 8 + i] =
                    widen(uint16_t(m.a[r] >> 16 * i), m.bfloat16);
            for (int r = 0; r < 2; ++r)
                b[pair + r * 8 + i][row] = widen(uint16_t(m.b[r] >> 16 * i), m.bfloat16);
        }
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < WARP; ++l) {
        float* d = static_cast<Mma*>(lanes[l])->c;
        for (int r = 0; r < 4; ++r) d[r] += c[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
    }
}

void ldmatrix(void** lanes) {
    uint16_t rows[4][8][8];
    for (int l = 0; l < WARP; ++l)
        std::memcpy(rows[l / 8][l % 8], at(static_cast<Ldmatrix*>(lanes[l])->address, 16), 16);
    for (int l = 0; l < WARP; ++l) {
        Ldmatrix& m = *static_cast<Ldmatrix*>(lanes[l]);
        for (int i = 0; i < 4; ++i) {
            const int row = l / 4, pair = l % 4 * 2;
            const uint32_t low = m.transposed ? rows[i][pair][row] : rows[i][row][pair];
            const uint32_t high = m.transposed ? rows[i][pair + 1][row] : rows[i][row][pair + 1];
            m.r[i] = high << 16 | low;
        }
    }
}

}  // namespace emulator
