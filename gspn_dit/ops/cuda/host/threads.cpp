// The CUDA threads of a block, or of a cluster's blocks, as host threads, for ThreadSanitizer.
#include "runtime.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "mbarrier.h"

namespace host_cuda {

namespace {

// A barrier whose size shrinks as threads finish, as __syncthreads does. Who waits looks at the generation alone:
// taking the mutex again on waking would order it behind everything that others did meanwhile, and hide their races.
class Barrier {
  public:
    void reset(unsigned size) { size_ = size, waiting_ = 0; }
    void arrive_and_wait() { wait(arrive()); }
    // Returns the generation to wait for the end of.
    unsigned arrive() {
        const std::lock_guard<std::mutex> lock(mutex_);
        const unsigned generation = generation_.load(std::memory_order_relaxed);
        if (++waiting_ == size_) release();
        return generation;
    }
    void wait(unsigned generation) { generation_.wait(generation, std::memory_order_acquire); }
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
thread_local unsigned cluster_generation = 0, exchanges = 0;
std::vector<std::unique_ptr<Barrier>> block_barriers, warp_barriers;

void change(uint64_t* arrivals, unsigned count, int bytes) {
    std::atomic_ref<uint64_t> counter(*arrivals);
    uint64_t before = counter.load(std::memory_order_relaxed), after = 0;
    do {
        MbarrierState state(before);
        if (const char* wrong = state.change(count, bytes)) fail("%s", wrong);
        after = state.bits();
    } while (!counter.compare_exchange_weak(before, after, std::memory_order_release, std::memory_order_relaxed));
    counter.notify_all();
}

}  // namespace

void fail(const char* format, ...) {
    std::va_list values;
    va_start(values, format);
    std::fputs("host_cuda: ", stderr);
    std::vfprintf(stderr, format, values);
    va_end(values);
    std::fputs("\n", stderr);
    std::abort();
}

extern "C" const char* host_cuda_message() { return ""; }

bool run_blocks() {
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
    return true;
}

bool is_alive(unsigned) { return true; }

void barrier(unsigned name, unsigned count) {
    if (name != 0 || count != 0) fail("host threads have one barrier of all threads of a block");
    block_barriers[current_index() / threads()]->arrive_and_wait();
}
void arrive_at_barrier(unsigned, unsigned) { fail("host threads have one barrier of all threads of a block"); }
void cluster_arrive() { cluster_generation = all_blocks_barrier.arrive(); }
void cluster_wait() { all_blocks_barrier.wait(cluster_generation); }
void later(std::function<void()> copy) { copy(); }
void step_aside() { std::this_thread::yield(); }

void start_arrivals(uint64_t* arrivals, unsigned count) { *arrivals = MbarrierState::start(count); }
void arrive(uint64_t* arrivals, unsigned count, int expected_bytes) { change(arrivals, count, expected_bytes); }
void complete(uint64_t* arrivals, int bytes) { change(arrivals, 0, -bytes); }
unsigned phase_of(const uint64_t* arrivals) {
    return MbarrierState(std::atomic_ref<const uint64_t>(*arrivals).load(std::memory_order_acquire)).phase;
}
bool is_complete(const uint64_t* arrivals, unsigned phase) { return phase_of(arrivals) != phase; }
void await(uint64_t* arrivals, unsigned phase) {
    const std::atomic_ref<uint64_t> counter(*arrivals);
    for (uint64_t now = counter.load(std::memory_order_acquire); MbarrierState(now).phase == phase;
         now = counter.load(std::memory_order_acquire)) {
        counter.wait(now, std::memory_order_acquire);
    }
}

const unsigned char* exchange(const void* mine, unsigned bytes, unsigned mask) {
    if (mask != ALL_LANES) fail("host threads exchange with all lanes of a warp");
    const unsigned thread = current_index(), turn = exchanges++;
    std::memcpy(place_of_exchange(thread, turn), mine, bytes);
    warp_barriers[thread / WARP]->arrive_and_wait();
    return place_of_exchange(thread / WARP * WARP, turn);
}

}  // namespace host_cuda
