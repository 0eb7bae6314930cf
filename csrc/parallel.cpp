#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <link.h>
#endif

namespace psvit {
namespace {

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
    std::string path;
    ParallelFn parallel = nullptr;
};

#ifdef __linux__
// Several runtimes may be loaded (scikit-learn brings one): PyTorch's own is the one to share.
int remember_openmp(dl_phdr_info* info, size_t, void* found) {
    const char* slash = strrchr(info->dlpi_name, '/');
    const char* name = slash ? slash + 1 : info->dlpi_name;
    bool is_openmp = !strncmp(name, "libgomp", 7) || !strncmp(name, "libiomp5", 8) ||
                     !strncmp(name, "libomp", 6);
    auto& path = *static_cast<std::string*>(found);
    if (is_openmp && (path.empty() || strstr(info->dlpi_name, "/torch"))) path = info->dlpi_name;
    return 0;
}
#endif

// Not linked: a library with this name from elsewhere would be a second pool of threads.
Runtime find_runtime() {
    Runtime runtime;
#ifdef __linux__
    dl_iterate_phdr(remember_openmp, &runtime.path);
    if (runtime.path.empty()) return runtime;
    void* handle = dlopen(runtime.path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle) runtime.parallel = reinterpret_cast<ParallelFn>(dlsym(handle, "GOMP_parallel"));
    if (!runtime.parallel) runtime.path.clear();
#endif
    return runtime;
}

const Runtime& runtime() {
    static const Runtime found = find_runtime();
    return found;
}

// Kept between calls: allocating it anew would cost more than a small product.
class Scratch {
public:
    ~Scratch() { free(memory_); }
    float* at_least(int64_t floats) {
        if (floats > floats_) {
            free(memory_);
            floats_ = 0;
            size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
            memory_ = static_cast<float*>(aligned_alloc(64, bytes));
            if (memory_) floats_ = floats;
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    int64_t floats_ = 0;
};

struct Job {
    int64_t tasks, scratch_floats;
    void (*body)(const void*, int64_t, float*);
    const void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

void work(void* argument) {
    static thread_local Scratch scratch;
    Job& job = *static_cast<Job*>(argument);
    float* memory = scratch.at_least(job.scratch_floats);
    if (!memory && job.scratch_floats) {
        job.out_of_memory = true;
        return;
    }
    for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
        job.body(job.context, task, memory);
}

}  // namespace

void run_tasks(int64_t tasks, int threads, int64_t scratch_floats,
               void (*body)(const void*, int64_t, float*), const void* context) {
    Job job;
    job.tasks = tasks;
    job.scratch_floats = scratch_floats;
    job.body = body;
    job.context = context;
    if (threads > tasks) threads = int(tasks);
    if (threads > 1 && runtime().parallel)
        runtime().parallel(work, &job, unsigned(threads), 0);
    else if (tasks > 0)
        work(&job);
    if (job.out_of_memory) throw std::bad_alloc();
}

const char* openmp_runtime() { return runtime().path.c_str(); }

}  // namespace psvit
