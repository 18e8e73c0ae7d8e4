// Runs the CUDA threads of a block, or of a cluster's blocks, as fibres that take turns, or with HOST_CUDA_THREADS as host threads for ThreadSanitizer.
#include "host_cuda.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#ifdef HOST_CUDA_THREADS
#include <atomic>
#include <mutex>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

namespace host_cuda {

thread_local Context* current = nullptr;
dim3 block_size, grid_size;

namespace {

constexpr unsigned WARP = 32;

unsigned blocks = 1;  // of a cluster

unsigned threads() { return block_size.x * block_size.y * block_size.z; }
unsigned all_threads() { return blocks * threads(); }

[[noreturn]] void fail(const char* message) {
    std::fprintf(stderr, "host_cuda: %s\n", message);
    std::abort();
}

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

struct Launch {
    void (*kernel)(const void*);
    const void* argument;
} launch;

std::vector<Context> contexts;  // block after block
std::vector<uint64_t> shuffled;
std::vector<unsigned char*> shared_memory;  // of each block
size_t shared_size = 0;

unsigned current_index() { return static_cast<unsigned>(current - contexts.data()); }

}  // namespace

extern "C" uint64_t host_cuda_sectors(int restart) {
    const uint64_t total = sectors;
    if (restart) sectors = 0;
    return total;
}

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

void* in_block(void* pointer, int rank) {
    const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - current->shared;
    if (rank < 0 || static_cast<unsigned>(rank) >= blocks) fail("a cluster has no such block");
    if (offset < 0 || static_cast<size_t>(offset) >= shared_size) fail("no place in shared memory");
    return shared_memory[static_cast<size_t>(rank)] + offset;
}

namespace {

// A counter of arrivals: the number of its phase, whether that has its one arrival, bytes that are still to come.
bool is_over(uint64_t arrivals, unsigned phase) { return (arrivals >> 33 & 1) != phase; }

uint64_t counted(uint64_t arrivals, bool is_arrival, int more) {
    uint64_t phase = arrivals >> 33;
    bool arrived = (arrivals >> 32 & 1) != 0;
    const int bytes = static_cast<int>(static_cast<uint32_t>(arrivals)) + more;
    if (arrived && is_arrival) fail("a phase has two arrivals");
    arrived |= is_arrival;
    if (arrived && bytes == 0) {
        ++phase;
        arrived = false;
    }
    return phase << 33 | uint64_t(arrived) << 32 | static_cast<uint32_t>(bytes);
}

}  // namespace

#ifndef HOST_CUDA_THREADS

namespace {

enum class State { ready, at_barrier, at_cluster_barrier, at_warp_barrier, at_arrivals, finished };

struct Fibre {
    ucontext_t entry;
    jmp_buf place;
    State state = State::ready;
    bool started = false;
    void* stack = nullptr;
    const uint64_t* arrivals = nullptr;  // awaited
    unsigned phase = 0;
};

constexpr size_t STACK_BYTES = 256 * 1024;
std::vector<std::unique_ptr<Fibre>> fibres;
unsigned running = 0;

// AddressSanitizer follows swapcontext but not jumps between stacks; jumps need no system call.
#if defined(__SANITIZE_ADDRESS__)
ucontext_t scheduler_entry;
void leave() { swapcontext(&fibres[running]->entry, &scheduler_entry); }
void enter(Fibre& fibre) { swapcontext(&scheduler_entry, &fibre.entry); }
#else
jmp_buf scheduler_place;
void leave() {
    if (_setjmp(fibres[running]->place) == 0) _longjmp(scheduler_place, 1);
}
void enter(Fibre& fibre) {
    if (_setjmp(scheduler_place) != 0) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    setcontext(&fibre.entry);
}
#endif

void body() {
    launch.kernel(launch.argument);
    fibres[running]->state = State::finished;
    leave();
    fail("a finished fibre was resumed");
}

void wait(State state) {
    fibres[running]->state = state;
    leave();
}

// Let threads go on where all that are still running have arrived; returns whether any can run.
bool release(unsigned first, unsigned last, State waiting) {
    for (unsigned i = first; i < last; ++i) {
        if (fibres[i]->state != waiting && fibres[i]->state != State::finished) return false;
    }
    bool any = false;
    for (unsigned i = first; i < last; ++i) {
        if (fibres[i]->state == waiting) {
            fibres[i]->state = State::ready;
            any = true;
        }
    }
    return any;
}

void run_blocks() {
    const unsigned count = all_threads();
    while (fibres.size() < count) {
        fibres.push_back(std::make_unique<Fibre>());
        fibres.back()->stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fibres.back()->stack == MAP_FAILED) fail("no memory for a fibre's stack");
    }
    for (unsigned i = 0; i < count; ++i) {
        Fibre& fibre = *fibres[i];
        fibre.state = State::ready;
        fibre.started = false;
        getcontext(&fibre.entry);
        fibre.entry.uc_stack.ss_sp = fibre.stack;
        fibre.entry.uc_stack.ss_size = STACK_BYTES;
        fibre.entry.uc_link = nullptr;
        makecontext(&fibre.entry, body, 0);
    }
    for (;;) {
        bool progress = false;
        for (unsigned i = 0; i < count; ++i) {
            if (fibres[i]->state == State::at_arrivals && is_over(*fibres[i]->arrivals, fibres[i]->phase)) {
                fibres[i]->state = State::ready;
            }
            if (fibres[i]->state != State::ready) continue;
            running = i;
            current = &contexts[i];
            enter(*fibres[i]);
            progress = true;
        }
        for (unsigned first = 0; first < count; first += WARP) {
            progress |= release(first, std::min(first + WARP, count), State::at_warp_barrier);
        }
        for (unsigned first = 0; first < count; first += threads()) {
            progress |= release(first, first + threads(), State::at_barrier);
        }
        progress |= release(0, count, State::at_cluster_barrier);
        if (!progress) break;
    }
    for (unsigned i = 0; i < count; ++i) {
        if (fibres[i]->state != State::finished) fail("threads of a block wait for each other at different barriers");
    }
}

}  // namespace

