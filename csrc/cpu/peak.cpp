// The rate of fused multiply-adds in registers: the roof of every product on this machine.
#include <chrono>

#include "../parallel.h"
#include "kernels.h"
#include "simd.h"

namespace psvit::PSVIT_ISA {
namespace {

// Independent chains, enough to hide the latency of the units.
constexpr int CHAINS = W == 16 ? 24 : 12;
constexpr int64_t STEPS = 1000000;

__attribute__((noinline)) float chains_of_products() {
    vf acc[CHAINS];
    const vf factor = splat(0.999f), term = splat(0.001f);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++) acc[i] = splat(float(i));
    for (int64_t step = 0; step < STEPS; step++)
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * factor + term;
    vf total = {};
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++) total += acc[i];
    return sum_lanes(total);
}

}  // namespace

double peak_gflops(int threads) {
    const auto start = std::chrono::steady_clock::now();
    parallel_tasks(threads, threads, 16, [](int64_t, float* out) { *out = chains_of_products(); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return 2.0 * W * CHAINS * double(STEPS) * threads / seconds.count() / 1e9;
}

}  // namespace psvit::PSVIT_ISA
