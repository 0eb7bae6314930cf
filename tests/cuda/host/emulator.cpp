// The emulator against the PTX ISA: what its instructions compute, with elements placed by the
// formulas of the sections named below, against plain loops. Exits with 1 at what is wrong.
#include "hopper.h"
#include "require.h"
#include "tiles.h"

#include <utility>
#include <vector>

using namespace psvit::cuda;

namespace {

// Without destructors: this may be a thread of a kernel, on a stack that one of them would free.
void run(int threads, int shared, const std::function<void()>& kernel) {
    const std::string trouble = emulator::run(1, threads, shared, kernel);
    require(trouble.empty(), trouble.c_str(), threads, shared, 0);
}

int random_integer(int from, int to) { return from + std::rand() % (to - from + 1); }

// --- halves, by the definition of IEEE 754 ----------------------------------------------------

// Infinity is what would follow the largest number, if the exponents went on.
double value_of(int code, Half type) {
    const int mantissa_bits = type == Half::float16 ? 10 : 7;
    const int bias = type == Half::float16 ? 15 : 127;
    const int exponent = (code & 0x7FFF) >> mantissa_bits;
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const int significand = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    const double x = std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
    return code & 0x8000 ? -x : x;
}

constexpr int infinity_of(Half type) { return type == Half::float16 ? 0x7C00 : 0x7F80; }

template <Half T>
void check_conversions() {
    const int infinity = infinity_of(T);
    const auto rounds = [](double x, int code) {
        const u32 both = pack<T>(float(x), float(-x));
        require(both == u32(code | (code ^ 0x8000) << 16), "rounding", int(T), code, long(both));
    };
    for (int code = 0; code < infinity; ++code) {
        const double x = value_of(code, T), next = value_of(code + 1, T), middle = (x + next) / 2;
        const float2 both = unpack<T>(u32(code | (code | 0x8000) << 16));
        require(both.x == x && both.y == -x && std::signbit(both.y), "unpack", int(T), code, 0);
        rounds(x, code);
        rounds(middle, code + code % 2);
        rounds(std::nextafter(float(middle), 0.0f), code);
        rounds(std::nextafter(float(middle), INFINITY), code + 1);
    }
    rounds(INFINITY, infinity);
    require(unpack<T>(infinity).x == INFINITY, "infinity", int(T), 0, 0);
    require(std::isnan(unpack<T>(infinity + 1).x), "NaN", int(T), 0, 0);
    require(std::isnan(unpack<T>(pack<T>(NAN, 0)).x), "NaN to a half", int(T), 0, 0);
}

// Units of 2^-60, of which all numbers below are whole ones.
__int128 exact(double x) { return __int128(std::ldexp(x, 60)); }

template <Half T>
void check_fma() {
    const auto some = [] {
        const double x = std::ldexp(random_integer(-255, 255), random_integer(-20, 4));
        return unpack<T>(pack<T>(float(x), 0)).x;
    };
    for (int i = 0; i < 200000; ++i) {
        const float a = some(), b = some(), c = some() / (i % 2 ? 1 : 1024);
        const u32 addend = pack<T>(c, c);
        const float rounded_c = unpack<T>(addend).x;
        const __int128 sum = exact(double(a) * b) + exact(rounded_c);
        const u32 both = fma2<T>(pack<T>(a, 1), pack<T>(b, 0), addend);
        require(unpack<T>(both).y == rounded_c, "1 x 0 + c", int(T), both, addend);
        const int code = both & 0x7FFF;
        if (code == infinity_of(T)) continue;
        const __int128 magnitude = sum < 0 ? -sum : sum;
        const __int128 twice = 2 * magnitude;
        const __int128 here = exact(value_of(code, T)), above = exact(value_of(code + 1, T));
        const __int128 below = code ? exact(value_of(code - 1, T)) : -above;
        const bool even = code % 2 == 0;
        const bool nearest = twice < here + above + even && twice > here + below - even;
        require(nearest && (!code || !(both >> 15 & 1) == (sum > 0)), "fma", int(T), both, addend);
    }
}

// A sum that float64 can't hold, just below the middle of two bfloat16 numbers.
void check_fma_of_far_numbers() {
    const u32 tiny = pack<Half::bfloat16>(std::ldexp(-1.0f, -100), 0);
    const u32 found = fma2<Half::bfloat16>(pack<Half::bfloat16>(7, 0),
                                           pack<Half::bfloat16>(37 / 256.0f, 0), tiny);
    require(unpack<Half::bfloat16>(found).x == 258 / 256.0f, "fma, far apart", found, 0, 0);
}

// --- fragments -----------------------------------------------------------------------------------

// "Matrix Fragments for mma.m16n8k16 with floating point type". Of a warp's 16 rows of
// "Matrix Fragments for wgmma.mma_async.m64nNk16", A and each eight columns of D are the same.
struct Lane {
    int group = int(threadIdx.x) % 32 / 4, in_group = int(threadIdx.x) % 4;
    int a_row(int i) const { return (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8; }
    int a_column(int i) const { return 2 * in_group + (i & 1) + (i >= 4 ? 8 : 0); }
    int b_row(int i) const { return 2 * in_group + (i & 1) + (i >= 2 ? 8 : 0); }
    int b_column() const { return group; }
    int c_row(int i) const { return i < 2 ? group : group + 8; }
    int c_column(int i) const { return 2 * in_group + (i & 1); }
};

struct Matrix {
    int rows, columns;
    std::vector<float> elements;

