// What the compiled kernels take: pointers, sizes and strides, and nothing of any framework.
#pragma once

#include <cstdint>

namespace psvit {

enum class Dtype { float32, bfloat16 };

// A (B, H, N, d) tensor with unit stride on d; strides in elements, 0 where it is broadcast.
struct View {
    char* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;
};

struct Sizes {
    int64_t batch, heads, rows, columns, depth, depth_v;  // B, H, M, N, d, d of v
};

// A map P = exp(scale q k^T + bias - lse), and its stored rows: null data where there are none.
struct Map {
    View stored;
    View q, k, bias, lse;  // lse is float32
    float scale;
};

// O = P V with P = softmax(scale q k^T + bias). Writes lse, and P itself if it has a place.
struct AttentionArgs {
    Dtype dtype;
    Sizes size;
    Map map;
    int64_t map_pitch;
    View v, out;
    int threads;
};

// O = P V from stored rows, or from rebuilt ones.
struct ApplyArgs {
    Dtype dtype;
    Sizes size;  // heads counts those of v and out
    Map map;
    View v, out;
    const int64_t* head_index;  // null: head h uses map head h
    const float* correction;    // null, or (H, 3)
    int threads;
};

// What a layer that shares a map sends back: its part of dP is grad_out values^T.
struct SharedGradient {
    View grad_out, values;
};

// The gradient of a softmax attention: of its own output, of everything that was applied from its
// factored map, and of what sharing layers sent back. Receiver head h took part through map head
// head_index[h].
struct AttentionBackwardArgs {
    Dtype dtype;
    Sizes size;  // heads counts those of v and grad_out
    int64_t map_heads;
    Map map;
    View v, grad_out, grad_map;
    View grad_lse;                 // float32
    const SharedGradient* shared;  // heads as the map's, depth as v's
    int64_t shared_count;
    View dq, dk, dv, dbias;  // dbias: null data if not wanted
    const int64_t* head_index;
    int threads;
};

// dV = P^T dO. And either dP = dO V^T, summed over the receivers of each map, or (linked) the
// gradient of the log-sum-exp, -rowsum(dO * O): dP is then for the donor to walk.
struct ApplyBackwardArgs {
    Dtype dtype;
    Sizes size;
    int64_t map_batch, map_heads, map_pitch;
    Map map;
    View v, grad_out, dv;
    View dmap;       // null data: linked
    View out, dlse;  // linked: O without correction, and float32
    const int64_t* head_index;
    int threads;
};

enum class PoolKind { max, avg, depthwise };

struct PoolArgs {
    Dtype dtype;
    PoolKind kind;
    int64_t batch, channels, prefix;
    int64_t height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    View x;               // (B, N, C): the head stride is unused, here and below
    View out;             // forward: the result; backward: its gradient
    View dx;              // backward only
    const float* weight;  // depthwise: (taps, C), else null
    const float* bias;    // (C) or null
    const float* norm_weight;  // (C) or null
    const float* norm_bias;
    float norm_eps;
    float* dweight;  // backward of depthwise: (taps, C)
    float* dbias;    // (C)
    int threads;
};

// Which tokens become which: see psvit_kernels/merging.py. Of `pairs` even positions after the
// prefix, those most like an odd one, each joins that one.
struct MatchArgs {
    Dtype dtype;
    int64_t batch, heads, tokens, depth, prefix, pairs;
    View metric;           // (B, H, N, d)
    const float* penalty;  // (B, N) or null: taken off the best score of a token
    int64_t* into;         // (B, N)
    int64_t* order;   // (B, N)
    int64_t* starts;  // (B, M + 1)
    int threads;
};

// Weighted means of the tokens that become one, and their gradients.
struct MergeArgs {
    Dtype dtype;
    int64_t batch, tokens, outputs, channels;
    View x, residual;  // (B, N, C): the head stride is unused, here and below; residual may be null
    const int64_t* into;
    const int64_t* order;
    const int64_t* starts;
    const float* weights;  // (B, N) or null
    float* sizes;          // (B, M)
    View out;              // (B, M, C); backward: its gradient
    View normed;           // null data: no LayerNorm
    const float* norm_weight;
    const float* norm_bias;  // null or (C)
    float norm_eps;
    View dx;  // backward only
    int threads;
};

// A map of the tokens that are left: see psvit_kernels/groups.py.
struct ReduceMapArgs {
    Dtype dtype;
    int64_t batch, heads, tokens, outputs;
    int64_t images, entries;  // of the tables; one image's serve all
    View map, out;            // (B, H, N, N), (B, H, M, M): rows padded with zeros to their stride
    const int64_t* order;     // (images, entries)
    const int64_t* starts;    // (images, M + 1)
    const float* means;       // (images, entries)
    const float* shares;      // likewise, or null: all 1
    int threads;
};

// One table per instruction set.
struct Kernels {
    const char* isa;
    void (*attention)(const AttentionArgs&);
    void (*apply)(const ApplyArgs&);
    void (*attention_backward)(const AttentionBackwardArgs&);
    void (*apply_backward)(const ApplyBackwardArgs&);
    void (*token_pool)(const PoolArgs&);
    void (*token_pool_backward)(const PoolArgs&);
    void (*match_tokens)(const MatchArgs&);
    void (*merge_tokens)(const MergeArgs&);
    void (*merge_tokens_backward)(const MergeArgs&);
    void (*reduce_map)(const ReduceMapArgs&);
    double (*peak_gflops)(int threads);
};

}  // namespace psvit
