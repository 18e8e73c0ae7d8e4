// CUDA's built-ins for the host: enough to run the kernels of cuda/ with one fibre (or host thread) per CUDA thread,
// one block at a time. Included in front of a kernel's own text, which stays as it is.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace host_cuda {

// What one CUDA thread knows of itself.
struct Context {
    dim3 thread, block;
    unsigned linear = 0;              // in its block
    unsigned rank = 0;                // of its block in the cluster
    unsigned char* shared = nullptr;  // its block's shared memory
    unsigned request = 0;  // accesses to global memory so far: the same number is the same request of the warp
    int line = 0;          // of the PTX, where it last waited
};

extern thread_local Context* current;
extern dim3 block_size, grid_size;

// End the launch: host_cuda_launch then returns 2, and host_cuda_message what is said here.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

constexpr unsigned ALL_LANES = 0xffffffff;

void barrier(unsigned name = 0, unsigned threads = 0);         // of all threads of the block, or of so many
void arrive_at_barrier(unsigned name, unsigned threads);       // and go on
void cluster_arrive();
void cluster_wait();
void later(std::function<void()> copy);  // which arrives when the schedule says
void step_aside();  // let other threads run: what is polled may come from them
// Every lane of the mask gives so many bytes and gets a pointer to those of all lanes, 32 bytes apart.
constexpr unsigned MOST_EXCHANGED = 32;
const unsigned char* exchange(const void* mine, unsigned bytes, unsigned mask = ALL_LANES);
uint64_t shuffle(uint64_t value, unsigned source_lane);

// An mbarrier, in the 64 bits that hold it.
void start_arrivals(uint64_t* arrivals, unsigned count);
void arrive(uint64_t* arrivals, unsigned count, int expected_bytes);
void complete(uint64_t* arrivals, int bytes);
void await(uint64_t* arrivals, unsigned phase);
bool is_complete(const uint64_t* arrivals, unsigned phase);
unsigned phase_of(const uint64_t* arrivals);

unsigned blocks_of_cluster();
void* in_block(void* pointer, int rank);  // the same place in another block of the cluster
void trace(const void* address, size_t bytes, bool active);
bool run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*kernel)(const void*),
         const void* argument);
extern "C" uint64_t host_cuda_sectors(int restart);
extern "C" const char* host_cuda_message();
// The order in which threads take turns and asynchronous copies arrive: 0 by number and at once, else drawn from a seed.
extern "C" void host_cuda_schedule(uint64_t seed);

template <typename T>
T shuffle_down(T value, unsigned offset) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const unsigned lane = current->linear % 32;
    bits = shuffle(bits, lane + offset < 32 ? lane + offset : lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename T>
T shuffle_up(T value, unsigned offset) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const unsigned lane = current->linear % 32;
    bits = shuffle(bits, lane >= offset ? lane - offset : lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <typename To, typename From>
To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

}  // namespace host_cuda

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static
#define threadIdx (host_cuda::current->thread)
#define blockIdx (host_cuda::current->block)
#define blockDim host_cuda::block_size
#define gridDim host_cuda::grid_size

#define GSPN_ON_HOST
#define GSPN_TRACE(pointer, bytes, active) host_cuda::trace(pointer, bytes, active)
#define GSPN_DYNAMIC_SHARED(name) unsigned char* const name = host_cuda::current->shared

inline void __syncthreads() { host_cuda::barrier(); }

// What blocks.cuh and edges.cuh say of clusters.
using Arrivals = uint64_t;
inline void cluster_barrier() {
    host_cuda::cluster_arrive();
    host_cuda::cluster_wait();
}
inline void start_arrivals(Arrivals* arrivals) { host_cuda::start_arrivals(arrivals, 1); }
inline void expect(Arrivals* arrivals, unsigned bytes) { host_cuda::arrive(arrivals, 1, int(bytes)); }
inline void await(Arrivals* arrivals, unsigned phase) { host_cuda::await(arrivals, phase); }
template <typename Item>
Item* in_block(Item* pointer, int rank) {
    return static_cast<Item*>(host_cuda::in_block(const_cast<void*>(static_cast<const void*>(pointer)), rank));
}
template <typename Item>
void send(Item* place, const Item& value, Arrivals* arrivals, int rank) {
    *in_block(place, rank) = value;
    host_cuda::complete(in_block(arrivals, rank), sizeof(Item));
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned offset) {
    return host_cuda::shuffle_down(value, offset);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
    return host_cuda::shuffle_up(value, offset);
}

inline float __uint_as_float(unsigned bits) { return host_cuda::reinterpret<float>(bits); }
inline unsigned __float_as_uint(float value) { return host_cuda::reinterpret<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return host_cuda::reinterpret<double>(bits); }
inline float __fdividef(float a, float b) { return a / b; }
#undef __expf
#define __expf(value) std::exp(static_cast<float>(value))
inline float half_bits_to_float(unsigned short bits) {
    return static_cast<float>(host_cuda::reinterpret<_Float16>(bits));
}
inline unsigned short float_to_half_bits(float value) {
    return host_cuda::reinterpret<unsigned short>(static_cast<_Float16>(value));
}
