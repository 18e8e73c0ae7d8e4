// What the runtime's parts share: the launch that runs, its threads, and how they take turns (fibres.cpp or threads.cpp).
#pragma once

#include "host_cuda.h"

#include <vector>

namespace host_cuda {

constexpr unsigned WARP = 32;

struct Launch {
    void (*kernel)(const void*);
    const void* argument;
};

extern Launch launch;
extern unsigned blocks;                 // of a cluster
extern std::vector<Context> contexts;   // block after block
extern std::vector<unsigned char> exchanged;  // by lanes of a warp: twice MOST_EXCHANGED bytes per thread
extern uint64_t schedule;
extern void (*before_cluster)();        // called before a cluster's threads start, if not null

inline unsigned threads() { return block_size.x * block_size.y * block_size.z; }
inline unsigned all_threads() { return blocks * threads(); }
inline unsigned current_index() { return static_cast<unsigned>(current - contexts.data()); }

// What host_cuda_message says of a launch that does not even start.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
size_t shared_bytes();  // of each block
// Run all threads of a cluster to their ends. False where the launch failed.
bool run_blocks();
bool is_alive(unsigned block);

inline unsigned char* place_of_exchange(unsigned thread, unsigned turn) {
    return exchanged.data() + (turn % 2 * all_threads() + thread) * MOST_EXCHANGED;
}

}  // namespace host_cuda
