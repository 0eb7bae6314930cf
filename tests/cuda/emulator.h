// Runs a CUDA kernel on a CPU: what csrc/cuda/ptx.h gives, made of C++. For tests.
//
// One fiber a CUDA thread, one block after another. The fibers are resumed in random order, and
// what happens in the background on a GPU (copies to shared memory, wgmma) happens here at a random
// moment between its start and the wait for it: a kernel that forgets to wait, or that overwrites
// what is still being read, gives wrong numbers in some runs. Shared memory starts as NaN;
// addresses outside of it, misaligned ones, threads of a warp at different instructions and
// deadlocks are errors. Not checked: device memory, speed, registers, the memory model (but for
// stores that wgmma reads without a proxy fence), fences of wgmma and of new barriers.
// tests/cuda/host/emulator.cpp holds it to the PTX ISA, emulator_faults.cpp to what it must find.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "kernels.h"

#define PSVIT_DEVICE inline
#define PSVIT_HOST_DEVICE inline
#define PSVIT_SHARED(name) unsigned char* const name = emulator::shared_memory()
#define __global__
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulator {

struct Dim3 {
    unsigned x, y = 1, z = 1;
};

// Runs a grid of one dimension; "", or what went wrong.
std::string run(int blocks, int threads, int shared, const std::function<void()>& kernel);
[[noreturn]] void fail(const std::string& reason);

unsigned char* shared_memory();
// Host address of `bytes` of shared memory, aligned to their number (at most 16).
void* at(uint32_t address, int bytes);
void store(uint32_t address, uint32_t value);
// What this thread stored until now may be read by wgmma.
void proxy_fence();

// Waits until all threads (of this warp; of the block) are here; the last one runs `together` on
// all their arguments, in the order of the threads.
enum class Scope { warp, block };
void rendezvous(Scope scope, void* argument, void (*together)(void** arguments));
// The first `threads` threads of the block wait for each other.
void barrier_sync(int barrier, int threads);

// A tensor in device memory, of which the copy engine fetches boxes.
struct TensorMap {
    const unsigned char* data;
    int element_bytes;
    uint64_t sizes[4], strides[4];
    uint32_t box_rows;
};
const char* encode(TensorMap& map, const void* data, int element_bytes, const uint64_t* sizes,
                   const uint64_t* strides, uint32_t box_rows);

void copy_async(uint32_t to, const void* from, bool inside);
void copy_async_commit();
void copy_async_wait(int pending);
void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, const int* place);

// A product of the warpgroup, of which each warp makes its rows in its own time: accumulators of
// this thread, A in registers or a descriptor.
struct Product {
    float* d;
    int columns;
    bool add, transposed, bfloat16;
    const uint32_t* a_registers;  // null: `a`
    uint64_t a, b;
};
void wgmma(const Product& product);
void wgmma_commit();
void wgmma_wait(int pending);

// Halves as floats, and rounded to the nearest even.
float widen(uint16_t half, bool bfloat16);
uint16_t narrow(float value, bool bfloat16);
uint16_t fused(float a, float b, float c, bool bfloat16);  // a b + c, rounded once

// c (16, 8) += a (16, 16) b (16, 8), of one warp.
struct Mma {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    bool bfloat16;
};
void mma(void** lanes);

struct Ldmatrix {
    uint32_t* r;
    uint32_t address;
    bool transposed;
};
void ldmatrix(void** lanes);

}  // namespace emulator

extern emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace psvit::cuda {

using u32 = uint32_t;
using u64 = uint64_t;
using emulator::TensorMap;
using std::max;
using std::min;

inline void block_sync() { emulator::rendezvous(emulator::Scope::block, nullptr, nullptr); }
using emulator::barrier_sync;
inline void warp_sync() { emulator::rendezvous(emulator::Scope::warp, nullptr, nullptr); }

template <class T>
struct Shuffle {
    T value, result;
    int source;
};

template <class T>
T shuffled(T value, int source) {
    Shuffle<T> mine{value, value, source};
    emulator::rendezvous(emulator::Scope::warp, &mine, [](void** lanes) {
        for (int l = 0; l < 32; ++l) {
            auto* s = static_cast<Shuffle<T>*>(lanes[l]);
            s->result = static_cast<Shuffle<T>*>(lanes[s->source])->value;
        }
    });
    return mine.result;
}
template <class T>
T shuffle_xor(T value, int mask) {
    return shuffled(value, int(threadIdx.x % 32) ^ mask);
}
template <class T>
T shuffle(T value, int lane) {
    return shuffled(value, lane % 32);
}

inline u32 opaque(u32 x) { return x; }
template <int>
void registers_release() {}
template <int>
void registers_acquire() {}

template <class T>
T* computed_once(T* pointer) {
    return pointer;
}

inline uint4 load_global(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16)
        emulator::fail("a load of 16 bytes from an address that is not aligned to them");
    return *static_cast<const uint4*>(from);
}

