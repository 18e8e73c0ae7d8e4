// What the blocks of a cluster share: the strips of an image, the edges between them and the sum over directions.
#pragma once

#include "common.cuh"

#ifndef GSPN_ON_HOST
// Blocks of a cluster. `in_block` is a block's own place in the shared memory of another one. `send` puts a value into
// another block's shared memory and counts its bytes there: `Arrivals` complete a phase, 0 and 1 in turn, once the
// bytes that `expect` announced are in. Unlike a barrier of the cluster it waits for no access to global memory.
using Arrivals = unsigned long long;
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
template <typename Item>
__device__ __forceinline__ Item* in_block(Item* pointer, int rank) {
    Item* result;
    asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(pointer), "r"(rank));
    return result;
}
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
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(arrivals)), "r"(phase) : "memory");
    } while (!done);
}
template <typename Item>
__device__ __forceinline__ void send(Item* place, const Item& value, Arrivals* arrivals, int rank) {
    static_assert(sizeof(Item) == 4 || sizeof(Item) == 8, "a word");
    if constexpr (sizeof(Item) == 4) {
        asm volatile("{\n.reg .u32 to, count;\nmapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 count, %2, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [count];\n}"
                     ::"r"(shared_address(place)), "r"(*reinterpret_cast<const unsigned*>(&value)),
                     "r"(shared_address(arrivals)), "r"(rank) : "memory");
    } else {
        asm volatile("{\n.reg .u32 to, count;\nmapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 count, %2, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [to], %1, [count];\n}"
                     ::"r"(shared_address(place)), "l"(*reinterpret_cast<const unsigned long long*>(&value)),
                     "r"(shared_address(arrivals)), "r"(rank) : "memory");
    }
}
#endif

namespace gspn {

constexpr int CLUSTER = GSPN_CLUSTER;

// One thread per position of the strip, VECTOR channels and direction: threadIdx.z counts directions that run side by
// side, one from each end of the image.
struct Thread {
    int batch, channel, rank;
    int column_offset, width;         // of this thread's channels in a row of shared memory
    int row;                          // of this thread's position in its strip
    int strip_rows, strip_columns;    // of the image, per block
    unsigned row_bytes;               // of the block's channels
    bool has_channels;

    __device__ explicit Thread(const Problem& p) {
        const unsigned slabs = static_cast<unsigned>(p.slabs), cluster = blockIdx.x / CLUSTER;
        rank = static_cast<int>(blockIdx.x % CLUSTER);
        batch = static_cast<int>(cluster / slabs);
        width = static_cast<int>(p.slab);
        column_offset = threadIdx.x * VECTOR;
        const int first = static_cast<int>(cluster % slabs) * width;
        const int rest = static_cast<int>(p.channels) - first;
        row_bytes = static_cast<unsigned>(rest < width ? rest : width) * sizeof(Real);
        channel = first + column_offset;
        row = threadIdx.y;
        strip_rows = static_cast<int>(p.height + CLUSTER - 1) / CLUSTER;
        strip_columns = static_cast<int>(p.width + CLUSTER - 1) / CLUSTER;
        has_channels = channel < p.channels;
    }
    __device__ int tile_tokens() const { return strip_rows * strip_columns; }
    __device__ int line_size() const { return (blockDim.y + 2) * width; }
    __device__ Sums& sums(Real* plane, int at) const {
        return *reinterpret_cast<Sums*>(plane + at * width + column_offset);
    }
};

// The lines of one direction, in the order it visits them, and this thread's position on them.
struct Path {
    Way way;
    int d, lines, strip, window;
    bool exists, active, has_previous, has_next;
    bool borders_previous, borders_next;  // on the strip of another block
    unsigned bytes;                       // that arrive from there, for every line

    // The `member`-th direction whose lines are columns, or rows.
    __device__ Path(const Problem& p, const Thread& t, bool columns, int member) {
        exists = false;
        d = 0;
        for (int i = 0, seen = 0; i < p.directions; ++i) {
            if (visits_columns(p.code[i]) != columns || seen++ != member) continue;
            exists = true;
            d = i;
        }
        way.columns = columns;
        way.backwards = exists && visits_backwards(p.code[d]);
        lines = static_cast<int>(columns ? p.width : p.height);
        strip = columns ? t.strip_rows : t.strip_columns;
        window = p.window > 0 && p.window < lines ? static_cast<int>(p.window) : lines;
        way.batch = t.batch;
        way.n = t.rank * strip + t.row;
        const int positions = static_cast<int>(columns ? p.height : p.width);
        active = exists && t.has_channels && t.row < strip && way.n < positions;
        has_previous = way.n > 0;
        has_next = way.n + 1 < positions;
        borders_previous = active && t.row == 0 && has_previous;
        borders_next = active && t.row == strip - 1 && has_next;
        const int first = t.rank * strip;
        const int blocks = (first > 0 && first < positions) + (first + strip < positions);
        bytes = exists ? blocks * t.row_bytes : 0;
        start(0);
    }
    __device__ int line(int visit) const { return way.backwards ? lines - 1 - visit : visit; }
    __device__ void start(int visit) { way.first = line(visit); }
    // Segments are cut by absolute index whatever the direction.
    __device__ bool restarts(int visit) const {
        return visit == 0 || (window < lines && (way.backwards ? lines - visit : visit) % window == 0);
    }
    // This thread's token of a line among the block's tokens [tile across the image, row in it, column in it].
    __device__ int token(const Thread& t, int visit) const {
        const int at = line(visit);
        if (!way.columns) return at * t.strip_columns + t.row;
        return (at / t.strip_columns * (t.strip_rows - 1) + t.row) * t.strip_columns + at;
    }
};

__device__ __forceinline__ int directions_along(const Problem& p, bool columns) {
    int count = 0;
    for (int i = 0; i < p.directions; ++i) count += visits_columns(p.code[i]) == columns;
    return count;
}

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
    __device__ void send_previous(const Thread& t, const Path& path, Real* line, const Sums& value) const {
        if (path.borders_previous) send(&t.sums(line, path.strip + 1), value, counter(), t.rank - 1);
    }
    __device__ void send_next(const Thread& t, const Path& path, Real* line, const Sums& value) const {
        if (path.borders_next) send(&t.sums(line, 0), value, counter(), t.rank + 1);
    }
    __device__ void put_state(const Thread& t, const Path& path, Real* line, const Sums& h) const {
        if (path.active) t.sums(line, t.row + 1) = h;
        send_previous(t, path, line, h);
        send_next(t, path, line, h);
    }
    // The line is written, the strip's own part to be read from here on; `rows` were sent to each neighbour.
    __device__ void end_line(const Path& path, int rows) const {
        if (is_leader()) expect(counter(), rows * path.bytes);
        __syncthreads();  // line
    }
    // The neighbours' parts are in.
    __device__ void await_neighbours(const Path& path) {
        if (path.borders_previous || path.borders_next) await(counter(), turn >> 1 & 1);
        ++turn;
    }
};

