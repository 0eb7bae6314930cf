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

// Softmax attention, or (rebuild_map) the application of a map given by q, k and lse.
struct AttentionArgs {
    Dtype dtype;
    Sizes size;  // heads counts those of v and out
    View q, k, v, bias, out, map;
    int64_t map_pitch;
    float* lse;               // (B, heads of q, M): written, or read if rebuild_map
    int64_t lse_heads;        // heads of q
    bool rebuild_map;
    const int64_t* head_index;  // null: head h uses map head h
    const float* correction;    // null, or (H, 3)
    float scale;
    int threads;
};

// O = P V from stored probabilities.
struct ApplyArgs {
    Dtype dtype;
    Sizes size;
    View map, v, out;
    const int64_t* head_index;
    const float* correction;
    int threads;
};

// The gradient of a softmax attention and of everything that was applied from its factored map.
// Receiver head h took part through map head head_index[h].
struct AttentionBackwardArgs {
    Dtype dtype;
    Sizes size;  // heads counts those of v and grad_out
    int64_t map_heads;
    View q, k, v, bias, grad_out, map, grad_map;  // map: null data, then P is rebuilt from lse
    View dq, dk, dv, dbias;                       // dbias: null data if not wanted
    int64_t map_pitch;
    const float* lse;
    const int64_t* head_index;
    float scale;
    int threads;
};

// dV = P^T dO, and dP = dO V^T summed over the receivers of each stored map.
struct ApplyBackwardArgs {
    Dtype dtype;
    Sizes size;
    int64_t map_batch, map_heads, map_pitch;
    View map, v, grad_out, dmap, dv;
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

// One table per instruction set.
struct Kernels {
    const char* isa;
    void (*attention)(const AttentionArgs&);
    void (*apply)(const ApplyArgs&);
    void (*attention_backward)(const AttentionBackwardArgs&);
    void (*apply_backward)(const ApplyBackwardArgs&);
    void (*token_pool)(const PoolArgs&);
    void (*token_pool_backward)(const PoolArgs&);
    double (*peak_gflops)(int threads);
};

}  // namespace psvit
