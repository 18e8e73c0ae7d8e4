// One variant of the kernels for the host. The build defines KERNEL_SOURCE, KERNELS and the macros of common.cuh; where
// several variants are linked together, also LAUNCH and a name for the namespace gspn of each.
#include "host_cuda.h"
#include "tensor_core.h"

#include KERNEL_SOURCE

#ifndef GSPN_PROBLEM
#define GSPN_PROBLEM gspn::Problem
#endif

#include <cstdlib>

namespace {

template <void (*KERNEL)(const GSPN_PROBLEM)>
void call(const void* problem) {
    KERNEL(*static_cast<const GSPN_PROBLEM*>(problem));
}

}  // namespace

#ifndef LAUNCH
#define LAUNCH host_cuda_launch
extern "C" size_t host_cuda_problem_bytes() { return sizeof(GSPN_PROBLEM); }
#endif

extern "C" int LAUNCH(const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                                const void* problem) {
    const dim3 blocks{grid[0], grid[1], grid[2]}, threads{block[0], block[1], block[2]};
#define KERNEL(function) \
    if (std::strcmp(name, #function) == 0) { \
        return host_cuda::run(blocks, threads, GSPN_CLUSTER, shared_bytes, call<function>, problem) ? 0 : 2; \
    }
    KERNELS
#undef KERNEL
    return 1;
}
