// What the emulator must not let pass: small kernels that are right in every run, and that, with
// one fault each, fail or compute wrong numbers in some run. Exits with 1 at a fault not found.
#include "hopper.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace psvit::cuda;

namespace {

constexpr Half T = Half::bfloat16;
constexpr u32 ONES = 0x3F803F80;  // a pair of ones
constexpr int RUNS = 40, THREADS = 256;
// Two boxes of 64 rows, then two barriers.
constexpr u32 BOX = 64 * ROW_BYTES, BARRIER = 2 * BOX, SHARED = BARRIER + 16;

alignas(16) u32 ones[64 * 32];
TensorMap map;
float result[THREADS];  // a right kernel makes it 1

bool all_ones() {
    for (float x : result)
        if (x != 1) return false;
    return true;
}

// `says`: part of the error that some run must end in; null: some run must compute wrong numbers.
template <class Kernel>
void check(const char* name, const char* says, Kernel kernel) {
    for (bool fault : {false, true}) {
        bool right = true, found = false;
        for (int i = 0; i < RUNS; ++i) {
            std::fill_n(result, THREADS, NAN);
            const std::string trouble = emulator::run(1, THREADS, SHARED, [&] { kernel(fault); });
            const bool wrong = !trouble.empty() || !all_ones();
            right = right && !wrong;
            found = found || (says ? trouble.find(says) != trouble.npos : wrong && trouble.empty());
            if (!fault && wrong) std::printf("%s, without a fault: %s\n", name, trouble.c_str());
        }
        if (fault ? found : right) continue;
        std::printf("%s: %s\n", name, fault ? "not found" : "wrong without a fault");
        std::exit(1);
    }
}

int thread() { return int(threadIdx.x); }
void show(float x) { result[thread()] = x; }
float loaded(u32 address) { return unpack<T>(load_shared_u16(address)).x; }

void start_barrier(int arrivals) {
    if (thread() == 0) mbarrier_init(BARRIER, arrivals);
    mbarrier_init_fence();
    block_sync();
}

// By one thread: a box of ones, or of zeros.
void load_box(u32 to, bool of_ones = true) {
    tma_load(to, map, BARRIER, 0, of_ones ? 0 : 64, 0, 0);
}
void expect_box(u32 to, bool of_ones = true) {
    mbarrier_arrive_expect(BARRIER, BOX);
    load_box(to, of_ones);
}

void bring_ones() {
    start_barrier(1);
    if (thread() == 0) expect_box(0);
    mbarrier_wait(BARRIER, 0);
}

// This thread's 32 bytes of the first box.
void fill_box(u32 pair) {
    for (u32 i = 0; i < 8; ++i) store_shared(32 * thread() + 4 * i, pair);
}

struct Product {
    float d[32];

