// Launches: grids of blocks or clusters one after the other, their shared memory, the sectors that they move.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>

namespace host_cuda {

thread_local Context* current = nullptr;
dim3 block_size, grid_size;
Launch launch;
unsigned blocks = 1;
std::vector<Context> contexts;
std::vector<unsigned char> exchanged;
uint64_t schedule = 0;
void (*before_cluster)() = nullptr;

namespace {

// The 32-byte sectors that each request of each warp touches.
std::vector<std::vector<std::vector<uint64_t>>> requests;
uint64_t sectors = 0;

void count_sectors() {
    for (auto& warp : requests) {
        for (auto& request : warp) {
            sectors += request.size();
            request.clear();
        }
    }
}

std::vector<unsigned char*> shared_memory;  // of each block
size_t shared_size = 0;

void allocate_shared(unsigned char*& memory) {
    // Exactly as large as asked for and full of NaN: a read out of bounds or of nothing written shows.
    const size_t size = std::max<size_t>(shared_size, 1);
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 128, size) != 0) std::abort();
    memory = static_cast<unsigned char*>(std::memset(allocated, 0xff, size));
}

bool is_valid(dim3 grid, unsigned cluster) {
    return threads() > 0 && threads() <= 1024 && threads() % WARP == 0 && grid.x % cluster == 0;
}

bool run_cluster(unsigned x, unsigned y, unsigned z) {
    for (unsigned char*& memory : shared_memory) allocate_shared(memory);
    contexts.assign(all_threads(), Context{});
    for (unsigned i = 0; i < all_threads(); ++i) {
        const unsigned member = i / threads(), linear = i % threads();
        contexts[i].thread = {linear % block_size.x, linear / block_size.x % block_size.y,
                              linear / block_size.x / block_size.y};
        contexts[i].block = {x + member, y, z};
        contexts[i].linear = linear;
        contexts[i].rank = member;
        contexts[i].shared = shared_memory[member];
    }
    if (before_cluster != nullptr) before_cluster();
    const bool succeeded = run_blocks();
    for (unsigned char* memory : shared_memory) std::free(memory);
    count_sectors();
    return succeeded;
}

}  // namespace

extern "C" uint64_t host_cuda_sectors(int restart) {
    const uint64_t total = sectors;
    if (restart) sectors = 0;
    return total;
}

size_t shared_bytes() { return shared_size; }

extern "C" void host_cuda_schedule(uint64_t seed) { schedule = seed; }

void trace(const void* pointer, size_t bytes, bool active) {
    const unsigned index = current->request++;
    if (!active) return;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (address % bytes != 0) fail("misaligned access to global memory");
#ifndef HOST_CUDA_THREADS
    auto& warp = requests[current_index() / WARP];
    if (warp.size() <= index) warp.resize(index + 1);
    for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector) {
        auto& seen = warp[index];
        if (std::find(seen.rbegin(), seen.rend(), sector) == seen.rend()) seen.push_back(sector);
    }
#else
    (void)index;
#endif
}

unsigned blocks_of_cluster() { return blocks; }

void* in_block(void* pointer, int rank) {
    const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - current->shared;
    if (rank < 0 || static_cast<unsigned>(rank) >= blocks) fail("a cluster has no block %d", rank);
    if (offset < 0 || static_cast<size_t>(offset) >= shared_size) fail("no place in shared memory");
    return shared_memory[static_cast<size_t>(rank)] + offset;
}

uint64_t shuffle(uint64_t value, unsigned source_lane) {
    uint64_t result;
    std::memcpy(&result, exchange(&value, sizeof(value)) + source_lane * MOST_EXCHANGED, sizeof(result));
    return result;
}

bool run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*kernel)(const void*),
         const void* argument) {
    grid_size = grid;
    block_size = block;
    blocks = cluster;
    shared_size = shared_bytes;
    // A wrong launch is the plan's fault, not the kernel's.
    if (!is_valid(grid, cluster)) std::abort();
    launch = {kernel, argument};
    exchanged.assign(2 * all_threads() * MOST_EXCHANGED, 0);
    requests.resize(all_threads() / WARP);
    shared_memory.assign(cluster, nullptr);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += cluster) {
                if (!run_cluster(x, y, z)) return false;
            }
        }
    }
    return true;
}

}  // namespace host_cuda
