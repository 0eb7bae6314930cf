#include "emulator.h"

#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <vector>

emulator::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32, WARPGROUP = 128;

struct CopyAsync {
    uint32_t to;
    const void* from;
    bool inside;
};

struct Fiber {
    unsigned thread = 0;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf resume;
    std::deque<std::vector<CopyAsync>> copies;  // the last group is not committed yet
    std::vector<uint32_t> unfenced;             // words of shared memory
};

struct Meeting {
    std::vector<void*> arguments;
    std::vector<Fiber*> waiting;
    void (*together)(void**) = nullptr;
};

// What stands in shared memory where a barrier is.
constexpr uint64_t BARRIER = 0x7FFE7FFE7FFE7FFEu;

struct Mbarrier {
    int arrivals, pending, bytes = 0;
    uint32_t phase = 0;
    std::vector<Fiber*> waiting;
};

struct Tma {
    uint32_t to, barrier;
    TensorMap map;
    int place[4];
    bool late;  // done only when nothing else can be
};

// One warp's part of a product of its warpgroup: 16 of the 64 rows.
struct WarpProduct {
    Product product;  // of the first lane; all agree but for registers
    int warp;
    std::array<float*, WARP> d;
    std::array<const uint32_t*, WARP> a;  // read when the product is made
};

// Of one warp. Nothing but barriers keeps the warps of a warpgroup together.
struct Products {
    size_t issued = 0;
    std::deque<std::vector<WarpProduct>> groups{1};  // the last is not committed
};

// One block under way; `fibers` and the generator outlive it.
struct Block {
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<bool> unfenced;              // words that a thread wrote without a proxy fence
    std::vector<Fiber*> ready, slow;         // those that can run; `slow` when no other can
    unsigned first_slow = 0, last_slow = 0;  // warps
    int done = 0;
    std::map<std::pair<int, int>, Meeting> meetings;  // by scope and number
    std::map<uint32_t, Mbarrier> barriers;
    std::vector<Tma> copies;
    std::map<int, Products> products;             // by warp
    std::map<int, std::vector<Product>> expected;  // by warpgroup: what each of its warps issues
};

std::vector<std::unique_ptr<Fiber>> fibers;
Block block;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
std::string trouble;

uint64_t random_state = [] {
    const char* seed = std::getenv("PSVIT_EMULATOR_SEED");
    return (seed ? std::strtoull(seed, nullptr, 10) : 0) * 2 + 0x9E3779B97F4A7C15u;
}();

uint32_t random_below(uint32_t limit) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return uint32_t((random_state >> 32) * limit >> 32);
}

void suspend() {
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

void wake(Fiber* fiber) {
    const unsigned warp = fiber->thread / WARP;
    const bool slow = block.first_slow <= warp && warp < block.last_slow;
    (slow ? block.slow : block.ready).push_back(fiber);
}

void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting) wake(fiber);
    waiting.clear();
}

void let_others_run_perhaps() {
    if (random_below(2)) return;
    wake(current);
    suspend();
}

void fiber_main() {
    (*kernel)();
    for (const auto& group : current->copies)
        if (!group.empty()) fail("a copy outlives its thread");
    current->done = true;
    ++block.done;
    _longjmp(scheduler, 1);
}

void start_fibers(int threads) {
    while (int(fibers.size()) < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack.reset(new char[STACK]);
    }
    for (int t = 0; t < threads; ++t) {
        Fiber& f = *fibers[t];
        f.thread = t;
        f.started = f.done = false;
        f.copies.assign(1, {});
        f.unfenced.clear();
        getcontext(&f.start);
        f.start.uc_stack = {f.stack.get(), 0, STACK};
        makecontext(&f.start, fiber_main, 0);
        wake(&f);
    }
}

// The swizzle of 128 bytes: 16-byte column c of each 128 bytes is at c ^ (row of 128 bytes % 8).
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void complete_barrier(Mbarrier& b) {
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.arrivals;
    ++b.phase;
    wake(b.waiting);
}

Mbarrier& barrier_at(uint32_t address) {
    auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("a barrier that was not initialised");
    if (std::memcmp(at(address, 8), &BARRIER, 8)) fail("a barrier that was written over");
    return found->second;
}

const unsigned char* element(const Tma& copy, uint32_t column, uint32_t row) {
    const int64_t place[4] = {copy.place[0] + int64_t(column), copy.place[1] + int64_t(row),
                              copy.place[2], copy.place[3]};
    const unsigned char* found = copy.map.data;
    for (int d = 0; d < 4; ++d) {
        if (place[d] < 0 || uint64_t(place[d]) >= copy.map.sizes[d]) return nullptr;
        found += place[d] * int64_t(copy.map.strides[d]);
    }
    return found;
}