inline float exp2_approx(float x) { return std::exp2(x); }

inline float maximum(float a, float b) {
    return a != a || a > b || (a == b && !std::signbit(a)) ? a : b;
}

inline u32 byte_permute(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i)
        result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
template <Half T>
u32 pack(float low, float high) {
    constexpr bool b = T == Half::bfloat16;
    return u32(emulator::narrow(high, b)) << 16 | emulator::narrow(low, b);
}
template <Half T>
float2 unpack(u32 packed) {
    constexpr bool b = T == Half::bfloat16;
    return {emulator::widen(uint16_t(packed), b), emulator::widen(uint16_t(packed >> 16), b)};
}
template <Half T>
u32 fma2(u32 a, u32 b, u32 c) {
    constexpr bool bf = T == Half::bfloat16;
    const float2 x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
    return u32(emulator::fused(x.y, y.y, z.y, bf)) << 16 | emulator::fused(x.x, y.x, z.x, bf);
}
template <Half T>
u32 maximum2(u32 a, u32 b) {
    const float2 x = unpack<T>(a), y = unpack<T>(b);
    return pack<T>(maximum(x.x, y.x), maximum(x.y, y.y));
}

inline u32 shared_address(const void* pointer) {
    return u32(static_cast<const unsigned char*>(pointer) - emulator::shared_memory());
}
inline u32 load_shared_u16(u32 address) {
    return *static_cast<const uint16_t*>(emulator::at(address, 2));
}

inline uint4 load_shared_16(u32 address) {
    return *static_cast<const uint4*>(emulator::at(address, 16));
}
inline void store_shared(u32 address, u32 value) { emulator::store(address, value); }
using emulator::proxy_fence;

inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
    emulator::Ldmatrix mine{r, address, false};
    emulator::rendezvous(emulator::Scope::warp, &mine, emulator::ldmatrix);
}
inline void ldmatrix_x4_transposed(u32 (&r)[4], u32 address) {
    emulator::Ldmatrix mine{r, address, true};
    emulator::rendezvous(emulator::Scope::warp, &mine, emulator::ldmatrix);
}

using emulator::copy_async;
using emulator::copy_async_commit;
template <int PENDING>
void copy_async_wait() {
    emulator::copy_async_wait(PENDING);
}

template <Half T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::Mma mine{c, a, {b0, b1}, T == Half::bfloat16};
    emulator::rendezvous(emulator::Scope::warp, &mine, emulator::mma);
}

using emulator::mbarrier_init;
using emulator::mbarrier_wait;
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u32 barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(u32 barrier, int bytes) {
    emulator::mbarrier_arrive(barrier, bytes);
}
inline void tma_load(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
    const int place[4] = {c0, c1, c2, c3};
    emulator::tma_load(to, map, barrier, place);
}

template <Half T, bool TRANSPOSED, int REGISTERS>
void wgmma(float (&d)[REGISTERS], u64 a, u64 b, bool add) {
    emulator::wgmma({d, 2 * REGISTERS, add, TRANSPOSED, T == Half::bfloat16, nullptr, a, b});
}
template <Half T, bool TRANSPOSED, int REGISTERS>
void wgmma(float (&d)[REGISTERS], const u32 (&a)[4], u64 b, bool add) {
    emulator::wgmma({d, 2 * REGISTERS, add, TRANSPOSED, T == Half::bfloat16, a, 0, b});
}
inline void wgmma_fence() {}
using emulator::wgmma_commit;
template <int PENDING>
void wgmma_wait() {
    emulator::wgmma_wait(PENDING);
}
template <int REGISTERS>
void wgmma_hold(float (&)[REGISTERS]) {}

}  // namespace psvit::cuda
