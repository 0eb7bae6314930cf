// What the CUDA kernels take: addresses, sizes, strides and a stream. Host side only.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace psvit::cuda {

enum class Half { bfloat16, float16 };

// How the elements of a stored map are written: in the dtype of V, or in 8 bits (codes.h).
enum class Code { half, uint8, e4m3 };

// Which kernels: those for every GPU from sm_80 on, or those of sm_90a alone.
enum class Generation { ampere, hopper };

struct Launch {
    int device;
    void* stream;  // cudaStream_t; null is the legacy default stream
};

// (B, H, rows, columns): strides in elements of the three leading dimensions, the last one is 1.
// 16-byte aligned: address and strides, where the kernel asks for it.
struct Tensor4 {
    void* data;
    int64_t stride_b, stride_h, stride_n;
};

// O = P V, from a stored map, and the epilogue alpha (P V) + beta V + gamma mean(V).
struct ApplyArgs {
    Half dtype;
    Code code;
    int batch, heads, rows, tokens, dim;  // of V and O: P is (rows, tokens), V (tokens, dim)
    int map_batch, map_heads;             // map_batch 1 serves every sequence
    Tensor4 map;                          // rows aligned to 16 bytes, padded with zeros
    int map_pitch;                        // elements of a row that may be read
    Tensor4 row_scale;                    // float32, stride_n of a row; null if Code::half
    Tensor4 v;                            // aligned to 16 bytes; dim a multiple of 8, at most 128
    void* out;                            // (B, rows, H, dim), contiguous, 16-byte aligned
    const int32_t* head_index;            // on the device, one per head of V, or null
    const float* correction;              // (H, 3), or null
};

// O = P V with P = softmax(scale Q K^T), P itself (dense or in 8 bits) and the log-sum-exp.
struct AttentionArgs {
    Half dtype;
    bool has_map;
    Code code;  // of the map
    int batch, heads, rows, tokens, dim, value_dim;
    float scale;
    Tensor4 q, k, v;   // aligned to 16 bytes, dims multiples of 8, at most 128
    void* out;         // (B, rows, H, value_dim), contiguous
    void* map;         // (B, H, rows, map_pitch), contiguous, padding is written too; or null
    int map_pitch;     // elements
    float* row_scale;  // (B, H, rows), or null if not in 8 bits
    float* lse;        // (B, H, rows)
};

// A sharing layer up to its projection: O = P V, V = LayerNorm(x) W^T + b of each head. The norm's
// weight and bias are in W and b already.
struct SharingArgs {
    Half dtype;
    int batch, heads, tokens, channels, dim;  // at most 256 tokens, 64 numbers a head
    int map_batch;                            // map_batch 1 serves every sequence
    const void* x;                            // (B, tokens, C), 16-byte aligned
    int64_t x_stride_b, x_stride_n;
    const void* weight;        // (H dim, C), contiguous, 16-byte aligned
    const float* weight_sums;  // (H dim,), of the rows of the weight
    const float* bias;         // (H dim,)
    float eps;
    Tensor4 map;  // of halves, as in ApplyArgs
    void* out;    // (B, tokens, H, dim), contiguous
};

enum class PoolKind { max, avg, stride, depthwise };

// Each of the (height x width) tokens after the prefix pooled over its window, then LayerNorm.
struct PoolArgs {
    Half dtype;
    PoolKind kind;
    int batch, channels, prefix;  // channels a multiple of 8
    int height, width, out_height, out_width;
    int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    // (B, prefix + height width, C), strides in elements, 16-byte aligned; an image lies within
    // 2^31 elements.
    const void* x;
    int64_t x_stride_b, x_stride_n;
    const void* residual;  // as x, or null: what is pooled is the sum
    int64_t residual_stride_b, residual_stride_n;
    void* out;            // (B, prefix + out_height out_width, C), contiguous
    bool half_parameters;     // those that follow are in the dtype of x, else in float32
    const void* weight;       // (C, kernel_h, kernel_w), or null
    const void* bias;         // (C,), or null; 16-byte aligned, as are the next two
    const void* norm_weight;  // (C,), or null: no LayerNorm
    const void* norm_bias;    // (C,), or null
    float norm_eps;
};

// Longest row of a map that the short attention keeps in registers.
constexpr int SHORT_TOKENS = 272;
constexpr int MAX_DIM = 128;
// Most channels of token_pool, and most weights, C (kernel_h kernel_w + 1), that a block holds in
// shared memory.
constexpr int MAX_POOL_CHANNELS = 2048;
constexpr int MAX_POOL_WEIGHTS = 24 * 1024;

// Each launches one kernel on the stream, and throws CudaError if the launch was refused. They
// return at once when there is nothing to write.
void apply_ampere(const ApplyArgs&, Launch);
void apply_hopper(const ApplyArgs&, Launch);
void attention_ampere(const AttentionArgs&, Launch);
void attention_hopper(const AttentionArgs&, Launch);
void sharing_hopper(const SharingArgs&, Launch);
void token_pool(const PoolArgs&, Launch);

// What a block of apply_hopper needs of shared memory, in bytes; more than `limit`: it can't run.
int apply_hopper_shared(int tokens, int dim, Code code);
// Likewise; `dim` is the larger one of q and v.
int attention_ampere_shared(int tokens, int dim);

struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace psvit::cuda
