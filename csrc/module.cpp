// The Python module: addresses, sizes and strides in, nothing of PyTorch included or linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
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
    double peak_gflops(int threads);                       \
    }
#define PSVIT_TABLE(ISA)                                                            \
    Kernels{#ISA,                    ISA::attention,       ISA::apply,               \
            ISA::attention_backward, ISA::apply_backward,  ISA::token_pool,          \
            ISA::token_pool_backward, ISA::peak_gflops}

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

void attention(bool is_bfloat16, std::array<int64_t, 6> size, Strided q, Strided k, Strided v,
               std::optional<Strided> bias, Strided out, std::optional<Strided> map,
               int64_t map_pitch, uintptr_t lse, int64_t lse_heads, bool rebuild_map,
               HeadIndex head_index, uintptr_t correction, float scale, int threads) {
    AttentionArgs a = {dtype(is_bfloat16), sizes(size), view(q),   view(k),     view(v),
                       view(bias),         view(out),   view(map), map_pitch,   floats(lse),
                       lse_heads,          rebuild_map, indices(head_index),
                       floats(correction), scale,       threads};
    py::gil_scoped_release release;
    kernels().attention(a);
}

void apply(bool is_bfloat16, std::array<int64_t, 6> size, Strided map, Strided v, Strided out,
           HeadIndex head_index, uintptr_t correction, int threads) {
    ApplyArgs a = {dtype(is_bfloat16),  sizes(size),        view(map), view(v), view(out),
                   indices(head_index), floats(correction), threads};
    py::gil_scoped_release release;
    kernels().apply(a);
}

void attention_backward(bool is_bfloat16, std::array<int64_t, 6> size, int64_t map_heads, Strided q,
                        Strided k, Strided v, std::optional<Strided> bias, Strided grad_out,
                        std::optional<Strided> map, std::optional<Strided> grad_map, Strided dq,
                        Strided dk, Strided dv, std::optional<Strided> dbias, int64_t map_pitch,
                        uintptr_t lse, HeadIndex head_index, float scale, int threads) {
    AttentionBackwardArgs a = {dtype(is_bfloat16), sizes(size), map_heads,      view(q),
                               view(k),            view(v),     view(bias),     view(grad_out),
                               view(map),          view(grad_map), view(dq),    view(dk),
                               view(dv),           view(dbias), map_pitch,      floats(lse),
                               indices(head_index), scale,      threads};
    py::gil_scoped_release release;
    kernels().attention_backward(a);
}

void apply_backward(bool is_bfloat16, std::array<int64_t, 6> size,
                    std::array<int64_t, 3> map_size, Strided map, Strided v, Strided grad_out,
                    Strided dmap, Strided dv, HeadIndex head_index, int threads) {
    ApplyBackwardArgs a = {dtype(is_bfloat16), sizes(size), map_size[0],    map_size[1],
                           map_size[2],        view(map),   view(v),        view(grad_out),
                           view(dmap),         view(dv),    indices(head_index), threads};
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
    m.def("peak_gflops", [](int threads) { return kernels().peak_gflops(threads); },
          py::call_guard<py::gil_scoped_release>(),
          "Fused multiply-adds in registers, in GFLOP/s: what no product can exceed.");
    m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
    m.def("usable_isas", &usable_isas, "The instruction sets that this machine runs, best first.");
    m.def("openmp", &openmp_runtime, "The file of the OpenMP runtime in use, or \"\".");
}
