// The Python module: addresses, sizes and strides in, nothing of PyTorch included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "parallel.h"

namespace py = pybind11;
using namespace psvit;

#define PSVIT_DECLARE(ISA)                                 \
    namespace psvit::ISA {                                 \
    void attention(const AttentionArgs&);                  \
    void apply(const ApplyArgs&);                          \
    void attention_backward(const AttentionBackwardArgs&); \
    void apply_backward(const ApplyBackwardArgs&);         \
    void token_pool(const PoolArgs&);                      \
    void token_pool_backward(const PoolArgs&);             \
    void match_tokens(const MatchArgs&);                   \
    void merge_tokens(const MergeArgs&);                   \
    void merge_tokens_backward(const MergeArgs&);          \
    void reduce_map(const ReduceMapArgs&);                 \
    double peak_gflops(int threads);                       \
    }
#define PSVIT_TABLE(ISA)                                                            \
    Kernels{#ISA,                    ISA::attention,       ISA::apply,               \
            ISA::attention_backward, ISA::apply_backward,  ISA::token_pool,          \
            ISA::token_pool_backward, ISA::match_tokens,   ISA::merge_tokens,        \
            ISA::merge_tokens_backward, ISA::reduce_map,   ISA::peak_gflops}

PSVIT_DECLARE(portable)
#ifdef PSVIT_ISA_X86
PSVIT_DECLARE(avx2)
PSVIT_DECLARE(avx512)
#endif

