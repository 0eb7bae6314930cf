// Where the sm_80 kernels find things, on the host: every element in one place, each lane's columns
// side by side, eight rows of ldmatrix in different banks. Exits with 1 at what is wrong.
#include "require.h"
#include "tiles.h"

#include <set>
#include <vector>

using namespace psvit::cuda;

namespace {

const int RUNS[] = {2, 4, 8, 16};

// Units of 16 bytes that lie in different banks: all eight of 128 bytes.
template <class Row>
void check_banks(int (*at)(int, int), int unit, Row row) {
    std::set<int> places;
    for (int i = 0; i < 8; ++i) places.insert(at(row(i), unit) / 16 % 8);
    require(places.size() == 8, "banks", row(0), unit, int(places.size()));
}

template <int UNITS>
void check_tile(int rows) {
    std::vector<int> used(rows * UNITS, 0);
    for (int row = 0; row < rows; ++row)
        for (int unit = 0; unit < UNITS; ++unit) {
            const int place = unit_at<UNITS>(row, unit);
            require(place % 16 == 0 && place < rows * UNITS * 16, "outside", row, unit, place);
            require(++used[place / 16] == 1, "twice", row, unit, place);
            for (int bit = 1; bit <= row; bit *= 2)
                require(!(row & bit) ||
                            place == (unit_at<UNITS>(bit, 0) ^ unit_at<UNITS>(row - bit, unit)),
                        "not linear", row, unit, bit);
            require(place == (unit_at<UNITS>(row, 0) ^ unit_at<UNITS>(0, unit)), "not linear", row,
                    unit, 0);
        }
    for (int unit = 0; unit < UNITS; ++unit)
        for (int first = 0; first + 8 <= rows; first += 8)
            check_banks(unit_at<UNITS>, unit, [&](int i) { return first + i; });
}

// What ldmatrix reads of a tile whose rows are in the order of a run.
template <int UNITS>
void check_runs() {
    for (int run : RUNS)
        for (int unit = 0; unit < UNITS; ++unit)
            for (int first = 0; first < 256; first += 8)
                check_banks(unit_at<UNITS>, unit, [&](int i) { return column_of(run, first + i); });
}

void check_order(int run) {
    std::set<int> columns;
    for (int number = 0; number < 512; ++number) {
        columns.insert(column_of(run, number));
        const int first = number / 16 * 16;
        require(column_of(run, number) == (column_of(run, first) ^ column_of(run, number - first)),
                "not linear", run, number, first);
    }
    require(columns.size() == 512 && *columns.rbegin() == 511, "order", run, 0, 0);
    // Lane q of a quad, over the blocks of a run.
    for (int q = 0; q < 4; ++q)
        for (int i = 0; i < run; ++i)
            require(column_of(run, i / 2 * 8 + 2 * q + i % 2) == run * q + i, "run", run, q, i);
}

// Every column of a row of scores, in runs of the longest kind and a last group of 16.
void check_width(int width, int longest) {
    std::set<int> columns;
    for (int number = 0; number < width; ++number)
        columns.insert(column_of(run_at(width, longest, number / 8), number));
    require(int(columns.size()) == width && *columns.begin() == 0 && *columns.rbegin() == width - 1,
            "columns of a row", width, longest, int(columns.size()));
}

// Blocks of a grid: every part of every head once, and the parts of a head are neighbours.
void check_grid(int batch, int heads, int parts) {
    for (int block = 0; block < batch * heads * parts; ++block) {
        const Part p = part_of(block, heads, parts);
        require((p.batch * heads + p.head) * parts + p.index == block, "part", block, heads, parts);
        require(p.index < parts && p.head < heads && p.batch < batch, "part outside", block, heads,
                parts);
    }
}

// Tiles of 128 rows of N rows.
void check_rows(int n) {
    const int tiles = ceil_div(n, 128);
    require(tiles * 128 >= n && (tiles - 1) * 128 < n, "tiles", n, tiles, 0);
    check_grid(2, 3, tiles);
}

}  // namespace

int main() {
    check_tile<4>(128);
    check_tile<8>(512);
    check_tile<16>(512);
    check_runs<8>();
    check_runs<16>();
    for (int run : RUNS) check_order(run);
    for (int width : {64, 128, 208, 272})
        for (int longest : {8, 16}) check_width(width, longest);
    for (int n = 1; n <= 300; ++n) check_rows(n);
}