void barrier() { wait(State::at_barrier); }
void cluster_barrier() { wait(State::at_cluster_barrier); }
void count_arrival(uint64_t* arrivals, bool is_arrival, int bytes) {
    *arrivals = counted(*arrivals, is_arrival, bytes);
}
void await(uint64_t* arrivals, unsigned phase) {
    if (is_over(*arrivals, phase)) return;
    fibres[running]->arrivals = arrivals;
    fibres[running]->phase = phase;
    wait(State::at_arrivals);
}

uint64_t shuffle(uint64_t value, unsigned source_lane) {
    const unsigned thread = running, source = thread / WARP * WARP + source_lane;
    if (source >= all_threads()) fail("a shuffle reads a lane that does not exist");
    shuffled[thread] = value;
    wait(State::at_warp_barrier);
    const uint64_t result = shuffled[source];
    wait(State::at_warp_barrier);
    return result;
}

#else

namespace {

// A barrier whose size shrinks as threads finish, as __syncthreads does. Who waits looks at the generation alone:
// taking the mutex again on waking would order it behind everything that others did meanwhile, and hide their races.
class Barrier {
  public:
    void reset(unsigned size) { size_ = size, waiting_ = 0; }
    void arrive_and_wait() {
        unsigned generation;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            generation = generation_.load(std::memory_order_relaxed);
            if (++waiting_ == size_) return release();
        }
        generation_.wait(generation, std::memory_order_acquire);
    }
    void drop() {
        const std::lock_guard<std::mutex> lock(mutex_);
        --size_;
        if (size_ > 0 && waiting_ == size_) release();
    }

