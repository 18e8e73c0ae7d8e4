// Edges between the strips of a line that the blocks of a cluster share. `Thread` knows its block (`rank`) and
// the distance between positions (`width`), `Path` how far the strip goes (`strip`), whether a thread borders on another
// block's and what comes from there.
#pragma once

#include "blocks.cuh"
#include "weights.cuh"

#ifndef GSPN_ON_HOST
// `send` puts a value into another block's shared memory and counts its bytes there: `Arrivals` complete a phase, 0 and 1
// in turn, once the bytes that `expect` announced are in. Unlike a barrier of the cluster it waits for no access to
// global memory. The values lie in this block's own shared memory, so acquiring them for the block is enough: for the
// cluster it would empty the L1 cache.
using Arrivals = unsigned long long;
__device__ __forceinline__ void start_arrivals(Arrivals* arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                 ::"r"(shared_address(arrivals)) : "memory");
}
__device__ __forceinline__ void expect(Arrivals* arrivals, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void await(Arrivals* arrivals, unsigned phase) {
    unsigned done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(arrivals)), "r"(phase) : "memory");
    } while (!done);
}
template <typename Item>
__device__ __forceinline__ void send(Item* place, const Item& value, Arrivals* arrivals, int rank) {
    static_assert(sizeof(Item) == 4 || sizeof(Item) == 8 || sizeof(Item) == 16, "a word, or two or four");
    unsigned to, count;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count) : "r"(shared_address(arrivals)), "r"(rank));
    const unsigned* word = reinterpret_cast<const unsigned*>(&value);
    if constexpr (sizeof(Item) == 4) {
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                     ::"r"(to), "r"(word[0]), "r"(count) : "memory");
    } else if constexpr (sizeof(Item) == 8) {
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
                     ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(count) : "memory");
    } else {
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                     ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(count) : "memory");
    }
}
#endif

namespace gspn {

// Line by line, blocks hand each other the edges of their strips. A line in shared memory is the strip with one row of
// each neighbouring strip: rows 0 and strip + 1 are written by the neighbouring blocks. A block is at most one line
// ahead of its neighbours, as it waits for them and they for it: two lines in turn, and two counters, are enough.
struct Edges {
    Arrivals* arrivals;
    unsigned turn;

    __device__ explicit Edges(unsigned char* memory)
        : arrivals(reinterpret_cast<Arrivals*>(memory) + 2 * threadIdx.z), turn(0) {
        if (is_leader()) {
            start_arrivals(arrivals);
            start_arrivals(arrivals + 1);
        }
    }
    __device__ static bool is_leader() { return threadIdx.x == 0 && threadIdx.y == 0; }
    __device__ Arrivals* counter() const { return arrivals + (turn & 1); }
    // `place` is this thread's on the line: the last of a strip lies so far from its first, and so do their neighbours.
    template <typename Thread, typename Path>
    __device__ void send_previous(const Thread& t, const Path& path, Real* place, const Sums& value) const {
        if (path.borders_previous()) put(place + path.strip * t.width, value, t.rank - 1);
    }
    template <typename Thread, typename Path>
    __device__ void send_next(const Thread& t, const Path& path, Real* place, const Sums& value) const {
        if (path.borders_next()) put(place - path.strip * t.width, value, t.rank + 1);
    }
    __device__ void put(Real* place, const Sums& value, int rank) const {
        send(reinterpret_cast<Sums*>(place), value, counter(), rank);
    }
    // Blocks keep step by what they send: a segment that is shorter than others goes on after its end.
    template <typename Thread, typename Path>
    __device__ void put_state(const Thread& t, const Path& path, Real* place, const Sums& h) const {
        if (path.is_active()) *reinterpret_cast<Sums*>(place) = h;
        send_previous(t, path, place, h);
        send_next(t, path, place, h);
    }
    // The line is written, the strip's own part to be read from here on; `rows` were sent to each neighbour.
    template <typename Path>
    __device__ void end_line(const Path& path, int rows) const {
        if (is_leader()) expect(counter(), rows * path.bytes);
        __syncthreads();  // line
    }
    // The neighbours' parts are in.
    template <typename Path>
    __device__ void await_neighbours(const Path& path) {
        if (path.borders_previous() || path.borders_next()) await(counter(), turn >> 1 & 1);
        ++turn;
    }
};

}  // namespace gspn
