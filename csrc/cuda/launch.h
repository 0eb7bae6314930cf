// How a kernel is launched: on which device, with how much shared memory, and what is said if the
// launch is refused. And the descriptions of tensors that the copy engine takes.
#pragma once
#include <string>

#include "kernels.h"
#include "ptx.h"

namespace psvit::cuda {

struct Grid {
    int blocks, threads, shared;  // shared memory of a block in bytes
};

// Streaming multiprocessors of the device.
int multiprocessors(int device);

// Throws with the words of the CUDA runtime: "apply_hopper (B 8, H 3, ...): too many resources".
[[noreturn]] void refuse(const char* kernel, const std::string& shape, const std::string& reason);

std::string shape_of(const ApplyArgs&);
std::string shape_of(const AttentionArgs&);
std::string shape_of(const PoolArgs&);
std::string shape_of(const SharingArgs&);

// A tensor of halves or bytes, innermost dimension first: sizes in elements, strides in bytes (the
// first one's is the element). A box of 128 bytes by `box_rows` arrives in shared memory with its
// 16-byte columns exchanged (SWIZZLE_128B); what lies outside of the sizes arrives as zeros.
struct TensorShape {
    const void* data;
    int element_bytes;
    u64 sizes[4];
    u64 strides[4];
    u32 box_rows;
};
// Null, or why the driver refuses.
const char* encode(TensorMap& map, const TensorShape& shape);

#ifdef PSVIT_EMULATED

template <class Args, class... Parameters>
void launch(const char* name, const Args& args, void (*kernel)(Parameters...), Grid grid,
            Launch, const Parameters&... parameters) {
    const std::string trouble =
        emulator::run(grid.blocks, grid.threads, grid.shared, [&] { kernel(parameters...); });
    if (!trouble.empty()) refuse(name, shape_of(args), trouble);
}

#else

// The error of the launch, in words, or null.
const char* launch_kernel(const void* kernel, Grid grid, Launch where, void** parameters);

template <class Args, class... Parameters>
void launch(const char* name, const Args& args, void (*kernel)(Parameters...), Grid grid,
            Launch where, const Parameters&... parameters) {
    void* addresses[] = {const_cast<Parameters*>(&parameters)...};
    const char* trouble =
        launch_kernel(reinterpret_cast<const void*>(kernel), grid, where, addresses);
    if (trouble) refuse(name, shape_of(args), trouble);
}

#endif

}  // namespace psvit::cuda