void perform(const Tma& copy) {
    const int bytes = copy.map.element_bytes, columns = 128 / bytes;
    for (uint32_t row = 0; row < copy.map.box_rows; ++row)
        for (int column = 0; column < columns; ++column) {
            void* to = at(swizzled(copy.to + row * 128 + column * bytes), bytes);
            const unsigned char* from = element(copy, column, row);
            if (from)
                std::memcpy(to, from, bytes);
            else
                std::memset(to, 0, bytes);
        }
    Mbarrier& b = barrier_at(copy.barrier);
    b.bytes -= int(copy.map.box_rows) * 128;
    complete_barrier(b);
}

bool all_wait() { return block.ready.empty() && block.slow.empty(); }

void perform_some_copy() {
    const uint32_t chosen = random_below(uint32_t(block.copies.size()));
    const Tma copy = block.copies[chosen];
    if (copy.late && !all_wait()) return;
    block.copies.erase(block.copies.begin() + chosen);
    perform(copy);
}

// A warpgroup, or any warps that follow each other, or none.
void choose_slow_warps() {
    const unsigned warps = blockDim.x / WARP, of_group = WARPGROUP / WARP;
    const bool group = random_below(2) && warps > of_group;
    block.first_slow = group ? random_below(warps / of_group) * of_group : random_below(warps);
    block.last_slow = block.first_slow + (group ? of_group : random_below(warps));
    std::vector<Fiber*> all;
    all.swap(block.ready);
    all.insert(all.end(), block.slow.begin(), block.slow.end());
    block.slow.clear();
    wake(all);
}

Fiber* some_ready_fiber() {
    if (random_below(8192) == 0) choose_slow_warps();
    std::vector<Fiber*>& from = block.ready.empty() ? block.slow : block.ready;
    std::swap(from[random_below(uint32_t(from.size()))], from.back());
    Fiber* fiber = from.back();
    from.pop_back();
    return fiber;
}

// Resumes fibers, which come back here, until all are done.
void run_block() {
    if (_setjmp(scheduler) == 2) return;  // a fiber failed; 1: one waits, or is done
    const int threads = int(blockDim.x);
    if (block.done == threads) return;
    // Slow threads are slower than most copies.
    if (!block.copies.empty() && (all_wait() || random_below(block.ready.empty() ? 2 : 8) == 0)) {
        current = nullptr;
        perform_some_copy();
        if (!trouble.empty()) return;
    }
    if (all_wait()) {
        if (block.copies.empty()) trouble = "deadlock: every thread waits";
        return;
    }
    current = some_ready_fiber();
    threadIdx = {current->thread};
    if (current->started) _longjmp(current->resume, 1);
    current->started = true;
    setcontext(&current->start);
}

int number_of(Scope scope) {
    return scope == Scope::warp ? int(current->thread) / WARP : 0;
}

int members(Scope scope) {
    return scope == Scope::warp ? WARP : int(blockDim.x);
}

// Of a matrix in shared memory; those without the swizzle of 128 bytes are unknown here.
struct Descriptor {
    uint32_t start, leading, stride;

    explicit Descriptor(uint64_t bits)
        : start(uint32_t(bits & 0x3FFF) << 4),
          leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
          stride(uint32_t(bits >> 32 & 0x3FFF) << 4) {
        if (bits >> 62 != 1) fail("a descriptor without the swizzle of 128 bytes");
    }
};

float operand(uint32_t address, bool bfloat16) {
    const uint32_t place = swizzled(address);
    const void* half = at(place, 2);
    if (block.unfenced[place / 4]) fail("wgmma of what was written without a proxy fence");
    return widen(*static_cast<const uint16_t*>(half), bfloat16);
}

float a_element(const WarpProduct& p, int row, int k) {
    const Product& product = p.product;
    if (product.a_registers) {
        const uint32_t pair = p.a[row % 8 * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)];
        return widen(uint16_t(pair >> 16 * (k % 2)), product.bfloat16);
    }
    const Descriptor d(product.a);
    const int row_of_64 = p.warp * WARP / 2 % 64 + row;
    const uint32_t address = d.start + row_of_64 / 8 * d.stride + row_of_64 % 8 * 128 + k * 2;
    return operand(address, product.bfloat16);
}

float b_element(const Product& p, int k, int column) {
    const Descriptor d(p.b);
    const uint32_t address =
        d.start + (p.transposed ? column / 64 * d.leading + column % 64 * 2 + k / 8 * d.stride +
                                      k % 8 * 128
                                : column / 8 * d.stride + column % 8 * 128 + k * 2);
    return operand(address, p.bfloat16);
}