struct Neighbours {
    Sums before, same, after;

    __device__ Neighbours(const Thread& t, const Path& path, Real* line) : before(), same(), after() {
        if (!path.active) return;
        same = t.sums(line, t.row + 1);
        if (path.has_previous) before = t.sums(line, t.row);
        if (path.has_next) after = t.sums(line, t.row + 2);
    }
};

__device__ __forceinline__ void propagate(const Path& path, const Logits (&logits)[3], const Neighbours& from,
                                          Sums& h) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const Weights w(logits, v, path.has_previous, path.has_next);
        h.item[v] += w.weight[0] * from.before.item[v] + w.weight[1] * from.same.item[v] +
                     w.weight[2] * from.after.item[v];
    }
}

// Add to the sum over directions. Two directions meet in no line between two barriers.
__device__ __forceinline__ void add_to(Real* total, const Thread& t, const Path& path, int visit, const Sums& value) {
    if (!path.active) return;
    Sums& sum = t.sums(total, path.token(t, visit));
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) sum.item[v] += value.item[v];
}

__device__ __forceinline__ void clear(Real* total, const Thread& t) {
    const int tokens = CLUSTER * t.tile_tokens(), workers = blockDim.y * blockDim.z;
    for (int token = threadIdx.z * blockDim.y + t.row; token < tokens; token += workers) t.sums(total, token) = Sums{};
}

// From strips of rows to strips of columns: blocks a and b swap the tile where a's rows cross b's columns with the one
// where b's rows cross a's columns, half of it each.
__device__ __forceinline__ void exchange(Real* total, const Thread& t) {
    const int tokens = t.tile_tokens(), half = tokens / 2, workers = blockDim.y * blockDim.z;
    cluster_barrier();
    for (int turn = 1; turn < CLUSTER; ++turn) {
        const int other = (t.rank + turn) % CLUSTER;
        const int begin = t.rank < other ? 0 : half, end = t.rank < other ? half : tokens;
        Real* own = total + other * tokens * t.width;
        Real* theirs = in_block(total + t.rank * tokens * t.width, other);
        for (int token = begin + threadIdx.z * blockDim.y + t.row; token < end; token += workers) {
            const Sums mine = t.sums(own, token);
            t.sums(own, token) = t.sums(theirs, token);
            t.sums(theirs, token) = mine;
        }
    }
    cluster_barrier();  // swapped
}

// Make the next orientation the current one, if any direction has it, and say how many have.
__device__ __forceinline__ int start_orientation(const Problem& p, const Thread& t, int orientation, Real* total,
                                                 bool& columns) {
    const int count = directions_along(p, orientation == 0);
    if (count == 0) return 0;
    columns = orientation == 0;
    if (!columns && count < p.directions) exchange(total, t);
    return count;
}

__device__ __forceinline__ void store_plane(const Problem& p, const Thread& t, Real* total, bool columns,
                                            Element* tensor) {
    const int tile = t.tile_tokens(), tokens = CLUSTER * tile, workers = blockDim.y * blockDim.z;
    for (int first = 0; first < tokens; first += workers) {
        const int token = first + threadIdx.z * blockDim.y + t.row;
        const int across = token / tile, in_tile = token % tile;
        const int row = (columns ? t.rank : across) * t.strip_rows + in_tile / t.strip_columns;
        const int column = (columns ? across : t.rank) * t.strip_columns + in_tile % t.strip_columns;
        const bool active = t.has_channels && token < tokens && row < p.height && column < p.width;
        Channels channels = {};
        if (active) channels = narrow_all(t.sums(total, token));
        const Index place = (Index(t.batch) * p.height + row) * p.width + column;
        store(tensor + place * p.channels + t.channel, channels, active);
    }
}

// Four counters come first, two for each of two directions.
__device__ __forceinline__ Real* shared_sums(unsigned char* memory) {
    return reinterpret_cast<Real*>(memory + 4 * sizeof(Arrivals));
}

}  // namespace gspn
