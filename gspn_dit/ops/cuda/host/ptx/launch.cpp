#include "launch.h"

#include "../runtime.h"

namespace ptx {

int launch(const Entry& entry, const unsigned* grid, const unsigned* block, size_t shared_bytes, const void* problem) {
    if (block[0] * block[1] * block[2] > entry.threads) {
        host_cuda::say("a block of %u threads, but at most %u are declared", block[0] * block[1] * block[2],
                       entry.threads);
        return 2;
    }
    parameters = static_cast<const unsigned char*>(problem);
    parameter_bytes = entry.parameter_bytes;
    host_cuda::before_cluster = start_cluster;
    // Dynamic shared memory begins where 16 bytes are aligned.
    const size_t static_bytes = (entry.static_bytes + 15) / 16 * 16;
    const dim3 blocks{grid[0], grid[1], grid[2]}, threads{block[0], block[1], block[2]};
    return host_cuda::run(blocks, threads, entry.cluster, static_bytes + shared_bytes, entry.kernel, problem) ? 0 : 2;
}

}  // namespace ptx
