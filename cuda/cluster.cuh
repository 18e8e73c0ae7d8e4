// What the blocks of a cluster share of a plane on chip: its strips and the sum over directions.
#pragma once

#include "edges.cuh"

namespace gspn {

// One thread per position of the strip, VECTOR channels and walk: threadIdx.z counts walks that run side by side,
// segments of directions from either end of the image.
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
    // This position's place on a line in shared memory.
    __device__ Real* place(Real* line) const { return &sums(line, row + 1).item[0]; }
};

// The lines of one segment of a direction, in the order it visits them, and this thread's position on them.
struct Path {
    Way way;
    int d, steps, start, length, strip;  // the longest segment's lines; where this one starts, and its lines
    int reach;       // lines that this thread visits, none without a position on them
    unsigned flags;  // a position on the lines (1), which borders on the strip of the block before (2) or after (4)
    unsigned bytes;  // that arrive from there, for every line
    bool exists, has_previous, has_next;

    // Walk number `walk` among the segments of the directions whose lines are columns, or rows.
    __device__ Path(const Problem& p, const Thread& t, bool columns, int walk) {
        const int lines = static_cast<int>(columns ? p.width : p.height);
        steps = p.window > 0 && p.window < lines ? static_cast<int>(p.window) : lines;
        const int segments = (lines - 1) / steps + 1, member = walk / segments;
        start = walk % segments * steps;
        length = start + steps < lines ? steps : lines - start;
        exists = false;
        d = 0;
        for (int i = 0, seen = 0; i < p.directions; ++i) {
            if (visits_columns(p.code[i]) != columns || seen++ != member) continue;
            exists = true;
            d = i;
        }
        way.columns = columns;
        way.backwards = exists && visits_backwards(p.code[d]);
        strip = columns ? t.strip_rows : t.strip_columns;
        way.batch = t.batch;
        way.n = t.rank * strip + t.row;
        const int positions = static_cast<int>(columns ? p.height : p.width);
        const bool active = exists && t.has_channels && t.row < strip && way.n < positions;
        has_previous = way.n > 0;
        has_next = way.n + 1 < positions;
        reach = active ? length : 0;
        flags = !active ? 0 : 1 | (t.row == 0 && has_previous ? 2 : 0) | (t.row == strip - 1 && has_next ? 4 : 0);
        forget(reach);  // or both are found anew in every line
        forget(flags);
        const int first = t.rank * strip;
        const int blocks = (first > 0 && first < positions) + (first + strip < positions);
        bytes = exists ? blocks * t.row_bytes : 0;
        go_to(0);
    }
    __device__ int line(int visit) const { return start + (way.backwards ? length - 1 - visit : visit); }
    __device__ void go_to(int visit) { way.first = line(visit); }
    __device__ bool visits(int visit) const { return visit < reach; }
    __device__ bool is_active() const { return (flags & 1) != 0; }
    __device__ bool borders_previous() const { return (flags & 2) != 0; }
    __device__ bool borders_next() const { return (flags & 4) != 0; }
    // Nothing comes in from beside the image.
    __device__ void clear_sides(const Thread& t, Real* line) const {
        if (is_active() && !has_previous) t.sums(line, t.row) = Sums{};
        if (is_active() && !has_next) t.sums(line, t.row + 2) = Sums{};
    }
};

// A thread's place in the sum over directions [tile across the image, row in it, column in it], line after line.
struct Place {
    int token, step, jump, left, strip;  // `left` lines until the next tile

    __device__ Place(const Thread& t, const Path& path, int visit) {
        const int at = path.line(visit);
        strip = t.strip_columns;
        const int tile = path.way.columns ? at / strip : 0, in_tile = at - tile * strip;
        jump = path.way.columns ? (t.strip_rows - 1) * strip : 0;
        token = path.way.columns ? t.row * strip + at + tile * jump : at * strip + t.row;
        step = path.way.columns ? 1 : strip;
        left = path.way.backwards ? in_tile + 1 : strip - in_tile;
        if (path.way.backwards) {
            jump = -jump;
            step = -step;
        }
    }
    __device__ void move() {
        token += step;
        if (--left == 0) {
            token += jump;
            left = strip;
        }
    }
    // From a place further on back to the one before.
    __device__ void move_back() {
        token -= step;
        if (left == strip) {
            token -= jump;
            left = 0;
        }
        ++left;
    }
    // Two walks meet in no line between two barriers.
    __device__ void add(const Thread& t, Real* total, const Sums& value) const {
        Sums sum = t.sums(total, token);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) sum.item[v] += value.item[v];
        t.sums(total, token) = sum;
    }
};

// How many walks there are along columns, or rows.
__device__ __forceinline__ int walks_along(const Problem& p, bool columns) {
    const int lines = static_cast<int>(columns ? p.width : p.height);
    const int segments = p.window > 0 && p.window < lines ? (lines - 1) / static_cast<int>(p.window) + 1 : 1;
    int count = 0;
    for (int i = 0; i < p.directions; ++i) count += visits_columns(p.code[i]) == columns ? segments : 0;
    return count;
}

__device__ __forceinline__ void clear(Real* total, const Thread& t) {
    const int tokens = CLUSTER * t.tile_tokens(), workers = blockDim.y * blockDim.z;
#pragma unroll 1
    for (int token = threadIdx.z * blockDim.y + t.row; token < tokens; token += workers) t.sums(total, token) = Sums{};
}

// From strips of rows to strips of columns: blocks a and b swap the tile where a's rows cross b's columns with the one
// where b's rows cross a's columns, half of it each.
__device__ __forceinline__ void exchange(Real* total, const Thread& t) {
    const int tokens = t.tile_tokens(), half = tokens / 2, workers = blockDim.y * blockDim.z;
    cluster_barrier();
#pragma unroll 1
    for (int turn = 1; turn < CLUSTER; ++turn) {
        const int other = (t.rank + turn) % CLUSTER;
        const int begin = t.rank < other ? 0 : half, end = t.rank < other ? half : tokens;
        Real* own = total + other * tokens * t.width;
        Real* theirs = in_block(total + t.rank * tokens * t.width, other);
#pragma unroll 1
        for (int token = begin + threadIdx.z * blockDim.y + t.row; token < end; token += workers) {
            const Sums mine = t.sums(own, token);
            t.sums(own, token) = t.sums(theirs, token);
            t.sums(theirs, token) = mine;
        }
    }
    cluster_barrier();  // swapped
}

// Make the next orientation the current one, if any direction has it, and say how many walks it has.
__device__ __forceinline__ int start_orientation(const Problem& p, const Thread& t, int orientation, Real* total,
                                                 bool& columns) {
    const int count = walks_along(p, orientation == 0);
    if (count == 0) return 0;
    columns = orientation == 0;
    if (!columns && walks_along(p, true) > 0) exchange(total, t);
    return count;
}

__device__ __forceinline__ void store_plane(const Problem& p, const Thread& t, Real* total, bool columns,
                                            Element* tensor) {
    const int tile = t.tile_tokens(), tokens = CLUSTER * tile, workers = blockDim.y * blockDim.z;
#pragma unroll 1
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

// The counters come first, two for each walk.
__device__ __forceinline__ Real* shared_sums(unsigned char* memory) {
    return reinterpret_cast<Real*>(memory + 2 * blockDim.z * sizeof(Arrivals));
}

}  // namespace gspn