    // Integers, of which sums of products are exact.
    Matrix(int r, int c) : rows(r), columns(c), elements(r * c) {
        for (float& x : elements) x = float(random_integer(-8, 8));
    }
    float at(int i, int j) const { return elements[i * columns + j]; }
};

float product(const Matrix& a, const Matrix& b, int i, int j) {
    float sum = 0;
    for (int k = 0; k < a.columns; ++k) sum += a.at(i, k) * b.at(k, j);
    return sum;
}

template <Half T>
void a_fragment(u32 (&registers)[4], const Matrix& a, int row, int column) {
    const Lane lane;
    const auto at = [&](int i) { return a.at(row + lane.a_row(i), column + lane.a_column(i)); };
    for (int r = 0; r < 4; ++r) registers[r] = pack<T>(at(2 * r), at(2 * r + 1));
}

template <Half T>
void check_mma() {
    const Matrix a(16, 16), b(16, 8), c(16, 8);
    run(64, 0, [&] {
        const Lane lane;
        u32 fragment[4];
        a_fragment<T>(fragment, a, 0, 0);
        const auto of_b = [&](int i) { return b.at(lane.b_row(i), lane.b_column()); };
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = c.at(lane.c_row(i), lane.c_column(i));
        mma<T>(d, fragment, pack<T>(of_b(0), of_b(1)), pack<T>(of_b(2), of_b(3)));
        for (int i = 0; i < 4; ++i) {
            const int row = lane.c_row(i), column = lane.c_column(i);
            const float expected = c.at(row, column) + product(a, b, row, column);
            require(d[i] == expected, "mma", row, column, long(d[i]));
        }
    });
}

// "ldmatrix": threads 8 m to 8 m + 7 give the rows of matrix m.
void check_ldmatrix() {
    run(32, 32 * 16, [] {
        const int l = int(threadIdx.x), row = l / 4, column = l % 4 * 2;
        const auto place = [](int r) { return 16 * (r * 13 % 32); };  // any order of rows
        const auto element = [](int m, int i, int j) { return u32(m * 64 + i * 8 + j); };
        for (int j = 0; j < 8; j += 2)
            store_shared(place(l) + 2 * j,
                         element(l / 8, l % 8, j) | element(l / 8, l % 8, j + 1) << 16);
        block_sync();
        u32 r[4], transposed[4];
        ldmatrix_x4(r, place(l));
        ldmatrix_x4_transposed(transposed, place(l));
        for (int m = 0; m < 4; ++m) {
            const u32 high = element(m, row, column + 1), of_column = element(m, column + 1, row);
            require(r[m] == (element(m, row, column) | high << 16), "ldmatrix", l, m, r[m]);
            require(transposed[m] == (element(m, column, row) | of_column << 16),
                    "ldmatrix, transposed", l, m, transposed[m]);
        }
    });
}

// --- bulk copies and wgmma -----------------------------------------------------------------------

// Copies `boxes` boxes of a tensor, the next one 128 bytes of columns further on, and waits.
void fetch(u32 to, const TensorMap& map, u32 barrier, const int (&place)[4], int boxes) {
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(barrier, boxes * int(map.box_rows) * ROW_BYTES);
        for (int i = 0; i < boxes; ++i)
            tma_load(to + i * map.box_rows * ROW_BYTES, map, barrier,
                     place[0] + i * ROW_BYTES / map.element_bytes, place[1], place[2], place[3]);
    }
    block_sync();
    mbarrier_wait(barrier, 0);
}

// "Swizzling Modes", 128B: 16-byte column c of row r is at c ^ r % 8; "Bounding box": outside is 0.
template <class Element>
void check_bulk_copy(int c0, int c1, int c2, int c3) {
    constexpr int BYTES = sizeof(Element), COLUMNS = ROW_BYTES / BYTES, ROWS = 40;
    const u64 sizes[4] = {u64(3 * COLUMNS / 2 + 1), 50, 3, 2}, pitch = 2 * ROW_BYTES;
    const u64 strides[4] = {BYTES, pitch, 64 * pitch, 200 * pitch};
    alignas(16) static Element data[400 * 2 * COLUMNS];
    for (Element& x : data) x = Element(random_integer(1, 255));
    TensorMap map;
    require(!emulator::encode(map, data, BYTES, sizes, strides, ROWS), "encode", BYTES, 0, 0);
    run(128, ROWS * ROW_BYTES + 8, [&] {
        PSVIT_SHARED(shared);
        fetch(0, map, ROWS * ROW_BYTES, {c0, c1, c2, c3}, 1);
        for (int i = int(threadIdx.x); i < ROWS * COLUMNS; i += 128) {
            const int row = i / COLUMNS, column = i % COLUMNS, byte = column * BYTES;
            const int x = c0 + column, y = c1 + row;
            const bool inside = 0 <= x && x < int(sizes[0]) && 0 <= y && y < 50 && 0 <= c2 &&
                                c2 < 3 && 0 <= c3 && c3 < 2;
            const Element expected =
                inside ? data[((c3 * 200 + c2 * 64 + y) * pitch) / BYTES + x] : Element(0);
            Element found;
            std::memcpy(&found,
                        shared + row * 128 + (byte / 16 ^ row % 8) * 16 + byte % 16, BYTES);
            require(found == expected, "box", BYTES, row, column);
        }
    });
}

// A matrix as rows of halves in device memory.
template <Half T>
struct Stored {
    std::vector<uint4> memory;
    TensorMap map;

