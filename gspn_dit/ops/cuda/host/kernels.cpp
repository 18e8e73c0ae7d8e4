// One variant of the kernels for the host. The build defines KERNEL_SOURCE, KERNELS and the macros of common.cuh; where
// several variants are linked together, also LAUNCH and a name for the namespace gspn of each.
#include "host_cuda.h"

#include KERNEL_SOURCE

#include <cstdlib>

namespace {

template <void (*KERNEL)(const gspn::Problem)>
void call(const void* problem) {
    KERNEL(*static_cast<const gspn::Problem*>(problem));
}

}  // namespace

#ifndef LAUNCH
#define LAUNCH host_cuda_launch
extern "C" size_t host_cuda_problem_bytes() { return sizeof(gspn::Problem); }
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
