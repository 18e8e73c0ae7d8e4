// The state spaces of PTX (chapter 5): every access is checked for its alignment, its range, and for shared memory that
// nobody has written. Generic addresses are the host's; addresses in the shared window begin at FIRST, behind what the
// system keeps, and those of another block of the cluster carry its rank.
#pragma once

#include <cstdint>

#include "../host_cuda.h"
#include "arithmetic.h"

namespace ptx {

enum class Space { generic, global, constant, parameter, local, shared, cluster };

constexpr uint64_t FIRST = 1024, RANK_UNIT = 1 << 24;

extern const unsigned char* parameters;
extern uint64_t parameter_bytes;

void start_cluster();  // with nothing written
// Where an access of so many bytes goes; ends the launch where it may not go there.
unsigned char* resolve(Space space, uint64_t address, unsigned bytes, unsigned alignment, bool writes, int line);
uint64_t shared_to_generic(uint64_t address, int line);
uint64_t generic_to_shared(uint64_t address, int line);
uint64_t in_block_of(uint64_t address, uint32_t rank, bool is_generic, int line);

template <typename T, unsigned N = 1>
inline const T* read(Space space, uint64_t address, int line) {
    return reinterpret_cast<const T*>(resolve(space, address, N * sizeof(T), N * sizeof(T), false, line));
}
template <typename T, unsigned N = 1>
inline T* write(Space space, uint64_t address, int line) {
    return reinterpret_cast<T*>(resolve(space, address, N * sizeof(T), N * sizeof(T), true, line));
}

// mbarriers, by their addresses in a shared window or generic.
uint64_t* mbarrier(Space space, uint64_t address, int line);
void start_mbarrier(Space space, uint64_t address, uint32_t count, int line);
uint64_t arrive(Space space, uint64_t address, uint32_t count, uint32_t expected_bytes, int line);
bool await_phase(Space space, uint64_t address, unsigned phase, int line);
bool is_complete(Space space, uint64_t address, unsigned phase, int line);

// Asynchronous copies. `cp.async` is done when its thread waits for it, and no sooner; others when the schedule says.
void copy_async(uint64_t shared, Space space, uint64_t global, unsigned bytes, unsigned source_bytes, int line);
void commit_copies();
void await_copies(unsigned groups_left);
void copy_bulk(uint64_t shared, uint64_t global, uint32_t bytes, uint64_t arrivals, int line);
void store_async(uint64_t shared, const void* items, unsigned bytes, uint64_t arrivals, int line);

}  // namespace ptx