    Stored(const Matrix& m, bool transposed, int box_rows) {
        const u64 rows = transposed ? m.columns : m.rows, columns = transposed ? m.rows : m.columns;
        memory.resize(rows * columns / 8);
        auto* halves = reinterpret_cast<uint16_t*>(memory.data());
        for (u64 i = 0; i < rows * columns; ++i)
            halves[i] = uint16_t(pack<T>(transposed ? m.at(i % columns, i / columns)
                                                    : m.elements[i], 0));
        const u64 sizes[4] = {columns, rows, 1, 1}, strides[4] = {2, 2 * columns, 16, 16};
        require(!emulator::encode(map, halves, 2, sizes, strides, box_rows), "encode", 2, 0, 0);
    }
};

// "Shared Memory Matrix Layout" and "Strides": B with K innermost is N rows, the next 16 of K 32
// bytes further on; with N innermost it is boxes of 64 columns, `leading` bytes apart.
template <Half T, bool TRANSPOSED, int N>
void check_wgmma(bool add, bool a_in_registers) {
    constexpr int K = 64, BOX = 64 * ROW_BYTES, BOXES = TRANSPOSED ? ceil_div(N, 64) : 1;
    constexpr u32 B = BOX, BARRIERS = B + (TRANSPOSED ? BOXES * BOX : N * ROW_BYTES);
    const Matrix a(64, K), b(K, N), c(64, N);
    const Stored<T> stored_a(a, false, 64), stored_b(b, !TRANSPOSED, TRANSPOSED ? K : N);
    run(256, BARRIERS + 16, [&] {
        fetch(0, stored_a.map, BARRIERS, {0, 0, 0, 0}, 1);
        fetch(B, stored_b.map, BARRIERS + 8, {0, 0, 0, 0}, BOXES);
        const Lane lane;
        const int first_row = int(threadIdx.x) % 128 / 32 * 16;
        float d[N / 2];
        for (int i = 0; i < N / 2; ++i) {
            const int row = first_row + lane.c_row(i % 4);
            d[i] = add ? c.at(row, i / 4 * 8 + lane.c_column(i % 4)) : NAN;
        }
        u32 fragments[K / 16][4];
        wgmma_fence();
        for (int k = 0; k < K; k += 16) {
            const u64 leading = TRANSPOSED ? u64((BOX >> 4) - 1) << 16 : 0;
            const u64 of_b = box_descriptor(B + k * (TRANSPOSED ? ROW_BYTES : 2)) + leading;
            a_fragment<T>(fragments[k / 16], a, first_row, k);
            if (a_in_registers)
                wgmma<T, TRANSPOSED>(d, fragments[k / 16], of_b, add || k > 0);
            else
                wgmma<T, TRANSPOSED>(d, box_descriptor(2 * k), of_b, add || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        for (int i = 0; i < N / 2; ++i) {
            const int row = first_row + lane.c_row(i % 4);
            const int column = i / 4 * 8 + lane.c_column(i % 4);
            const float expected = product(a, b, row, column) + (add ? c.at(row, column) : 0);
            require(d[i] == expected, TRANSPOSED ? "wgmma, N innermost" : "wgmma", N, row, column);
        }
    });
}

template <Half T, bool TRANSPOSED>
void check_wgmmas() {
    for (bool add : {false, true})
        for (bool a_in_registers : {false, true}) {
            check_wgmma<T, TRANSPOSED, 64>(add, a_in_registers);
            check_wgmma<T, TRANSPOSED, 128>(add, a_in_registers);
            check_wgmma<T, TRANSPOSED, 136>(add, a_in_registers);
            check_wgmma<T, TRANSPOSED, 208>(add, a_in_registers);
        }
}

// --- the others ----------------------------------------------------------------------------------

// "cp.async": with a source size of 0, zeros, and the source is not read.
void check_copy_async() {
    alignas(16) static u32 data[4 * 64];
    for (u32& x : data) x = u32(random_integer(1, 1 << 30));
    run(64, 64 * 16, [] {
        const int t = int(threadIdx.x);
        copy_async(16 * t, t % 3 ? &data[4 * t] : nullptr, t % 3 != 0);
        copy_async_commit();
        copy_async_wait<0>();
        const uint4 found = load_shared_16(16 * t);
        const u32 words[4] = {found.x, found.y, found.z, found.w};
        for (int i = 0; i < 4; ++i)
            require(words[i] == (t % 3 ? data[4 * t + i] : 0), "copy_async", t, i, words[i]);
    });
}

void check_shuffles() {
    run(64, 0, [] {
        const int t = int(threadIdx.x), warp = t / 32 * 32;
        for (int i = 0; i < 32; ++i) {
            require(shuffle_xor(float(t), i) == float(t ^ i), "shuffle_xor", t, i, 0);
            require(shuffle(t, i) == warp + i, "shuffle", t, i, 0);
            require(shuffle(t, (t + i) % 32) == warp + (t + i) % 32, "shuffle", t, i, 1);
        }
    });
}

void check_byte_permute() {
    const unsigned char bytes[8] = {0x10, 0x21, 0x32, 0x43, 0x54, 0x65, 0x76, 0x87};
    for (u32 selector = 0; selector < 0x8000; ++selector) {
        if (selector & 0x8888) continue;
        const u32 found = byte_permute(0x43322110, 0x87766554, selector);
        for (int i = 0; i < 4; ++i)
            require((found >> 8 * i & 0xFF) == bytes[selector >> 4 * i & 7], "byte_permute",
                    selector, i, found);
    }
}

template <Half T>
void check_maximum() {
    require(std::isnan(maximum(NAN, 1)) && std::isnan(maximum(1, NAN)), "NaN of two", 0, 0, 0);
    const bool negative = std::signbit(maximum(0, -0.0f)) || std::signbit(maximum(-0.0f, 0));
    require(!negative, "the larger of 0 and -0", 0, 0, 0);
    const float2 both = unpack<T>(maximum2<T>(pack<T>(-2, NAN), pack<T>(-INFINITY, 1)));
    require(both.x == -2 && std::isnan(both.y), "maximum2", int(T), 0, 0);
}

template <Half T>
void check_type() {
    check_conversions<T>();
    check_fma<T>();
    check_maximum<T>();
    check_mma<T>();
    check_wgmmas<T, false>();
    check_wgmmas<T, true>();
}

}  // namespace

int main() {
    check_type<Half::bfloat16>();
    check_type<Half::float16>();
    check_fma_of_far_numbers();
    check_ldmatrix();
    check_copy_async();
    check_shuffles();
    check_byte_permute();
    for (auto [c0, c1] : {std::pair{0, 0}, {64, 24}, {-16, -3}, {1000, 0}, {0, 47}, {5, -39}})
        for (auto [c2, c3] : {std::pair{0, 0}, {2, 1}, {3, 0}, {1, -1}}) {
            check_bulk_copy<uint16_t>(c0, c1, c2, c3);
            check_bulk_copy<uint8_t>(c0, c1, c2, c3);
        }
}
