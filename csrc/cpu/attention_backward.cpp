// Gradients of softmax attention and of the application of a map.
//
// A task is one head of the map. A block of rows at a time goes dO -> dP -> dS -> dQ, while dK and
// dV grow in scratch memory: nothing is added to by two threads, so the bits never depend on them.
// What the layers of a group send back joins dP in that block: there is no N x N gradient.
#include "attention_blocks.h"

namespace psvit::PSVIT_ISA {
namespace {

constexpr int64_t BLOCK = 48;

// The heads of v that map head `donor` serves, in order.
struct Receivers {
    const int64_t* head_index;
    int64_t heads, donor;

    bool has(int64_t h) const { return (head_index ? head_index[h] : h) == donor; }
    int64_t count() const {
        int64_t n = 0;
        for (int64_t h = 0; h < heads; h++) n += has(h);
        return n;
    }
};

int64_t most_receivers(const int64_t* head_index, int64_t heads, int64_t map_heads) {
    int64_t most = 0;
    for (int64_t donor = 0; donor < map_heads; donor++) {
        int64_t n = Receivers{head_index, heads, donor}.count();
        most = n > most ? n : most;
    }
    return most;
}

template <typename T>
void store_rows(const float* from, int64_t ld, int64_t rows, int64_t columns, float factor, T* to,
                int64_t to_row) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += W)
            store_upto(to + r * to_row + c, load(from + r * ld + c) * factor, columns - c);
}

template <typename T>
void add_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
              int64_t ld) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += W)
            store(to + r * ld + c,
                  load(to + r * ld + c) + load_upto(from + r * from_row + c, columns - c));
}

// shift = more - rowsum(P dP).
void row_shifts(const float* p, const float* dp, int64_t ld, int64_t rows, const float* more,
                float* shift) {
    for (int64_t r = 0; r < rows; r++) {
        vf total = {};
        for (int64_t c = 0; c < ld; c += W) total += load(p + r * ld + c) * load(dp + r * ld + c);
        shift[r] = (more ? more[r] : 0.0f) - sum_lanes(total);
    }
}

// dP becomes dS = P (dP + shift).
void softmax_backward_rows(const float* p, float* dp, int64_t ld, int64_t rows,
                           const float* shift) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < ld; c += W) {
            float* at = dp + r * ld + c;
            store(at, load(p + r * ld + c) * (load(at) + shift[r]));
        }
}

// to = -rowsum(dO * O).
template <typename T>
void minus_row_dots(const float* grads, int64_t ld, const T* out, int64_t out_row, int64_t rows,
                    int64_t columns, float* to) {
    for (int64_t r = 0; r < rows; r++) {
        vf total = {};
        for (int64_t c = 0; c < columns; c += W)
            total += load(grads + r * ld + c) * load_upto(out + r * out_row + c, columns - c);
        to[r] = -sum_lanes(total);
    }
}

struct AttentionScratch {
    Arena arena;
    MapScratch map;
    int64_t ldv, panel;
    float *keys, *values, *queries, *grads, *dp, *dq, *dk, *dv;

    AttentionScratch(const AttentionBackwardArgs& a, float* memory)
        : arena(memory),
          map(a.size, BLOCK, arena),
          ldv(round_up(a.size.depth_v, W)),
          panel(round_up(a.size.depth_v * map.ldn, 16)) {
        const Sizes& s = a.size;
        int64_t receivers = most_receivers(a.head_index, s.heads, a.map_heads);
        keys = arena.take(s.columns * map.ldd);
        values = arena.take((receivers + a.shared_count) * panel);  // each (d, N), transposed
        queries = arena.take(BLOCK * map.ldd);
        grads = arena.take(BLOCK * ldv);
        dp = arena.take(BLOCK * map.ldn);
        dq = arena.take(BLOCK * map.ldd);
        dk = arena.take(s.columns * map.ldd);
        dv = arena.take(receivers * s.columns * ldv);
    }
};

// One head of a map, with all that was computed from it.
template <typename T>
struct AttentionBackwardHead {
    const AttentionBackwardArgs& a;
    const AttentionScratch& t;
    MapHead<T> map;
    const Sizes& s = a.size;
    int64_t ldn = t.map.ldn, ldd = t.map.ldd, ldv = t.ldv;
    Receivers receivers = {a.head_index, s.heads, map.h};

    void pack() const {
        const View& k = a.map.k;
        if (!a.map.stored.data) map.pack_keys();
        pack_rows(head<T>(k, map.b, map.h), k.row, s.columns, s.depth, t.keys, ldd);
        float* panel = t.values;
        auto pack_values = [&](const View& v, int64_t h) {
            pack_transposed(head<T>(v, map.b, h), v.row, s.columns, s.depth_v, panel, ldn);
            panel += t.panel;
        };
        for (int64_t h = 0; h < s.heads; h++)
            if (receivers.has(h)) pack_values(a.v, h);
        for (int64_t l = 0; l < a.shared_count; l++) pack_values(a.shared[l].values, map.h);
    }

