// wgmma: a warpgroup multiplies (64, 16) by (16, N), A from shared memory or registers, B from
// shared memory, in the background. Included by ptx.h.
//
// Accumulators of thread t: row 16 (t / 32) + t % 32 / 4 (+ 8), columns 2 (t % 4) (+ 1) of each
// eight: d[4 j], d[4 j + 1] in the upper row, d[4 j + 2], d[4 j + 3] in the lower one, of columns
// 8 j and on. A in registers is four pairs of halves, of columns 2 (t % 4) (+ 1), upper and lower
// row, then the same eight columns further on: what `pack` makes of accumulators.
#pragma once

#define PSVIT_LIST_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11" \
    ", %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
    ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PSVIT_LIST_64 \
    PSVIT_LIST_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43" \
    ", %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55" \
    ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PSVIT_LIST_68 PSVIT_LIST_64 ", %64, %65, %66, %67"
#define PSVIT_LIST_104 \
    PSVIT_LIST_68 \
    ", %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91" \
    ", %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103"

#define PSVIT_D4_(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PSVIT_D32_(i)                                                                 \
    PSVIT_D4_(i), PSVIT_D4_(i + 4), PSVIT_D4_(i + 8), PSVIT_D4_(i + 12), PSVIT_D4_(i + 16), \
        PSVIT_D4_(i + 20), PSVIT_D4_(i + 24), PSVIT_D4_(i + 28)
#define PSVIT_D32 PSVIT_D32_(0)
#define PSVIT_D64 PSVIT_D32_(0), PSVIT_D32_(32)
#define PSVIT_D68 PSVIT_D64, PSVIT_D4_(64)
#define PSVIT_D104 PSVIT_D64, PSVIT_D32_(64), PSVIT_D4_(96), PSVIT_D4_(100)

// Both forms for one N, with R = N / 2 registers, and one type; operands after those are P0 and on.
#define PSVIT_WGMMA_NAME(N, TYPE) \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE
#define PSVIT_WGMMA(N, R, TYPE, P0, P1, P2, P3, P4, P5, P6)                                     \
    template <int TRANSPOSED>                                                                   \
    PSVIT_DEVICE void wgmma_##TYPE(float (&d)[N / 2], u64 a, u64 b, bool add) {                 \
        asm volatile("{.reg .pred add;\n"                                                       \
                     "setp.ne.b32 add, " P2 ", 0;\n"                                            \
                     PSVIT_WGMMA_NAME(N, TYPE) " {" PSVIT_LIST_##R "}, "                        \
                     P0 ", " P1 ", add, 1, 1, 0, " P3 ";}"                                      \
                     : PSVIT_D##R                                                               \
                     : "l"(a), "l"(b), "r"(int(add)), "n"(TRANSPOSED));                         \
    }                                                                                           \
    template <int TRANSPOSED>                                                                   \
    PSVIT_DEVICE void wgmma_##TYPE(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool add) {     \
        asm volatile("{.reg .pred add;\n"                                                       \
                     "setp.ne.b32 add, " P5 ", 0;\n"                                            \
                     PSVIT_WGMMA_NAME(N, TYPE) " {" PSVIT_LIST_##R "}, "                        \
                     "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", add, 1, 1, " P6 ";}"            \
                     : PSVIT_D##R                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)),       \
                       "n"(TRANSPOSED));                                                        \
    }
#define PSVIT_WGMMA_TYPES(N, R, ...)     \
    PSVIT_WGMMA(N, R, bf16, __VA_ARGS__) \
    PSVIT_WGMMA(N, R, f16, __VA_ARGS__)

namespace psvit::cuda {

PSVIT_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
PSVIT_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
PSVIT_WGMMA_TYPES(136, 68, "%68", "%69", "%70", "%71", "%72", "%73", "%74")
PSVIT_WGMMA_TYPES(208, 104, "%104", "%105", "%106", "%107", "%108", "%109", "%110")

// d (64, 2 x REGISTERS) = a b, + d if `add`. A is a descriptor, or registers; B a descriptor, of a
// matrix with K outermost (tokens of V) if TRANSPOSED, else with K innermost.
template <Half T, bool TRANSPOSED, class A, int REGISTERS>
PSVIT_DEVICE void wgmma(float (&d)[REGISTERS], const A& a, u64 b, bool add) {
    if constexpr (T == Half::bfloat16)
        wgmma_bf16<TRANSPOSED>(d, a, b, add);
    else
        wgmma_f16<TRANSPOSED>(d, a, b, add);
}

// Before the first wgmma that reads or writes registers which other instructions wrote.
PSVIT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PSVIT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed groups are under way.
template <int PENDING>
PSVIT_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of accumulators across this line.
template <int REGISTERS>
PSVIT_DEVICE void wgmma_hold(float (&d)[REGISTERS]) {
#pragma unroll
    for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace psvit::cuda

#undef PSVIT_WGMMA_NAME
#undef PSVIT_WGMMA
#undef PSVIT_WGMMA_TYPES
