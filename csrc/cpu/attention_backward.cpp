// Gradients of softmax attention and of the application of a map.
//
// A task is one head of the map. A block of rows at a time goes dO -> dP -> dS -> dQ, while dK and
// dV grow in scratch memory: nothing is added to by two threads, so the bits never depend on them.
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

// dP becomes dS = P (dP - rowsum(P dP)).
void softmax_backward_rows(const float* p, float* dp, int64_t ld, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        const float* p_row = p + r * ld;
        float* dp_row = dp + r * ld;
        vf total = {};
        for (int64_t c = 0; c < ld; c += W) total += load(p_row + c) * load(dp_row + c);
        float sum = sum_lanes(total);
        for (int64_t c = 0; c < ld; c += W)
            store(dp_row + c, load(p_row + c) * (load(dp_row + c) - sum));
    }
}

struct AttentionScratch {
    int64_t ldn, ldd, ldv, floats;
    float *keys_transposed, *keys, *values, *queries, *grads, *p, *dp, *dq, *dk, *dv;

    AttentionScratch(const AttentionBackwardArgs& a, float* memory)
        : ldn(padded_columns(a.size.columns)),
          ldd(round_up(a.size.depth, W)),
          ldv(round_up(a.size.depth_v, W)) {
        const Sizes& s = a.size;
        int64_t receivers = most_receivers(a.head_index, s.heads, a.map_heads);
        Arena arena(memory);
        keys_transposed = arena.take(a.map.data ? 0 : s.depth * ldn);
        keys = arena.take(s.columns * ldd);
        values = arena.take(receivers * s.depth_v * ldn);  // transposed, of each receiver
        queries = arena.take(BLOCK * ldd);
        grads = arena.take(BLOCK * ldv);
        p = arena.take(BLOCK * ldn);
        dp = arena.take(BLOCK * ldn);
        dq = arena.take(BLOCK * ldd);
        dk = arena.take(s.columns * ldd);
        dv = arena.take(receivers * s.columns * ldv);
        floats = arena.used;
    }
};

template <typename T>
void attention_backward_task(const AttentionBackwardArgs& a, int64_t task, float* memory) {
    const Sizes& s = a.size;
    int64_t b = task / a.map_heads, donor = task % a.map_heads;
    AttentionScratch t(a, memory);
    Receivers receivers = {a.head_index, s.heads, donor};
    const T* q = head<T>(a.q, b, donor);
    const T* k = head<T>(a.k, b, donor);
    const float* lse = a.lse + (b * a.map_heads + donor) * s.rows;

    if (!a.map.data) pack_transposed(k, a.k.row, s.columns, s.depth, t.keys_transposed, t.ldn);
    pack_rows(k, a.k.row, s.columns, s.depth, t.keys, t.ldd);
    int64_t n = 0;
    for (int64_t h = 0; h < s.heads; h++)
        if (receivers.has(h))
            pack_transposed(head<T>(a.v, b, h), a.v.row, s.columns, s.depth_v,
                            t.values + n++ * s.depth_v * t.ldn, t.ldn);

    for (int64_t i = 0; i < s.rows; i += BLOCK) {
        int64_t rows = smaller(BLOCK, s.rows - i);
        pack_rows(q + i * a.q.row, a.q.row, rows, s.depth, t.queries, t.ldd);
        if (a.map.data) {
            pack_rows(head<T>(a.map, b, donor) + i * a.map.row, a.map.row, rows, s.columns, t.p,
                      t.ldn);
        } else {
            gemm(rows, t.ldn, s.depth, {t.queries, t.ldd, 1}, t.keys_transposed, t.ldn, t.p, t.ldn,
                 false);
            const T* bias = a.bias.data ? head<T>(a.bias, b, donor) + i * a.bias.row : nullptr;
            rebuild_rows(t.p, t.ldn, rows, s.columns, a.scale, bias, a.bias.row, lse + i);
        }
        n = 0;
        for (int64_t h = 0; h < s.heads; h++) {
            if (!receivers.has(h)) continue;
            pack_rows(head<T>(a.grad_out, b, h) + i * a.grad_out.row, a.grad_out.row, rows,
                      s.depth_v, t.grads, t.ldv);
            gemm(rows, t.ldn, s.depth_v, {t.grads, t.ldv, 1}, t.values + n * s.depth_v * t.ldn,
                 t.ldn, t.dp, t.ldn, n > 0);
            gemm(s.columns, t.ldv, rows, {t.p, 1, t.ldn}, t.grads, t.ldv,
                 t.dv + n * s.columns * t.ldv, t.ldv, i > 0);
            n++;
        }
        if (n == 0) memset(t.dp, 0, size_t(rows * t.ldn) * sizeof(float));
        if (a.grad_map.data)
            add_rows(head<T>(a.grad_map, b, donor) + i * a.grad_map.row, a.grad_map.row, rows,
                     s.columns, t.dp, t.ldn);
        softmax_backward_rows(t.p, t.dp, t.ldn, rows);
        if (a.dbias.data)
            store_rows(t.dp, t.ldn, rows, s.columns, 1.0f,
                       head<T>(a.dbias, b, donor) + i * a.dbias.row, a.dbias.row);
        gemm(rows, t.ldd, s.columns, {t.dp, t.ldn, 1}, t.keys, t.ldd, t.dq, t.ldd, false);
        store_rows(t.dq, t.ldd, rows, s.depth, a.scale, head<T>(a.dq, b, donor) + i * a.dq.row,
                   a.dq.row);
        gemm(s.columns, t.ldd, rows, {t.dp, 1, t.ldn}, t.queries, t.ldd, t.dk, t.ldd, i > 0);
    }
    store_rows(t.dk, t.ldd, s.columns, s.depth, a.scale, head<T>(a.dk, b, donor), a.dk.row);
    n = 0;
    for (int64_t h = 0; h < s.heads; h++)
        if (receivers.has(h))
            store_rows(t.dv + n++ * s.columns * t.ldv, t.ldv, s.columns, s.depth_v, 1.0f,
                       head<T>(a.dv, b, h), a.dv.row);
}

