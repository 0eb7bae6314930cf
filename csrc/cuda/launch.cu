#include "launch.h"

#include <initializer_list>
#include <utility>

#ifndef PSVIT_EMULATED
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace psvit::cuda {

namespace {

std::string listed(std::initializer_list<std::pair<const char*, int>> sizes) {
    std::string text;
    for (auto [name, size] : sizes)
        text += (text.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(size);
    return text;
}

}  // namespace

void refuse(const char* kernel, const std::string& shape, const std::string& reason) {
    throw CudaError(std::string(kernel) + " (" + shape + "): " + reason);
}

std::string shape_of(const ApplyArgs& a) {
    return listed({{"B", a.batch}, {"H", a.heads}, {"M", a.rows}, {"N", a.tokens}, {"d", a.dim}});
}

std::string shape_of(const AttentionArgs& a) {
    return listed({{"B", a.batch}, {"H", a.heads}, {"M", a.rows}, {"N", a.tokens}, {"d", a.dim},
                   {"d of v", a.value_dim}});
}

std::string shape_of(const PoolArgs& a) {
    return listed({{"B", a.batch}, {"C", a.channels}, {"prefix", a.prefix}, {"h", a.height},
                   {"w", a.width}});
}

std::string shape_of(const SharingArgs& a) {
    return listed({{"B", a.batch}, {"H", a.heads}, {"N", a.tokens}, {"C", a.channels},
                   {"d", a.dim}});
}

#ifdef PSVIT_EMULATED

// Few, so that a persistent block has several pieces of work.
int multiprocessors(int) { return 3; }

const char* encode(TensorMap& map, const TensorShape& shape) {
    return emulator::encode(map, shape.data, shape.element_bytes, shape.sizes, shape.strides,
                            shape.box_rows);
}

#else

namespace {

// Makes a device current while a kernel is launched on one of its streams.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        error = cudaGetDevice(&before_);
        if (error == cudaSuccess && before_ != device) {
            error = cudaSetDevice(device);
            changed_ = error == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    cudaError_t error;

private:
    int before_ = 0;
    bool changed_ = false;
};

cudaError_t launch_on_current(const void* kernel, Grid grid, void* stream, void** parameters) {
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared);
    if (error != cudaSuccess) return error;
    return cudaLaunchKernel(kernel, dim3(grid.blocks), dim3(grid.threads), parameters, grid.shared,
                            static_cast<cudaStream_t>(stream));
}

// The driver's function, found at run time: no library of the driver is needed to import this.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

}  // namespace

int multiprocessors(int device) {
    int count = 1;
    // Where this fails the launch that follows does too, and says why, by the name of its kernel.
    const cudaError_t error =
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return error == cudaSuccess ? count : 1;
}

const char* launch_kernel(const void* kernel, Grid grid, Launch where, void** parameters) {
    DeviceGuard guard(where.device);
    cudaError_t error = guard.error;
    if (error == cudaSuccess) error = launch_on_current(kernel, grid, where.stream, parameters);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next call of anybody would report this one again
    return cudaGetErrorString(error);
}

const char* encode(TensorMap& map, const TensorShape& shape) {
    static const auto encoder = tensor_map_encoder();
    if (!encoder) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0";
    const u32 box[4] = {u32(128 / shape.element_bytes), shape.box_rows, 1, 1};
    const u32 steps[4] = {1, 1, 1, 1};
    const CUresult result = encoder(
        &map,
        shape.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4, const_cast<void*>(shape.data), reinterpret_cast<const cuuint64_t*>(shape.sizes),
        reinterpret_cast<const cuuint64_t*>(shape.strides + 1), box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "the driver refuses the description of a tensor";
}

#endif

}  // namespace psvit::cuda