    // dP = dO V^T, or +=; leaves dO in t.grads.
    void add_product(const View& grad_out, int64_t h, int64_t i, int64_t rows, int64_t panel,
                     bool accumulate) const {
        pack_rows(head<T>(grad_out, map.b, h) + i * grad_out.row, grad_out.row, rows, s.depth_v,
                  t.grads, ldv);
        gemm(rows, ldn, s.depth_v, {t.grads, ldv, 1}, t.values + panel * t.panel, ldn, t.dp, ldn,
             accumulate);
    }

    // dS in t.dp; dV.
    void score_gradients(int64_t i, int64_t rows) const {
        map.read(i, rows);
        int64_t n = 0;
        for (int64_t h = 0; h < s.heads; h++) {
            if (!receivers.has(h)) continue;
            add_product(a.grad_out, h, i, rows, n, n > 0);
            gemm(s.columns, ldv, rows, {t.map.rows, 1, ldn}, t.grads, ldv,
                 t.dv + n * s.columns * ldv, ldv, i > 0);
            n++;
        }
        if (n == 0) memset(t.dp, 0, size_t(rows * ldn) * sizeof(float));
        if (a.grad_map.data)
            add_rows(head<T>(a.grad_map, map.b, map.h) + i * a.grad_map.row, a.grad_map.row, rows,
                     s.columns, t.dp, ldn);
        float shift[BLOCK];
        const float* grad_lse =
            a.grad_lse.data ? head<float>(a.grad_lse, map.b, map.h) + i : nullptr;
        row_shifts(t.map.rows, t.dp, ldn, rows, grad_lse, shift);
        for (int64_t l = 0; l < a.shared_count; l++)
            add_product(a.shared[l].grad_out, map.h, i, rows, n + l, true);
        softmax_backward_rows(t.map.rows, t.dp, ldn, rows, shift);
    }

    // dQ of these rows; dK.
    void query_and_key_gradients(int64_t i, int64_t rows) const {
        const View& q = a.map.q;
        pack_rows(head<T>(q, map.b, map.h) + i * q.row, q.row, rows, s.depth, t.queries, ldd);
        gemm(rows, ldd, s.columns, {t.dp, ldn, 1}, t.keys, ldd, t.dq, ldd, false);
        store_rows(t.dq, ldd, rows, s.depth, a.map.scale,
                   head<T>(a.dq, map.b, map.h) + i * a.dq.row, a.dq.row);
        gemm(s.columns, ldd, rows, {t.dp, 1, ldn}, t.queries, ldd, t.dk, ldd, i > 0);
    }

    void store_sums() const {
        store_rows(t.dk, ldd, s.columns, s.depth, a.map.scale, head<T>(a.dk, map.b, map.h),
                   a.dk.row);
        int64_t n = 0;
        for (int64_t h = 0; h < s.heads; h++)
            if (receivers.has(h))
                store_rows(t.dv + n++ * s.columns * ldv, ldv, s.columns, s.depth_v, 1.0f,
                           head<T>(a.dv, map.b, h), a.dv.row);
    }
};

template <typename T>
void attention_backward_task(const AttentionBackwardArgs& a, int64_t task, float* memory) {
    const Sizes& s = a.size;
    int64_t b = task / a.map_heads, h = task % a.map_heads;
    AttentionScratch t(a, memory);
    AttentionBackwardHead<T> work = {a, t, {a.map, s, t.map, b, h}};
    work.pack();
    for (int64_t i = 0; i < s.rows; i += BLOCK) {
        int64_t rows = smaller(BLOCK, s.rows - i);
        work.score_gradients(i, rows);
        if (a.dbias.data)
            store_rows(t.dp, t.map.ldn, rows, s.columns, 1.0f,
                       head<T>(a.dbias, b, h) + i * a.dbias.row, a.dbias.row);
        work.query_and_key_gradients(i, rows);
    }
    work.store_sums();
}

struct ApplyScratch {
    Arena arena;
    MapScratch map;
    int64_t ldv;
    float *values, *grads, *dv, *dp;

    ApplyScratch(const Sizes& s, bool many, float* memory)
        : arena(memory), map(s, BLOCK, arena), ldv(round_up(s.depth_v, W)) {
        values = arena.take(s.depth_v * map.ldn);
        grads = arena.take(BLOCK * ldv);
        dv = arena.take(s.columns * ldv);
        dp = arena.take((many ? s.rows : BLOCK) * map.ldn);
    }
};

// Packs a block of rows of dO into t.grads; t.dv = P^T dO, or += after the first block.
template <typename T>
void add_value_gradients(const MapHead<T>& map, const ApplyScratch& t, const View& grad_out,
                         int64_t b, int64_t h, int64_t i, int64_t rows) {
    const Sizes& s = map.size;
    pack_rows(head<T>(grad_out, b, h) + i * grad_out.row, grad_out.row, rows, s.depth_v, t.grads,
              t.ldv);
    map.read(i, rows);
    gemm(s.columns, t.ldv, rows, {t.map.rows, 1, t.map.ldn}, t.grads, t.ldv, t.dv, t.ldv, i > 0);
}