void perform(const WarpProduct& p) {
    const int n = p.product.columns;
    std::vector<float> a(16 * 16), b(16 * n), c(16 * n);
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) a[i * 16 + k] = a_element(p, i, k);
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < n; ++j) b[k * n + j] = b_element(p.product, k, j);
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < n; ++j) c[i * n + j] += a[i * 16 + k] * b[k * n + j];
    for (int l = 0; l < WARP; ++l)
        for (int r = 0; r < n / 2; ++r) {
            const int row = l / 4 + r % 4 / 2 * 8, column = r / 4 * 8 + l % 4 * 2 + r % 2;
            float& d = p.d[l][r];
            d = (p.product.add ? d : 0.0f) + c[row * n + column];
        }
}

void perform_products(Products& products, size_t left) {
    while (products.groups.size() > left) {
        for (const WarpProduct& p : products.groups.front()) perform(p);
        products.groups.pop_front();
    }
}

Products& products_of_warp() { return block.products[int(threadIdx.x) / WARP]; }

bool same(const Product& p, const Product& q) {
    return p.columns == q.columns && p.add == q.add && p.transposed == q.transposed &&
           p.bfloat16 == q.bfloat16 && !p.a_registers == !q.a_registers && p.a == q.a && p.b == q.b;
}

// Every warp of a warpgroup takes part in every one of its products.
void expect_same_product(const Product& product) {
    auto& expected = block.expected[int(threadIdx.x) / WARPGROUP];
    const size_t number = products_of_warp().issued++;
    if (number == expected.size()) expected.push_back(product);
    if (!same(expected[number], product)) fail("warps of a warpgroup at different products");
}

std::string left_undone(int threads) {
    if (!block.copies.empty()) return "a copy outlives its block";
    for (int warp = 0; warp < threads / WARP; ++warp)
        if (block.products[warp].issued != block.expected[warp * WARP / WARPGROUP].size())
            return "a product without one of the warps";
    return "";
}

}  // namespace

void fail(const std::string& reason) {
    trouble = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) +
              ": " + reason;
    _longjmp(scheduler, 2);
}

std::string run(int blocks, int threads, int shared, const std::function<void()>& body) {
    if (blocks < 1 || threads < 1 || threads > 1024 || threads % WARP || shared > 227 * 1024)
        return "blocks " + std::to_string(blocks) + ", threads " + std::to_string(threads) +
               ", bytes of shared memory " + std::to_string(shared);
    trouble.clear();
    kernel = &body;
    gridDim = {unsigned(blocks)};
    blockDim = {unsigned(threads)};
    for (unsigned i = 0; i < unsigned(blocks) && trouble.empty(); ++i) {
        blockIdx = {i};
        block = Block();
        block.memory.assign(shared + 1024, 0xFF);  // NaN in every dtype
        const uintptr_t start = reinterpret_cast<uintptr_t>(block.memory.data());
        block.shared = block.memory.data() + (1024 - start % 1024);
        block.shared_bytes = shared;
        block.unfenced.assign(shared / 4 + 1, false);
        choose_slow_warps();
        start_fibers(threads);
        while (block.done < threads && trouble.empty()) run_block();
        if (trouble.empty()) trouble = left_undone(threads);
    }
    return trouble;
}

unsigned char* shared_memory() { return block.shared; }

void* at(uint32_t address, int bytes) {
    if (address + size_t(bytes) > block.shared_bytes)
        fail("address " + std::to_string(address) + " of shared memory, of which there are " +
             std::to_string(block.shared_bytes) + " bytes");
    if (address % bytes)
        fail("address " + std::to_string(address) + " of shared memory, for " +
             std::to_string(bytes) + " bytes");
    return block.shared + address;
}

void store(uint32_t address, uint32_t value) {
    std::memcpy(at(address, 4), &value, 4);
    block.unfenced[address / 4] = true;
    current->unfenced.push_back(address / 4);
}

void proxy_fence() {
    for (uint32_t word : current->unfenced) block.unfenced[word] = false;
    current->unfenced.clear();
}

namespace {

void meet(Meeting& meeting, int size, void* argument, void (*together)(void**)) {
    if (meeting.waiting.empty()) {
        meeting.arguments.assign(size, nullptr);
        meeting.together = together;
    }
    if (meeting.together != together || int(meeting.arguments.size()) != size)
        fail("threads that should act together are at different instructions");
    meeting.arguments[current->thread % size] = argument;
    if (int(meeting.waiting.size()) + 1 < size) {
        meeting.waiting.push_back(current);
        suspend();
        return;
    }
    if (together) together(meeting.arguments.data());
    wake(meeting.waiting);
}

}  // namespace

