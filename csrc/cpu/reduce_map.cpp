// An attention map follows tokens that became fewer: rows averaged, columns summed.
#include <type_traits>

#include "../parallel.h"
#include "attention_blocks.h"

namespace psvit::PSVIT_ISA {
namespace {

constexpr int64_t ROWS = 64;  // of the result, of a task

// The groups of one image, column by column: the first member of each, then all others.
struct Columns {
    int64_t outputs, others = 0;
    int32_t *first, *other, *into;
    float *first_share, *other_share;

    Columns(const ReduceMapArgs& a, Arena& arena) : outputs(round_up(a.outputs, W)) {
        first = (int32_t*)arena.take(outputs);
        first_share = arena.take(outputs);
        other = (int32_t*)arena.take(a.entries);
        into = (int32_t*)arena.take(a.entries);
        other_share = arena.take(a.entries);
    }

    void read(const ReduceMapArgs& a, const int64_t* order, const int64_t* starts,
              const float* shares) {
        for (int64_t m = 0; m < outputs; m++) first[m] = 0, first_share[m] = 0.0f;
        for (int64_t m = 0; m < a.outputs; m++)
            for (int64_t e = starts[m]; e < starts[m + 1]; e++) {
                const float share = shares ? shares[e] : 1.0f;
                if (e == starts[m]) {
                    first[m] = int32_t(order[e]), first_share[m] = share;
                } else {
                    other[others] = int32_t(order[e]), into[others] = int32_t(m);
                    other_share[others++] = share;
                }
            }
    }

    void sum(const float* row, float* out) const {
        for (int64_t m = 0; m < outputs; m += W)
            store(out + m, gather(row, first + m) * load(first_share + m));
        for (int64_t i = 0; i < others; i++) out[into[i]] += row[other[i]] * other_share[i];
    }
};

struct Scratch {
    float *row, *out;
    Columns columns;

    Scratch(const ReduceMapArgs& a, Arena& arena)
        : row(arena.take(round_up(a.tokens, W))),
          out(arena.take(round_up(a.outputs, W))),
          columns(a, arena) {}
};

// The mean of some rows of the map: in `row`, or where it is, if it is one row of floats.
template <typename T>
const float* mean_of_rows(const ReduceMapArgs& a, const T* map, const int64_t* members,
                          const float* means, int64_t count, float* row) {
    if (std::is_same<T, float>::value && count == 1 && means[0] == 1.0f)
        return (const float*)(map + members[0] * a.map.row);
    for (int64_t c = 0; c < a.tokens; c += W) {
        vf sum = {};
        for (int64_t i = 0; i < count; i++)
            sum += load_upto(map + members[i] * a.map.row + c, a.tokens - c) * means[i];
        store(row + c, sum);
    }
    return row;
}

template <typename T>
void reduce_rows(const ReduceMapArgs& a, int64_t b, int64_t h, int64_t begin, float* memory) {
    Arena arena(memory);
    Scratch s(a, arena);
    const int64_t image = a.images == 1 ? 0 : b;
    const int64_t *order = a.order + image * a.entries,
                  *starts = a.starts + image * (a.outputs + 1);
    const float* means = a.means + image * a.entries;
    s.columns.read(a, order, starts, a.shares ? a.shares + image * a.entries : nullptr);
    for (int64_t m = begin; m < smaller(begin + ROWS, a.outputs); m++) {
        const int64_t e = starts[m];
        s.columns.sum(mean_of_rows(a, head<T>(a.map, b, h), order + e, means + e,
                                   starts[m + 1] - e, s.row),
                      s.out);
        T* out = head<T>(a.out, b, h) + m * a.out.row;
        for (int64_t c = 0; c < a.outputs; c += W)
            store_upto(out + c, load(s.out + c), a.outputs - c);
        memset(out + a.outputs, 0, size_t(a.out.row - a.outputs) * sizeof(T));
    }
}

template <typename T>
void reduce(const ReduceMapArgs& a) {
    Arena counter(nullptr);
    Scratch(a, counter);
    const int64_t blocks = (a.outputs + ROWS - 1) / ROWS;
    parallel_tasks(a.batch * a.heads * blocks, a.threads, counter.used,
                   [&](int64_t task, float* memory) {
                       const int64_t head = task / blocks;
                       reduce_rows<T>(a, head / a.heads, head % a.heads, task % blocks * ROWS,
                                      memory);
                   });
}

}  // namespace

void reduce_map(const ReduceMapArgs& a) {
    a.dtype == Dtype::float32 ? reduce<float>(a) : reduce<bf16>(a);
}

}  // namespace psvit::PSVIT_ISA