namespace {

// From the best that this machine runs to the one that runs everywhere.
std::vector<Kernels> usable_tables() {
    std::vector<Kernels> tables;
#ifdef PSVIT_ISA_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        tables.push_back(PSVIT_TABLE(avx512));
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        tables.push_back(PSVIT_TABLE(avx2));
#endif
    tables.push_back(PSVIT_TABLE(portable));
    return tables;
}

// PSVIT_CPU_ISA narrows the choice, for tests and comparisons.
Kernels chosen_table() {
    std::vector<Kernels> tables = usable_tables();
    const char* wanted = getenv("PSVIT_CPU_ISA");
    if (!wanted) return tables.front();
    std::string names;
    for (const Kernels& table : tables) {
        if (table.isa == std::string(wanted)) return table;
        names += (names.empty() ? "" : ", ") + std::string(table.isa);
    }
    throw std::runtime_error("PSVIT_CPU_ISA: got \"" + std::string(wanted) +
                             "\", expected one of those this machine runs: " + names);
}

const Kernels& kernels() {
    static const Kernels chosen = chosen_table();
    return chosen;
}

// A tensor as Python hands it over: address and the strides of its leading dimensions.
using Strided = std::pair<uintptr_t, std::array<int64_t, 3>>;

View view(const Strided& t) {
    return {reinterpret_cast<char*>(t.first), t.second[0], t.second[1], t.second[2]};
}
View view(const std::optional<Strided>& t) { return t ? view(*t) : View{}; }

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

Dtype dtype(bool is_bfloat16) { return is_bfloat16 ? Dtype::bfloat16 : Dtype::float32; }

Sizes sizes(const std::array<int64_t, 6>& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

using HeadIndex = std::optional<std::vector<int64_t>>;

const int64_t* indices(const HeadIndex& index) { return index ? index->data() : nullptr; }

// stored rows, q, k, bias, log-sum-exp and scale.
using MapTensors = std::tuple<std::optional<Strided>, std::optional<Strided>,
                              std::optional<Strided>, std::optional<Strided>,
                              std::optional<Strided>, float>;

Map map_of(const MapTensors& t) {
    return {view(std::get<0>(t)), view(std::get<1>(t)), view(std::get<2>(t)),
            view(std::get<3>(t)), view(std::get<4>(t)), std::get<5>(t)};
}

void attention(bool is_bfloat16, std::array<int64_t, 6> size, const MapTensors& map,
               int64_t map_pitch, Strided v, Strided out, int threads) {
    AttentionArgs a = {dtype(is_bfloat16), sizes(size), map_of(map), map_pitch,
                       view(v),            view(out),   threads};
    py::gil_scoped_release release;
    kernels().attention(a);
}

void apply(bool is_bfloat16, std::array<int64_t, 6> size, const MapTensors& map, Strided v,
           Strided out, HeadIndex head_index, uintptr_t correction, int threads) {
    ApplyArgs a = {dtype(is_bfloat16),  sizes(size),        map_of(map), view(v), view(out),
                   indices(head_index), floats(correction), threads};
    py::gil_scoped_release release;
    kernels().apply(a);
}

void attention_backward(bool is_bfloat16, std::array<int64_t, 6> size, int64_t map_heads,
                        const MapTensors& map, Strided v, Strided grad_out,
                        std::optional<Strided> grad_map, std::optional<Strided> grad_lse,
                        const std::vector<std::pair<Strided, Strided>>& shared, Strided dq,
                        Strided dk, Strided dv, std::optional<Strided> dbias, HeadIndex head_index,
                        int threads) {
    std::vector<SharedGradient> pairs;
    for (const auto& [grad, values] : shared) pairs.push_back({view(grad), view(values)});
    AttentionBackwardArgs a = {
        dtype(is_bfloat16), sizes(size),    map_heads,      map_of(map),  view(v),
        view(grad_out),     view(grad_map), view(grad_lse), pairs.data(), int64_t(pairs.size()),
        view(dq),           view(dk),       view(dv),       view(dbias),  indices(head_index),
        threads};
    py::gil_scoped_release release;
    kernels().attention_backward(a);
}

void apply_backward(bool is_bfloat16, std::array<int64_t, 6> size,
                    std::array<int64_t, 3> map_size, const MapTensors& map, Strided v,
                    Strided grad_out, Strided dv, std::optional<Strided> dmap,
                    std::optional<Strided> out, std::optional<Strided> dlse, HeadIndex head_index,
                    int threads) {
    ApplyBackwardArgs a = {dtype(is_bfloat16), sizes(size), map_size[0],         map_size[1],
                           map_size[2],        map_of(map), view(v),             view(grad_out),
                           view(dv),           view(dmap),  view(out),           view(dlse),
                           indices(head_index), threads};
    py::gil_scoped_release release;
    kernels().apply_backward(a);
}

PoolArgs pool_args(bool is_bfloat16, const std::string& kind, std::array<int64_t, 3> size,
                   std::array<int64_t, 4> grids, std::array<int64_t, 6> window, Strided x,
                   Strided out, int threads) {
    PoolArgs a = {};
    a.dtype = dtype(is_bfloat16);
    a.kind = kind == "max"   ? PoolKind::max
             : kind == "avg" ? PoolKind::avg
                             : PoolKind::depthwise;
    a.batch = size[0], a.channels = size[1], a.prefix = size[2];
    a.height = grids[0], a.width = grids[1], a.out_height = grids[2], a.out_width = grids[3];
    a.kernel_h = window[0], a.kernel_w = window[1];
    a.stride_h = window[2], a.stride_w = window[3];
    a.padding_h = window[4], a.padding_w = window[5];
    a.x = view(x), a.out = view(out), a.threads = threads;
    return a;
}

void token_pool(bool is_bfloat16, std::string kind, std::array<int64_t, 3> size,
                std::array<int64_t, 4> grids, std::array<int64_t, 6> window, Strided x, Strided out,
                uintptr_t weight, uintptr_t bias, uintptr_t norm_weight, uintptr_t norm_bias,
                float norm_eps, int threads) {
    PoolArgs a = pool_args(is_bfloat16, kind, size, grids, window, x, out, threads);
    a.weight = floats(weight), a.bias = floats(bias);
    a.norm_weight = floats(norm_weight), a.norm_bias = floats(norm_bias), a.norm_eps = norm_eps;
    py::gil_scoped_release release;
    kernels().token_pool(a);
}

void token_pool_backward(bool is_bfloat16, std::string kind, std::array<int64_t, 3> size,
                         std::array<int64_t, 4> grids, std::array<int64_t, 6> window, Strided x,
                         Strided grad_out, Strided dx, uintptr_t weight, uintptr_t dweight,
                         uintptr_t dbias, int threads) {
    PoolArgs a = pool_args(is_bfloat16, kind, size, grids, window, x, grad_out, threads);
    a.dx = view(dx), a.weight = floats(weight);
    a.dweight = floats(dweight), a.dbias = floats(dbias);
    py::gil_scoped_release release;
    kernels().token_pool_backward(a);
}

int64_t* integers(uintptr_t address) { return reinterpret_cast<int64_t*>(address); }

// Addresses of into, order and starts.
using Tables = std::array<uintptr_t, 3>;

void match_tokens(bool is_bfloat16, std::array<int64_t, 6> size, Strided metric, uintptr_t penalty,
                  Tables tables, int threads) {
    MatchArgs a = {dtype(is_bfloat16),  size[0], size[1], size[2], size[3], size[4], size[5],
                   view(metric), floats(penalty), integers(tables[0]), integers(tables[1]),
                   integers(tables[2]), threads};
    py::gil_scoped_release release;
    kernels().match_tokens(a);
}

MergeArgs merge_args(bool is_bfloat16, std::array<int64_t, 4> size, const Tables& tables,
                     uintptr_t weights, uintptr_t sizes, Strided out, int threads) {
    MergeArgs a = {};
    a.dtype = dtype(is_bfloat16);
    a.batch = size[0], a.tokens = size[1], a.outputs = size[2], a.channels = size[3];
    a.into = integers(tables[0]), a.order = integers(tables[1]), a.starts = integers(tables[2]);
    a.weights = floats(weights), a.sizes = floats(sizes);
    a.out = view(out), a.threads = threads;
    return a;
}

void merge_tokens(bool is_bfloat16, std::array<int64_t, 4> size, const Tables& tables,
                  uintptr_t weights, uintptr_t sizes, Strided out, Strided x,
                  std::optional<Strided> residual, std::optional<Strided> normed,
                  uintptr_t norm_weight, uintptr_t norm_bias, float norm_eps, int threads) {
    MergeArgs a = merge_args(is_bfloat16, size, tables, weights, sizes, out, threads);
    a.x = view(x), a.residual = view(residual), a.normed = view(normed);
    a.norm_weight = floats(norm_weight), a.norm_bias = floats(norm_bias), a.norm_eps = norm_eps;
    py::gil_scoped_release release;
    kernels().merge_tokens(a);
}

void merge_tokens_backward(bool is_bfloat16, std::array<int64_t, 4> size, const Tables& tables,
                           uintptr_t weights, uintptr_t sizes, Strided grad_out, Strided dx,
                           int threads) {
    MergeArgs a = merge_args(is_bfloat16, size, tables, weights, sizes, grad_out, threads);
    a.dx = view(dx);
    py::gil_scoped_release release;
    kernels().merge_tokens_backward(a);
}

void reduce_map(bool is_bfloat16, std::array<int64_t, 6> size, Strided map, Strided out,
                std::array<uintptr_t, 4> tables, int threads) {
    ReduceMapArgs a = {dtype(is_bfloat16), size[0], size[1], size[2], size[3], size[4], size[5],
                       view(map), view(out), integers(tables[0]), integers(tables[1]),
                       floats(tables[2]), floats(tables[3]), threads};
    py::gil_scoped_release release;
    kernels().reduce_map(a);
}

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels& table : usable_tables()) names.push_back(table.isa);
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of psvit_kernels; called through psvit_kernels.cpu.";
    kernels();  // a wrong PSVIT_CPU_ISA shows at import
    m.def("attention", &attention);
    m.def("apply", &apply);
    m.def("attention_backward", &attention_backward);
    m.def("apply_backward", &apply_backward);
    m.def("token_pool", &token_pool);
    m.def("token_pool_backward", &token_pool_backward);
    m.def("match_tokens", &match_tokens);
    m.def("merge_tokens", &merge_tokens);
    m.def("merge_tokens_backward", &merge_tokens_backward);
    m.def("reduce_map", &reduce_map);
    m.def("peak_gflops", [](int threads) { return kernels().peak_gflops(threads); },
          py::call_guard<py::gil_scoped_release>(),
          "Fused multiply-adds in registers, in GFLOP/s: what no product can exceed.");
    m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
    m.def("usable_isas", &usable_isas, "The instruction sets that this machine runs, best first.");
    m.def("openmp", &openmp_runtime, "The file of the OpenMP runtime in use, or \"\".");
}