void rendezvous(Scope scope, void* argument, void (*together)(void**)) {
    meet(block.meetings[{int(scope), number_of(scope)}], members(scope), argument, together);
}

void barrier_sync(int barrier, int threads) {
    if (barrier < 1 || barrier > 15) fail("barrier " + std::to_string(barrier) + " of 1 to 15");
    if (int(current->thread) >= threads) fail("a thread at a barrier of the first ones only");
    meet(block.meetings[{-1, barrier}], threads, nullptr, nullptr);
}

const char* encode(TensorMap& map, const void* data, int element_bytes, const uint64_t* sizes,
                   const uint64_t* strides, uint32_t box_rows) {
    if (reinterpret_cast<uintptr_t>(data) % 16) return "a tensor that is not aligned to 16 bytes";
    if (strides[0] != uint64_t(element_bytes)) return "a stride of the innermost dimension";
    if (box_rows < 1 || box_rows > 256) return "a box of more than 256 rows";
    map = {static_cast<const unsigned char*>(data), element_bytes, {}, {}, box_rows};
    for (int d = 0; d < 4; ++d) {
        if (sizes[d] < 1 || sizes[d] > (uint64_t(1) << 32)) return "a size of 0 or beyond 2^32";
        if (d && (strides[d] % 16 || strides[d] >= (uint64_t(1) << 40)))
            return "a stride that is no multiple of 16 bytes";
        map.sizes[d] = sizes[d];
        map.strides[d] = strides[d];
    }
    return nullptr;
}

// --- copies -----------------------------------------------------------------------------------

void copy_async(uint32_t to, const void* from, bool inside) {
    at(to, 16);
    if (inside && reinterpret_cast<uintptr_t>(from) % 16)
        fail("a copy from an address that is not aligned to 16 bytes");
    current->copies.back().push_back({to, from, inside});
}

void copy_async_commit() {
    current->copies.emplace_back();
    if (random_below(4) == 0) copy_async_wait(0);
}

void copy_async_wait(int pending) {
    while (int(current->copies.size()) > pending + 1) {
        for (const CopyAsync& copy : current->copies.front()) {
            if (copy.inside)
                std::memcpy(at(copy.to, 16), copy.from, 16);
            else
                std::memset(at(copy.to, 16), 0, 16);
        }
        current->copies.pop_front();
    }
}

void mbarrier_init(uint32_t barrier, int arrivals) {
    std::memcpy(at(barrier, 8), &BARRIER, 8);
    block.barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(uint32_t barrier, int bytes) {
    Mbarrier& b = barrier_at(barrier);
    b.bytes += bytes;
    if (--b.pending < 0) fail("more arrivals at a barrier than it was told of");
    complete_barrier(b);
    let_others_run_perhaps();
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while ((barrier_at(barrier).phase & 1) == parity) {
        barrier_at(barrier).waiting.push_back(current);
        suspend();
    }
}

void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, const int* place) {
    if (to % 1024) fail("a box that doesn't start at a multiple of 1024 bytes");
    barrier_at(barrier);
    block.copies.push_back({to, barrier, map, {place[0], place[1], place[2], place[3]},
                            random_below(2) == 0});
}

// --- tensor cores -----------------------------------------------------------------------------

void wgmma(const Product& product) {
    Product mine = product;
    rendezvous(Scope::warp, &mine, [](void** lanes) {
        WarpProduct p{*static_cast<Product*>(lanes[0]), int(threadIdx.x) / WARP, {}, {}};
        for (int l = 0; l < WARP; ++l) {
            const Product& one = *static_cast<Product*>(lanes[l]);
            if (!same(one, p.product)) fail("lanes of a warp at different products");
            p.d[l] = one.d;
            p.a[l] = one.a_registers;
        }
        expect_same_product(p.product);
        Products& products = products_of_warp();
        products.groups.back().push_back(p);
        if (random_below(2)) {  // as early as can be, in order
            perform_products(products, 1);
            for (const WarpProduct& open : products.groups.back()) perform(open);
            products.groups.back().clear();
        }
    });
}

void wgmma_commit() {
    rendezvous(Scope::warp, nullptr, [](void**) { products_of_warp().groups.emplace_back(); });
}

void wgmma_wait(int pending) {
    int left = pending + 1;
    rendezvous(Scope::warp, &left, [](void** lanes) {
        perform_products(products_of_warp(), *static_cast<int*>(lanes[0]));
    });
}

}  // namespace emulator
