// Work shared out to the threads of the OpenMP runtime that PyTorch already loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace psvit {

// Calls body(context, task, scratch) for every task from 0 to tasks - 1, on up to `threads`
// threads. `scratch` points at `scratch_floats` floats of the calling thread, aligned to 64 bytes
// and not initialised. Which thread runs a task is left open, so a task must not depend on it.
void run_tasks(int64_t tasks, int threads, int64_t scratch_floats,
               void (*body)(const void* context, int64_t task, float* scratch),
               const void* context);

template <typename Body>
void parallel_tasks(int64_t tasks, int threads, int64_t scratch_floats, const Body& body) {
    run_tasks(
        tasks, threads, scratch_floats,
        [](const void* context, int64_t task, float* scratch) {
            (*static_cast<const Body*>(context))(task, scratch);
        },
        &body);
}

// The file of the OpenMP runtime in use, or an empty string: then everything runs on one thread.
const char* openmp_runtime();

}  // namespace psvit
