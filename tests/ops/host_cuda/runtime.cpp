// Runs a block's CUDA threads as fibres that take turns, or with HOST_CUDA_THREADS as host threads for ThreadSanitizer.
#include "host_cuda.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
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
dim3 block_index, block_size, grid_size;
unsigned char* dynamic_shared = nullptr;

namespace {

constexpr unsigned WARP = 32;

unsigned threads() { return block_size.x * block_size.y * block_size.z; }

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

std::vector<Context> contexts;
std::vector<uint64_t> shuffled;

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
    auto& warp = requests[current->linear / WARP];
    if (warp.size() <= index) warp.resize(index + 1);
    for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector) {
        auto& seen = warp[index];
        if (std::find(seen.rbegin(), seen.rend(), sector) == seen.rend()) seen.push_back(sector);
    }
#else
    (void)index;
#endif
}

#ifndef HOST_CUDA_THREADS

namespace {

enum class State { ready, at_barrier, at_warp_barrier, finished };

struct Fibre {
    ucontext_t entry;
    jmp_buf place;
    State state = State::ready;
    bool started = false;
    void* stack = nullptr;
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

void run_block() {
    const unsigned count = threads();
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
            if (fibres[i]->state != State::ready) continue;
            running = i;
            current = &contexts[i];
            enter(*fibres[i]);
            progress = true;
        }
        for (unsigned first = 0; first < count; first += WARP) {
            progress |= release(first, std::min(first + WARP, count), State::at_warp_barrier);
        }
        progress |= release(0, count, State::at_barrier);
        if (!progress) break;
    }
    for (unsigned i = 0; i < count; ++i) {
        if (fibres[i]->state != State::finished) fail("threads of a block wait for each other at different barriers");
    }
}

}  // namespace

void barrier() { wait(State::at_barrier); }

uint64_t shuffle(uint64_t value, unsigned source_lane) {
    const unsigned thread = running, source = thread / WARP * WARP + source_lane;
    if (source >= threads()) fail("a shuffle reads a lane that does not exist");
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

Barrier block_barrier;
std::vector<std::unique_ptr<Barrier>> warp_barriers;

void run_block() {
    const unsigned count = threads();
    block_barrier.reset(count);
    warp_barriers.clear();
    for (unsigned first = 0; first < count; first += WARP) {
        warp_barriers.push_back(std::make_unique<Barrier>());
        warp_barriers.back()->reset(std::min(WARP, count - first));
    }
    std::vector<std::thread> running;
    for (unsigned i = 0; i < count; ++i) {
        running.emplace_back([i] {
            current = &contexts[i];
            launch.kernel(launch.argument);
            warp_barriers[i / WARP]->drop();
            block_barrier.drop();
        });
    }
    for (auto& thread : running) thread.join();
}

}  // namespace

void barrier() { block_barrier.arrive_and_wait(); }

uint64_t shuffle(uint64_t value, unsigned source_lane) {
    const unsigned thread = current->linear, source = thread / WARP * WARP + source_lane;
    if (source >= threads()) fail("a shuffle reads a lane that does not exist");
    shuffled[thread] = value;
    warp_barriers[thread / WARP]->arrive_and_wait();
    const uint64_t result = shuffled[source];
    warp_barriers[thread / WARP]->arrive_and_wait();
    return result;
}

#endif

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(const void*), const void* argument) {
    grid_size = grid;
    block_size = block;
    if (threads() == 0 || threads() > 1024) fail("a block has 1 to 1024 threads");
    if (threads() % WARP != 0) fail("a warp of the block is not full");
    launch = {kernel, argument};
    contexts.assign(threads(), Context{});
    shuffled.assign(threads(), 0);
    requests.resize(threads() / WARP);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                for (unsigned i = 0; i < threads(); ++i) {
                    contexts[i].thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
                    contexts[i].linear = i;
                    contexts[i].request = 0;
                }
                // Exactly as large as asked for and full of NaN: a read out of bounds or of nothing written shows.
                void* memory = nullptr;
                if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) fail("no shared memory");
                std::memset(memory, 0xff, shared_bytes);
                dynamic_shared = static_cast<unsigned char*>(memory);
                run_block();
                std::free(memory);
                count_sectors();
            }
        }
    }
}

}  // namespace host_cuda