// One stored map with all that it was applied to. With several receivers dP is summed in scratch
// memory of the size of the map; with one, a block at a time is enough.
template <typename T>
void apply_backward_task(const ApplyBackwardArgs& a, bool many, int64_t task, float* memory) {
    const Sizes& s = a.size;
    int64_t map_b = task / a.map_heads, donor = task % a.map_heads;
    Receivers receivers = {a.head_index, s.heads, donor};
    ApplyScratch t(s, many, memory);
    int64_t ldn = t.map.ldn;
    MapHead<T> map = {a.map, s, t.map, map_b, donor};
    T* dmap = head<T>(a.dmap, map_b, donor);
    if (many) memset(t.dp, 0, size_t(s.rows * ldn) * sizeof(float));

    int64_t first = a.map_batch == 1 ? 0 : map_b, last = a.map_batch == 1 ? s.batch : map_b + 1;
    int64_t served = 0;
    for (int64_t b = first; b < last; b++) {
        for (int64_t h = 0; h < s.heads; h++) {
            if (!receivers.has(h)) continue;
            served++;
            pack_transposed(head<T>(a.v, b, h), a.v.row, s.columns, s.depth_v, t.values, ldn);
            for (int64_t i = 0; i < s.rows; i += BLOCK) {
                int64_t rows = smaller(BLOCK, s.rows - i);
                float* dp_block = many ? t.dp + i * ldn : t.dp;
                add_value_gradients(map, t, a.grad_out, b, h, i, rows);
                gemm(rows, ldn, s.depth_v, {t.grads, t.ldv, 1}, t.values, ldn, dp_block, ldn, many);
                if (!many)
                    store_rows(dp_block, ldn, rows, a.map_pitch, 1.0f, dmap + i * a.dmap.row,
                               a.dmap.row);
            }
            store_rows(t.dv, t.ldv, s.columns, s.depth_v, 1.0f, head<T>(a.dv, b, h), a.dv.row);
        }
    }
    if (many) {
        store_rows(t.dp, ldn, s.rows, a.map_pitch, 1.0f, dmap, a.dmap.row);
    } else if (served == 0) {
        memset(t.dp, 0, size_t(ldn) * sizeof(float));
        for (int64_t i = 0; i < s.rows; i++)
            store_rows(t.dp, ldn, 1, a.map_pitch, 1.0f, dmap + i * a.dmap.row, a.dmap.row);
    }
}

// One head of an application whose dP is the donor's to compute.
template <typename T>
void linked_backward_task(const ApplyBackwardArgs& a, int64_t task, float* memory) {
    const Sizes& s = a.size;
    int64_t b = task / s.heads, h = task % s.heads;
    ApplyScratch t(s, false, memory);
    MapHead<T> map = {a.map, s, t.map, b, h};
    if (!a.map.stored.data) map.pack_keys();
    for (int64_t i = 0; i < s.rows; i += BLOCK) {
        int64_t rows = smaller(BLOCK, s.rows - i);
        add_value_gradients(map, t, a.grad_out, b, h, i, rows);
        minus_row_dots(t.grads, t.ldv, head<T>(a.out, b, h) + i * a.out.row, a.out.row, rows,
                       s.depth_v, head<float>(a.dlse, b, h) + i);
    }
    store_rows(t.dv, t.ldv, s.columns, s.depth_v, 1.0f, head<T>(a.dv, b, h), a.dv.row);
}

template <typename T>
void attention_backward_as(const AttentionBackwardArgs& a) {
    parallel_tasks(
        a.size.batch * a.map_heads, a.threads, AttentionScratch(a, nullptr).arena.used,
        [&](int64_t task, float* memory) { attention_backward_task<T>(a, task, memory); });
}

template <typename T>
void apply_backward_as(const ApplyBackwardArgs& a) {
    const Sizes& s = a.size;
    if (!a.dmap.data)
        return parallel_tasks(
            s.batch * s.heads, a.threads, ApplyScratch(s, false, nullptr).arena.used,
            [&](int64_t task, float* memory) { linked_backward_task<T>(a, task, memory); });
    bool many = (a.map_batch == 1 && s.batch > 1) ||
                most_receivers(a.head_index, s.heads, a.map_heads) > 1;
    parallel_tasks(
        a.map_batch * a.map_heads, a.threads, ApplyScratch(s, many, nullptr).arena.used,
        [&](int64_t task, float* memory) { apply_backward_task<T>(a, many, task, memory); });
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& a) {
    a.dtype == Dtype::float32 ? attention_backward_as<float>(a) : attention_backward_as<bf16>(a);
}

void apply_backward(const ApplyBackwardArgs& a) {
    a.dtype == Dtype::float32 ? apply_backward_as<float>(a) : apply_backward_as<bf16>(a);
}

}  // namespace psvit::PSVIT_ISA
