// Blocks of a cluster, which reach each other's shared memory (compute capability 9.0 and later).
#pragma once

#include "common.cuh"

#ifndef GSPN_ON_HOST
// Of all threads of all blocks.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
// A block's own place in the shared memory of another one.
template <typename Item>
__device__ __forceinline__ Item* in_block(Item* pointer, int rank) {
    Item* result;
    asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(pointer), "r"(rank));
    return result;
}
#endif

namespace gspn {

constexpr int CLUSTER = GSPN_CLUSTER;

// Four numbers at a block's own place in the shared memory of another one.
__device__ __forceinline__ Pack<float, 4> load_from_block(const Pack<float, 4>* place, int rank) {
#ifdef GSPN_ON_HOST
    return *in_block(place, rank);
#else
    unsigned from;
    Pack<float, 4> v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(shared_address(place)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.item[0]), "=f"(v.item[1]), "=f"(v.item[2]), "=f"(v.item[3]) : "r"(from) : "memory");
    return v;
#endif
}

}  // namespace gspn
