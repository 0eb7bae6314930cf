// The Python module of the CUDA kernels: addresses, sizes, strides and a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

#ifndef PSVIT_CUDA_MODULE
#define PSVIT_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace psvit::cuda;

// Weak, so that a build for some architectures may leave kernels out: their address is null then.
namespace psvit::cuda {
__attribute__((weak)) void apply_ampere(const ApplyArgs&, Launch);
__attribute__((weak)) void apply_hopper(const ApplyArgs&, Launch);
__attribute__((weak)) int apply_hopper_shared(int tokens, int dim, Code code);
__attribute__((weak)) void attention_ampere(const AttentionArgs&, Launch);
__attribute__((weak)) int attention_ampere_shared(int tokens, int dim);
__attribute__((weak)) void attention_hopper(const AttentionArgs&, Launch);
__attribute__((weak)) void sharing_hopper(const SharingArgs&, Launch);
__attribute__((weak)) void token_pool(const PoolArgs&, Launch);
}  // namespace psvit::cuda

namespace {

const char* const AMPERE = "sm_80";
const char* const HOPPER = "sm_90a";

// The kernel of a family; with an error in words where this build has none.
template <typename Kernel>
Kernel of_family(const std::string& family, const char* op, Kernel ampere, Kernel hopper) {
    Kernel kernel = family == HOPPER ? hopper : family == AMPERE ? ampere : nullptr;
    if (!kernel) throw CudaError(std::string(op) + ": this build has no kernel for " + family);
    return kernel;
}

// A tensor as Python hands it over: address and the strides of its leading dimensions.
using Strided = std::pair<uintptr_t, std::array<int64_t, 3>>;
// Device index and cudaStream_t.
using Place = std::pair<int, uintptr_t>;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Tensor4 tensor(const Strided& t) {
    return {pointer<void>(t.first), t.second[0], t.second[1], t.second[2]};
}

Launch launch_on(Place place) { return {place.first, pointer<void>(place.second)}; }

Half half(bool is_bfloat16) { return is_bfloat16 ? Half::bfloat16 : Half::float16; }

Code code_named(const std::string& name) {
    if (name == "half") return Code::half;
    if (name == "uint8") return Code::uint8;
    if (name == "e4m3") return Code::e4m3;
    throw std::invalid_argument("no code is called " + name);
}

void apply(const std::string& family, Place place, bool is_bfloat16, const std::string& code,
           std::array<int, 7> size, Strided map, int map_pitch, Strided row_scale, Strided v,
           uintptr_t out, uintptr_t head_index, uintptr_t correction) {
    auto kernel = of_family(family, "apply", apply_ampere, apply_hopper);
    auto [batch, heads, rows, tokens, dim, map_batch, map_heads] = size;
    ApplyArgs a = {half(is_bfloat16), code_named(code),   batch,
                   heads,             rows,               tokens,
                   dim,               map_batch,          map_heads,
                   tensor(map),       map_pitch,          tensor(row_scale),
                   tensor(v),         pointer<void>(out), pointer<int32_t>(head_index),
                   pointer<float>(correction)};
    py::gil_scoped_release release;
    kernel(a, launch_on(place));
}

int apply_shared(const std::string& family, int tokens, int dim, const std::string& code) {
    auto bytes = of_family(family, "apply", decltype(&apply_hopper_shared){}, apply_hopper_shared);
    return bytes(tokens, dim, code_named(code));
}

int attention_shared(const std::string& family, int tokens, int dim) {
    auto none = decltype(&attention_ampere_shared){};
    return of_family(family, "attention", attention_ampere_shared, none)(tokens, dim);
}

void attention(const std::string& family, Place place, bool is_bfloat16, const std::string& code,
               std::array<int, 6> size, float scale, Strided q, Strided k, Strided v, uintptr_t out,
               uintptr_t map, int map_pitch, uintptr_t row_scale, uintptr_t lse) {
    auto kernel = of_family(family, "attention", attention_ampere, attention_hopper);
    auto [batch, heads, rows, tokens, dim, value_dim] = size;
    AttentionArgs a = {half(is_bfloat16), map != 0,           code_named(code),
                       batch,             heads,              rows,
                       tokens,            dim,                value_dim,
                       scale,             tensor(q),          tensor(k),
                       tensor(v),         pointer<void>(out), pointer<void>(map),
                       map_pitch,         pointer<float>(row_scale), pointer<float>(lse)};
    py::gil_scoped_release release;
    kernel(a, launch_on(place));
}

void sharing(Place place, bool is_bfloat16, std::array<int, 6> size, uintptr_t x,
             std::array<int64_t, 2> x_strides, uintptr_t weight, uintptr_t weight_sums,
             uintptr_t bias, float eps, Strided map, uintptr_t out) {
    auto kernel = of_family(HOPPER, "sharing", decltype(&sharing_hopper){}, sharing_hopper);
    auto [batch, heads, tokens, channels, dim, map_batch] = size;
    SharingArgs a = {half(is_bfloat16), batch,
                     heads,             tokens,
                     channels,          dim,
                     map_batch,         pointer<void>(x),
                     x_strides[0],      x_strides[1],
                     pointer<void>(weight), pointer<float>(weight_sums),
                     pointer<float>(bias),  eps,
                     tensor(map),       pointer<void>(out)};
    py::gil_scoped_release release;
    kernel(a, launch_on(place));
}

PoolKind kind_named(const std::string& name) {
    if (name == "max") return PoolKind::max;
    if (name == "avg") return PoolKind::avg;
    if (name == "stride") return PoolKind::stride;
    if (name == "conv") return PoolKind::depthwise;
    throw std::invalid_argument("no kind of pool is called " + name);
}

// Address and strides of batches and tokens.
using Tokens = std::tuple<uintptr_t, int64_t, int64_t>;

void pool(const std::string& family, Place place, bool is_bfloat16, const std::string& kind,
          std::array<int, 3> size, std::array<int, 4> grids, std::array<int, 6> window, Tokens x,
          Tokens residual, uintptr_t out, bool half_parameters,
          std::array<uintptr_t, 4> parameters, float norm_eps) {
    auto kernel = of_family(family, "token_pool", token_pool, token_pool);
    PoolArgs a = {};
    a.dtype = half(is_bfloat16), a.kind = kind_named(kind);
    a.batch = size[0], a.channels = size[1], a.prefix = size[2];
    a.height = grids[0], a.width = grids[1], a.out_height = grids[2], a.out_width = grids[3];
    a.kernel_h = window[0], a.kernel_w = window[1];
    a.stride_h = window[2], a.stride_w = window[3];
    a.padding_h = window[4], a.padding_w = window[5];
    a.x = pointer<void>(std::get<0>(x));
    a.x_stride_b = std::get<1>(x), a.x_stride_n = std::get<2>(x);
    a.residual = pointer<void>(std::get<0>(residual));
    a.residual_stride_b = std::get<1>(residual), a.residual_stride_n = std::get<2>(residual);
    a.out = pointer<void>(out);
    a.half_parameters = half_parameters;
    a.weight = pointer<void>(parameters[0]), a.bias = pointer<void>(parameters[1]);
    a.norm_weight = pointer<void>(parameters[2]), a.norm_bias = pointer<void>(parameters[3]);
    a.norm_eps = norm_eps;
    py::gil_scoped_release release;
    kernel(a, launch_on(place));
}

// For each operation, the families that this build has a kernel of.
std::map<std::string, std::vector<std::string>> families() {
    auto present = [](bool ampere, bool hopper) {
        std::vector<std::string> names;
        if (ampere) names.push_back(AMPERE);
        if (hopper) names.push_back(HOPPER);
        return names;
    };
    return {{"apply", present(apply_ampere, apply_hopper)},
            {"attention", present(attention_ampere, attention_hopper)},
            {"sharing", present(false, sharing_hopper)},
            {"token_pool", present(token_pool, token_pool)}};
}

}  // namespace

PYBIND11_MODULE(PSVIT_CUDA_MODULE, m) {
    m.doc() = "CUDA kernels of psvit_kernels; called through psvit_kernels.cuda.";
    m.def("apply", &apply);
    m.def("apply_shared", &apply_shared, "Bytes of shared memory that a block of `apply` needs.");
    m.def("attention", &attention);
    m.def("attention_shared", &attention_shared, "The same of `attention`.");
    m.def("sharing", &sharing);
    m.def("token_pool", &pool);
    m.attr("families") = families();
    m.attr("limits") =
        py::make_tuple(SHORT_TOKENS, MAX_DIM, MAX_POOL_CHANNELS, MAX_POOL_WEIGHTS);
#ifdef PSVIT_EMULATED
    m.attr("emulated") = true;
    m.attr("architectures") = "a CPU, emulated";
#else
    m.attr("emulated") = false;
    m.attr("architectures") = PSVIT_CUDA_ARCHS;
#endif
}
