// The instructions that the kernels use, one function each: PTX, and nothing of it elsewhere.
//
// With PSVIT_EMULATED, the same functions come from tests/cuda/emulator.h, which runs a grid on a
// CPU without nvcc: every test of the operations can then run the kernels as they are.
#pragma once
#include <cstdint>

#include "kernels.h"

#ifdef PSVIT_EMULATED
#include "emulator.h"
#else

#include <cuda.h>  // CUtensorMap, a type; no symbol of the driver is linked

#define PSVIT_DEVICE __device__ __forceinline__
#define PSVIT_HOST_DEVICE __host__ __device__ __forceinline__
// All shared memory of a block, aligned as the 128-byte swizzle wants it.
#define PSVIT_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace psvit::cuda {

using u32 = uint32_t;
using u64 = uint64_t;
using TensorMap = CUtensorMap;

// --- threads ----------------------------------------------------------------------------------

PSVIT_DEVICE void block_sync() { __syncthreads(); }
PSVIT_DEVICE void warp_sync() { __syncwarp(); }
// The first `threads` threads of the block wait for each other; barrier 0 is block_sync's.
PSVIT_DEVICE void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <class T>
PSVIT_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

template <class T>
PSVIT_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// The same number, of which the compiler knows nothing: what is computed from it is not computed
// ahead of a loop, to lie in registers all the while.
PSVIT_DEVICE u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Moves registers between warpgroups whose roles need different numbers of them.
template <int REGISTERS>
PSVIT_DEVICE void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
PSVIT_DEVICE void registers_acquire() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// The same pointer, in registers: the compiler won't compute it again at each use.
template <class T>
PSVIT_DEVICE T* computed_once(T* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}

// 16 bytes of device memory that nobody writes while the kernel runs.
PSVIT_DEVICE uint4 load_global(const void* from) { return __ldg(static_cast<const uint4*>(from)); }

// --- arithmetic -------------------------------------------------------------------------------

PSVIT_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// NaN if either is.
PSVIT_DEVICE float maximum(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Of two pairs of halves.
template <Half T>
PSVIT_DEVICE u32 maximum2(u32 a, u32 b) {
    u32 y;
    if constexpr (T == Half::bfloat16)
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    else
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

PSVIT_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// Two floats rounded to halves; `low` in the low 16 bits.
template <Half T>
PSVIT_DEVICE u32 pack(float low, float high) {
    u32 packed;
    if constexpr (T == Half::bfloat16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <Half T>
PSVIT_DEVICE float2 unpack(u32 packed) {
    if constexpr (T == Half::bfloat16) {
        return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u)};
    } else {
        float2 both;
        asm("{.reg .f16 low, high;\n"
            "mov.b32 {low, high}, %2;\n"
            "cvt.f32.f16 %0, low;\n"
            "cvt.f32.f16 %1, high;}"
            : "=f"(both.x), "=f"(both.y)
            : "r"(packed));
        return both;
    }
}

// a b + c of two halves each, rounded once.
template <Half T>
PSVIT_DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (T == Half::bfloat16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// --- shared memory ----------------------------------------------------------------------------

PSVIT_DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

PSVIT_DEVICE u32 load_shared_u16(u32 address) {
    uint16_t value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
    return value;
}

PSVIT_DEVICE uint4 load_shared_16(u32 address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address));
    return value;
}
PSVIT_DEVICE void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
// Before a barrier: what this thread wrote to shared memory is there for wgmma and the copy engine.
PSVIT_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8x8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8.
PSVIT_DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
PSVIT_DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes of device memory to shared memory, in the background; zeros if not `inside`.
PSVIT_DEVICE void copy_async(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
PSVIT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are under way.
template <int PENDING>
PSVIT_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- tensor cores, one warp -------------------------------------------------------------------

// c (16, 8) += a (16, 16) b (16, 8)
template <Half T>
PSVIT_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (T == Half::bfloat16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- barriers in shared memory and bulk copies (sm_90) ------------------------------------------

PSVIT_DEVICE void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine; a block barrier must follow.
PSVIT_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PSVIT_DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and tells how many bytes copies will bring before the phase is complete.
PSVIT_DEVICE void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first one.
PSVIT_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// One box of a tensor at (c0, c1, c2, c3), innermost first, zeros where it lies outside.
PSVIT_DEVICE void tma_load(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2,
                           int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

}  // namespace psvit::cuda

#include "wgmma.h"

#endif