  private:
    void release() {
        waiting_ = 0;
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    std::mutex mutex_;
    std::atomic<unsigned> generation_{0};
    unsigned size_ = 0, waiting_ = 0;
};

Barrier all_blocks_barrier;
std::vector<std::unique_ptr<Barrier>> block_barriers, warp_barriers;

void run_blocks() {
    const unsigned count = all_threads();
    all_blocks_barrier.reset(count);
    for (auto [barriers, size] : {std::pair(&block_barriers, threads()), std::pair(&warp_barriers, WARP)}) {
        barriers->clear();
        for (unsigned first = 0; first < count; first += size) {
            barriers->push_back(std::make_unique<Barrier>());
            barriers->back()->reset(size);
        }
    }
    std::vector<std::thread> running;
    for (unsigned i = 0; i < count; ++i) {
        running.emplace_back([i] {
            current = &contexts[i];
            launch.kernel(launch.argument);
            warp_barriers[i / WARP]->drop();
            block_barriers[i / threads()]->drop();
            all_blocks_barrier.drop();
        });
    }
    for (auto& thread : running) thread.join();
}

}  // namespace

void barrier() { block_barriers[current_index() / threads()]->arrive_and_wait(); }
void cluster_barrier() { all_blocks_barrier.arrive_and_wait(); }
void count_arrival(uint64_t* arrivals, bool is_arrival, int bytes) {
    std::atomic_ref<uint64_t> counter(*arrivals);
    uint64_t before = counter.load(std::memory_order_relaxed);
    while (!counter.compare_exchange_weak(before, counted(before, is_arrival, bytes), std::memory_order_release,
                                          std::memory_order_relaxed)) {
    }
    counter.notify_all();
}
void await(uint64_t* arrivals, unsigned phase) {
    const std::atomic_ref<uint64_t> counter(*arrivals);
    for (uint64_t now = counter.load(std::memory_order_acquire); !is_over(now, phase);
         now = counter.load(std::memory_order_acquire)) {
        counter.wait(now, std::memory_order_acquire);
    }
}

uint64_t shuffle(uint64_t value, unsigned source_lane) {
    const unsigned thread = current_index(), source = thread / WARP * WARP + source_lane;
    if (source >= all_threads()) fail("a shuffle reads a lane that does not exist");
    shuffled[thread] = value;
    warp_barriers[thread / WARP]->arrive_and_wait();
    const uint64_t result = shuffled[source];
    warp_barriers[thread / WARP]->arrive_and_wait();
    return result;
}

#endif

void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*kernel)(const void*),
         const void* argument) {
    grid_size = grid;
    block_size = block;
    blocks = cluster;
    shared_size = shared_bytes;
    if (threads() == 0 || threads() > 1024) fail("a block has 1 to 1024 threads");
    if (threads() % WARP != 0) fail("a warp of the block is not full");
    if (grid.x % cluster != 0) fail("a cluster of the grid is not full");
    launch = {kernel, argument};
    shuffled.assign(all_threads(), 0);
    requests.resize(all_threads() / WARP);
    shared_memory.assign(cluster, nullptr);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += cluster) {
                for (unsigned char*& memory : shared_memory) {
                    // Exactly as large as asked for and full of NaN: a read out of bounds or of nothing written shows.
                    void* allocated = nullptr;
                    const size_t size = std::max<size_t>(shared_bytes, 1);
                    if (posix_memalign(&allocated, 128, size) != 0) fail("no shared memory");
                    memory = static_cast<unsigned char*>(std::memset(allocated, 0xff, size));
                }
                contexts.assign(all_threads(), Context{});
                for (unsigned i = 0; i < all_threads(); ++i) {
                    const unsigned member = i / threads(), linear = i % threads();
                    contexts[i].thread = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
                    contexts[i].block = {x + member, y, z};
                    contexts[i].linear = linear;
                    contexts[i].shared = shared_memory[member];
                }
                run_blocks();
                for (unsigned char* memory : shared_memory) std::free(memory);
                count_sectors();
            }
        }
    }
}

}  // namespace host_cuda