    // 16 columns of ones by 16 columns of ones, all of one box.
    void start(u32 first_byte = 0) {
        const u64 operand = box_descriptor(first_byte);
        wgmma_fence();
        wgmma<T, false>(d, operand, operand, false);
    }
    void show_it() const {
        for (float x : d)
            if (x != 16) return show(x / 16);
        show(1);
    }
};

// --- copies --------------------------------------------------------------------------------------

void bulk_copies() {
    check("a bulk copy read before the wait", nullptr, [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(0);
        if (!fault) mbarrier_wait(BARRIER, 0);
        show(loaded(2 * thread()));
        mbarrier_wait(BARRIER, 0);
    });
    check("a wait for the phase before", nullptr, [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(0);
        mbarrier_wait(BARRIER, fault);
        show(loaded(2 * thread()));
        mbarrier_wait(BARRIER, 0);
    });
    check("a box fetched again before all have seen the first", "deadlock", [](bool fault) {
        bring_ones();
        if (!fault) block_sync();
        if (thread() == 0) expect_box(0);
        mbarrier_wait(BARRIER, 1);
        show(1);
    });
    check("a box given back before it is read", nullptr, [](bool fault) {
        constexpr u32 EMPTY = BARRIER + 8;
        if (thread() == 0) mbarrier_init(EMPTY, THREADS);
        bring_ones();
        block_sync();
        if (fault) mbarrier_arrive(EMPTY);
        show(loaded(2 * thread()));
        if (!fault) mbarrier_arrive(EMPTY);
        if (thread() == 0) {
            mbarrier_wait(EMPTY, 0);
            expect_box(0, false);
        }
        mbarrier_wait(BARRIER, 1);
    });
    check("fewer bytes expected than come", "outlives its block", [](bool fault) {
        start_barrier(1);
        if (thread() == 0) {
            mbarrier_arrive_expect(BARRIER, fault ? BOX : 2 * BOX);
            load_box(0), load_box(BOX);
        }
        mbarrier_wait(BARRIER, 0);
        show(loaded(BOX + 2 * thread()));
    });
    check("a block that ends during a copy", "outlives its block", [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(0);
        if (!fault) mbarrier_wait(BARRIER, 0);
        show(1);
    });
    check("a box beyond shared memory", "of shared memory", [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(fault ? 2 * BOX : BOX);
        mbarrier_wait(BARRIER, 0);
        show(1);
    });
    check("a box at any address", "multiple of 1024", [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(fault ? 128 : 0);
        mbarrier_wait(BARRIER, 0);
        show(1);
    });
}

void small_copies() {
    const auto copy = [](u32 to) {
        copy_async(to, ones, true);
        copy_async_commit();
    };
    check("a copy read before the wait", nullptr, [=](bool fault) {
        copy(16 * thread());
        if (!fault) copy_async_wait<0>();
        show(loaded(16 * thread()));
        copy_async_wait<0>();
    });
    check("a wait for one copy too few", nullptr, [=](bool fault) {
        copy(16 * thread());
        copy(BOX + 16 * thread());
        fault ? copy_async_wait<1>() : copy_async_wait<0>();
        show(loaded(BOX + 16 * thread()));
        copy_async_wait<0>();
    });
    check("another warp's copy read without a barrier", nullptr, [=](bool fault) {
        copy(16 * thread());
        copy_async_wait<0>();
        if (!fault) block_sync();
        show(loaded(16 * (thread() ^ 32)));
    });
    check("a thread that ends during a copy", "outlives its thread", [=](bool fault) {
        copy(16 * thread());
        if (!fault) copy_async_wait<0>();
        show(1);
    });
}

// --- barriers ------------------------------------------------------------------------------------

void barriers() {
    check("a parity of which there is no phase", "deadlock", [](bool fault) {
        bring_ones();
        mbarrier_wait(BARRIER, fault);
        show(1);
    });
    check("fewer arrivals than announced", "deadlock", [](bool fault) {
        start_barrier(THREADS / 32);
        if (thread() % 32 == 0 && !(fault && thread() == 64)) mbarrier_arrive(BARRIER);
        mbarrier_wait(BARRIER, 0);
        show(1);
    });
    check("more arrivals than announced", "more arrivals", [](bool fault) {
        start_barrier(1);
        if (thread() == 0) expect_box(0);
        if (fault && thread() == 64) mbarrier_arrive(BARRIER);
        mbarrier_wait(BARRIER, 0);
        show(1);
    });
    check("a barrier in use before it is one", "not initialised", [](bool fault) {
        if (thread() == 0) mbarrier_init(BARRIER, THREADS);
        if (!fault) block_sync();
        mbarrier_arrive(BARRIER);
        show(1);
    });
    check("a barrier written over", "written over", [](bool fault) {
        start_barrier(THREADS);
        store_shared(fault ? BARRIER : BARRIER - 4, 0);
        mbarrier_arrive(BARRIER);
        show(1);
    });
    check("a warp that skips block_sync", "deadlock", [](bool fault) {
        if (!fault || thread() >= 32) block_sync();
        show(1);
    });
    check("a thread at the barrier of others", "first ones only", [](bool fault) {
        if (thread() < 64 + fault) barrier_sync(1, 64);
        show(1);
    });
    for (int writer : {0, THREADS - 1})
        check("no barrier after one thread wrote", nullptr, [=](bool fault) {
            if (thread() == writer) store_shared(0, ONES);
            if (!fault) block_sync();
            show(loaded(0));
        });
    check("no barrier between two lanes", nullptr, [](bool fault) {
        store_shared(4 * thread(), ONES);
        if (!fault) warp_sync();
        show(loaded(4 * (thread() ^ 1)));
    });
    check("memory written again that a slow warp still reads", nullptr, [](bool fault) {
        store_shared(4 * thread(), ONES);
        block_sync();
        show(loaded(4 * (thread() ^ 64)));
        if (!fault) block_sync();
        for (int i = 0; i < 50; ++i) warp_sync();
        store_shared(4 * thread(), 0);
    });
}

// --- threads and addresses -----------------------------------------------------------------------

void instructions() {
    check("lanes at different instructions", "different instructions", [](bool fault) {
        fault && thread() % 32 == 5 ? void(shuffle(1, 0)) : void(shuffle(1.0f, 0));
        show(1);
    });
    check("an address beyond shared memory", "of shared memory, of which", [](bool fault) {
        store_shared(fault ? SHARED : SHARED - 4, ONES);
        show(1);
    });
    check("an address that is not aligned", "for 16 bytes", [](bool fault) {
        load_shared_16(fault ? 8 : 16);
        show(1);
    });
    check("memory that nobody wrote, times zero", nullptr, [](bool fault) {
        if (!fault) store_shared(4 * thread(), ONES);
        show(loaded(4 * thread()) * 0 + 1);
    });
}

// --- wgmma ---------------------------------------------------------------------------------------

void results_of_products() {
    check("a product read before the wait", nullptr, [](bool fault) {
        Product p = {};
        bring_ones();
        p.start();
        wgmma_commit();
        if (!fault) wgmma_wait<0>();
        p.show_it();
        wgmma_wait<0>();
    });
    check("a wait for one product too few", nullptr, [](bool fault) {
        Product p = {}, q = {};
        bring_ones();
        p.start();
        wgmma_commit();
        q.start();
        wgmma_commit();
        fault ? wgmma_wait<1>() : wgmma_wait<0>();
        q.show_it();
        wgmma_wait<0>();
    });
    check("a wait for what is not committed", nullptr, [](bool fault) {
        Product p = {};
        bring_ones();
        p.start();
        if (!fault) wgmma_commit();
        wgmma_wait<0>();
        p.show_it();
    });
    check("accumulators changed under way", nullptr, [](bool fault) {
        Product p = {};
        bring_ones();
        p.start();
        wgmma_commit();
        if (fault) p.d[0] = 0;
        wgmma_wait<0>();
        p.show_it();
    });
    check("registers of A changed under way", nullptr, [](bool fault) {
        Product p = {};
        bring_ones();
        u32 a[4] = {ONES, ONES, ONES, ONES};
        wgmma_fence();
        wgmma<T, false>(p.d, a, box_descriptor(0), false);
        wgmma_commit();
        if (fault) a[2] = 0;
        wgmma_wait<0>();
        p.show_it();
    });
    check("warps at different products", "different products", [](bool fault) {
        Product p;
        bring_ones();
        p.start(fault && thread() / 32 == 2 ? 32 : 0);
        wgmma_commit();
        wgmma_wait<0>();
        p.show_it();
    });
    check("a product without one warp", "without one of the warps", [](bool fault) {
        Product p;
        bring_ones();
        if (fault && thread() / 32 == 2) return;
        p.start();
        wgmma_commit();
        wgmma_wait<0>();
        p.show_it();
    });
}

void operands_of_products() {
    const auto multiply = [] {
        Product p;
        p.start();
        wgmma_commit();
        wgmma_wait<0>();
        p.show_it();
    };
    check("an operand that another warp still writes", nullptr, [=](bool fault) {
        fill_box(ONES);
        proxy_fence();
        if (!fault) block_sync();
        multiply();
    });
    check("an operand written without a proxy fence", "without a proxy fence", [=](bool fault) {
        fill_box(ONES);
        if (!fault) proxy_fence();
        block_sync();
        multiply();
    });
    check("an operand overwritten before the wait", nullptr, [](bool fault) {
        Product p;
        bring_ones();
        p.start();
        wgmma_commit();
        if (!fault) wgmma_wait<0>(), block_sync();
        fill_box(0);
        proxy_fence();
        wgmma_wait<0>();
        p.show_it();
    });
    check("an operand overwritten that other warps still read", nullptr, [=](bool fault) {
        bring_ones();
        multiply();
        if (!fault) block_sync();
        fill_box(0);
        proxy_fence();
    });
    check("a box fetched again that other warps still read", nullptr, [=](bool fault) {
        bring_ones();
        block_sync();
        multiply();
        if (!fault) block_sync();
        if (thread() == 0) expect_box(0, false);
        mbarrier_wait(BARRIER, 1);
    });
}

}  // namespace

int main() {
    std::fill_n(ones, 64 * 32, ONES);
    const u64 sizes[4] = {64, 64, 1, 1}, strides[4] = {2, ROW_BYTES, 16, 16};
    if (emulator::encode(map, ones, 2, sizes, strides, 64)) return 1;
    bulk_copies();
    small_copies();
    barriers();
    instructions();
    results_of_products();
    operands_of_products();
}