struct ApplyScratch {
    int64_t ldn, ldv, floats;
    float *values, *grads, *map_rows, *dv, *dp;

    ApplyScratch(const Sizes& s, bool many, float* memory)
        : ldn(padded_columns(s.columns)), ldv(round_up(s.depth_v, W)) {
        Arena arena(memory);
        values = arena.take(s.depth_v * ldn);
        grads = arena.take(BLOCK * ldv);
        map_rows = arena.take(BLOCK * ldn);
        dv = arena.take(s.columns * ldv);
        dp = arena.take((many ? s.rows : BLOCK) * ldn);
        floats = arena.used;
    }
};

// One stored map with all that it was applied to. With several receivers dP is summed in scratch
// memory of the size of the map; with one, a block at a time is enough.
template <typename T>
void apply_backward_task(const ApplyBackwardArgs& a, bool many, int64_t task, float* memory) {
    const Sizes& s = a.size;
    int64_t map_b = task / a.map_heads, donor = task % a.map_heads;
    Receivers receivers = {a.head_index, s.heads, donor};
    ApplyScratch t(s, many, memory);
    const T* map = head<T>(a.map, map_b, donor);
    T* dmap = head<T>(a.dmap, map_b, donor);
    if (many) memset(t.dp, 0, size_t(s.rows * t.ldn) * sizeof(float));

    int64_t first = a.map_batch == 1 ? 0 : map_b, last = a.map_batch == 1 ? s.batch : map_b + 1;
    int64_t served = 0;
    for (int64_t b = first; b < last; b++) {
        for (int64_t h = 0; h < s.heads; h++) {
            if (!receivers.has(h)) continue;
            served++;
            pack_transposed(head<T>(a.v, b, h), a.v.row, s.columns, s.depth_v, t.values, t.ldn);
            for (int64_t i = 0; i < s.rows; i += BLOCK) {
                int64_t rows = smaller(BLOCK, s.rows - i);
                float* dp_block = many ? t.dp + i * t.ldn : t.dp;
                pack_rows(head<T>(a.grad_out, b, h) + i * a.grad_out.row, a.grad_out.row, rows,
                          s.depth_v, t.grads, t.ldv);
                Matrix p = float_rows(map + i * a.map.row, a.map.row, rows, s.columns, t.map_rows,
                                      t.ldn);
                gemm(s.columns, t.ldv, rows, {p.at, 1, p.row}, t.grads, t.ldv, t.dv, t.ldv, i > 0);
                gemm(rows, t.ldn, s.depth_v, {t.grads, t.ldv, 1}, t.values, t.ldn, dp_block, t.ldn, many);
                if (!many)
                    store_rows(dp_block, t.ldn, rows, a.map_pitch, 1.0f, dmap + i * a.dmap.row,
                               a.dmap.row);
            }
            store_rows(t.dv, t.ldv, s.columns, s.depth_v, 1.0f, head<T>(a.dv, b, h), a.dv.row);
        }
    }
    if (many) {
        store_rows(t.dp, t.ldn, s.rows, a.map_pitch, 1.0f, dmap, a.dmap.row);
    } else if (served == 0) {
        memset(t.dp, 0, size_t(t.ldn) * sizeof(float));
        for (int64_t i = 0; i < s.rows; i++)
            store_rows(t.dp, t.ldn, 1, a.map_pitch, 1.0f, dmap + i * a.dmap.row, a.dmap.row);
    }
}

template <typename T>
void attention_backward_as(const AttentionBackwardArgs& a) {
    parallel_tasks(a.size.batch * a.map_heads, a.threads, AttentionScratch(a, nullptr).floats,
                   [&](int64_t task, float* memory) { attention_backward_task<T>(a, task, memory); });
}

template <typename T>
void apply_backward_as(const ApplyBackwardArgs& a) {
    bool many = (a.map_batch == 1 && a.size.batch > 1) ||
                most_receivers(a.head_index, a.size.heads, a.map_heads) > 1;
    parallel_tasks(
        a.map_batch * a.map_heads, a.threads, ApplyScratch(a.size, many, nullptr).floats,
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
