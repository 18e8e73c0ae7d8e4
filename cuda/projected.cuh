// What the fused kernels share: the scan's logits and gates are linear maps of a narrow proxy of the tokens, computed
// where they are used and never stored. Derivation and figures: README.md. Compiled once per
//   GSPN_PROXY    channels of the proxy, padded with zeros to a multiple of 8
//   GSPN_TILES    16 positions of a line each, which one warp holds
//   GSPN_VECTOR   4 where rows of all tensors allow words of four elements, else 1
// and the storage dtype. 16-bit numbers are multiplied by tensor cores, float32 by plain multiply-adds.
#pragma once

#include "tensor_core.cuh"

#define GSPN_PROBLEM gspn::ProjectedProblem

namespace gspn {

constexpr int PROXY = GSPN_PROXY;
constexpr int STEPS = PROXY / 16;  // of 16 inputs; eight more may be left
constexpr int TILES = GSPN_TILES;
constexpr int SPAN = 2 * TILES;  // neighbouring positions that a lane holds
constexpr int CHANNELS = 8;      // of a warp
constexpr int MAPS = 5;          // three logits, input gate, output gate
constexpr int QUAD = 4;          // elements that are copied together

// Eight-byte fields only, in the order of `FIELDS` in gspn_dit/ops/cuda/projected_plan.py. Pitches count elements: from
// one token to the next, and from one row of the image to the next, in shared memory.
struct ProjectedProblem {
    const Element *x, *proxy, *logits_weight, *input_gate_weight, *output_gate_weight, *skip_weight;
    const void* merge_weight;
    Element* y;
    const Element* grad_y;
    Element *grad_x, *grad_proxy, *grad_logits_weight, *grad_input_gate_weight, *grad_output_gate_weight;
    Element* grad_skip_weight;
    void* grad_merge_weight;
    // Partial sums: of grad_proxy per cluster, of the weights' gradients per part, of the merge weights' per warp.
    Real *proxy_sums, *weight_sums, *skip_sums, *merge_sums;
    Index batch, height, width, channels, groups, proxy_channels, directions, code[4], window, merge_is_float;
    Index x_stride[3], proxy_stride[3], grad_y_stride[3];
    Index slab, slabs, parts, stages, spans, slots, steps, group_bits, job;  // spans: slabs of a cluster
    Index proxy_pitch, proxy_row, x_pitch, x_row, sum_pitch, sum_row, grad_pitch, grad_row;
};

// A lane's place in the fragments of tensor_core.cuh.
__device__ __forceinline__ int lane_row() { return static_cast<int>(threadIdx.x) / 4; }
__device__ __forceinline__ int lane_column() { return static_cast<int>(threadIdx.x) % 4; }

// N neighbouring elements of global memory, of which `available` exist; zeros for the others.
template <int N>
__device__ __forceinline__ Stored<N> load_elements(const Element* at, int available) {
    if (VECTOR >= N) return load<Stored<N>>(at, available >= N);
    Stored<N> result = {};
#pragma unroll
    for (int i = 0; i < N; ++i) result.set(i, widen(load<Element>(at + i, i < available)));
    return result;
}

// A linear map from the proxy to eight channels. As the operand of a product: lane 4 g + t holds of channel g the inputs
// 16 s + 4 t to 16 s + 4 t + 3 for each step s, and two of those that are left; the other operand is read alike.
struct Map {
#if GSPN_STORAGE >= 2
    unsigned word[PROXY / 8];

    // From a row of PROXY elements in shared memory, of this lane's channel.
    __device__ void load_shared(const Element* row) {
        const int t = lane_column();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const Pack<unsigned, 2> words = *reinterpret_cast<const Pack<unsigned, 2>*>(row + 16 * s + 4 * t);
            word[2 * s] = words.item[0];
            word[2 * s + 1] = words.item[1];
        }
        if (PROXY % 16 != 0) {
            word[PROXY / 8 - 1] = *reinterpret_cast<const unsigned*>(row + 16 * STEPS + 2 * t);
        }
    }
#else
    const Element* row[2];  // of channels 2 t and 2 t + 1, in global memory
    int inputs;

    // `row_of(n)` is the row that channel n uses, or null for none.
    template <typename RowOf>
    __device__ void load_rows(int all_inputs, RowOf row_of) {
        inputs = all_inputs;
        row[0] = row_of(2 * lane_column());
        row[1] = row_of(2 * lane_column() + 1);
    }
#endif
};

// The maps' values for the proxies `low` and `high` in shared memory: sums 0 and 1 are `low`'s for channels 2 t and
// 2 t + 1, sums 2 and 3 are `high`'s.
template <int ALL, int N>
__device__ __forceinline__ void project(const Map (&maps)[ALL], const Element* low, const Element* high,
                                        Real (&sum)[N][4]) {
    static_assert(N <= ALL, "the first N maps");
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = Real(0);
    }
#if GSPN_STORAGE >= 2
    const int t = lane_column();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const Pack<unsigned, 2> a = *reinterpret_cast<const Pack<unsigned, 2>*>(low + 16 * s + 4 * t);
        const Pack<unsigned, 2> b = *reinterpret_cast<const Pack<unsigned, 2>*>(high + 16 * s + 4 * t);
        const unsigned words[4] = {a.item[0], b.item[0], a.item[1], b.item[1]};
#pragma unroll
        for (int i = 0; i < N; ++i) multiply_add(sum[i], words, maps[i].word[2 * s], maps[i].word[2 * s + 1]);
    }
    if (PROXY % 16 != 0) {
        const unsigned words[2] = {*reinterpret_cast<const unsigned*>(low + 16 * STEPS + 2 * t),
                                   *reinterpret_cast<const unsigned*>(high + 16 * STEPS + 2 * t)};
#pragma unroll
        for (int i = 0; i < N; ++i) multiply_add(sum[i], words, maps[i].word[PROXY / 8 - 1]);
    }
#else
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll 1
        for (int k = 0; k < maps[i].inputs; ++k) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const Real weight = load<Element>(maps[i].row[c] + k, maps[i].row[c] != nullptr);
                sum[i][c] += weight * low[k];
                sum[i][2 + c] += weight * high[k];
            }
        }
    }
#endif
}

// The logistic functions' ratios: with m the largest min(l_k, 0) and b_k = e^m (1 + exp(-l_k)) = e^m + exp(m - l_k), w_k
// is the product of the other two b over the sum of these products. The smallest b lies in [1, 2]; a logit that is 28
// below has no weight in float32, and no product overflows. A neighbour off the line takes part in nothing.
struct Ratios {
    Real weight[3], power[3], b[3];

    __device__ Ratios(Real before, Real same, Real after, bool has_previous, bool has_next) {
        const Real l[3] = {has_previous ? before : minus_infinity(), same, has_next ? after : minus_infinity()};
        Real most = l[0] > l[1] ? l[0] : l[1];
        most = most > l[2] ? most : l[2];
        most = most < Real(0) ? most : Real(0);
        const Real scale = exponential(most);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const Real below = most - l[k];
            power[k] = exponential(below < Real(28) ? below : Real(28));
            b[k] = scale + power[k];
        }
        const Real edges = b[0] * b[2];
        weight[0] = has_previous ? b[1] * b[2] : Real(0);
        weight[2] = has_next ? b[0] * b[1] : Real(0);
        const Real normaliser = reciprocal(weight[0] + edges + weight[2]);
        weight[0] *= normaliser;
        weight[1] = edges * normaliser;
        weight[2] *= normaliser;
    }
    __device__ Real mean(Real before, Real same, Real after) const {
        return weight[0] * before + weight[1] * same + weight[2] * after;
    }
    // The derivative of the mean for logit k is weight_k sigmoid(-l_k) (h_k - mean): all of it but weight_k.
    __device__ void slopes(Real before, Real same, Real after, Real (&slope)[3]) const {
        const Real center = mean(before, same, after), inverse = reciprocal(b[0] * b[1] * b[2]);
        slope[0] = power[0] * (b[1] * b[2] * inverse) * (before - center);
        slope[1] = power[1] * (b[0] * b[2] * inverse) * (same - center);
        slope[2] = power[2] * (b[0] * b[1] * inverse) * (after - center);
    }
};

// Copy `count` rows into shared memory, up to `width` elements each, zeros behind those that exist. `row_of(i)` says
// where row i lies and goes to, and how many elements it has.
struct Row {
    const Element* from;
    Element* to;
    int elements;
};
template <typename RowOf>
__device__ __forceinline__ void copy_rows(int count, int width, RowOf row_of) {
    const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x), threads = static_cast<int>(blockDim.y * 32);
    const int quads = (width + QUAD - 1) / QUAD;
#pragma unroll 1
    for (int first = 0; first < count * quads; first += threads) {
        const int i = first + thread;
        const bool active = i < count * quads;
        const int row = active ? i / quads : 0, at = QUAD * (i - row * quads);
        const Row place = row_of(row);
        const int available = active ? place.elements - at : 0;
        if (VECTOR >= QUAD) {
            if (active) {
                copy_async<QUAD * sizeof(Element)>(place.to + at, place.from + at, available > 0);
            } else {
                GSPN_TRACE(place.from, QUAD * sizeof(Element), false);
            }
        } else {
            const Stored<QUAD> part = load_elements<QUAD>(place.from + at, available);
            if (active) *reinterpret_cast<Stored<QUAD>*>(place.to + at) = part;
        }
    }
}

// Copy an image's tokens; `channels` of them from `first` on.
__device__ __forceinline__ void copy_image(const ProjectedProblem& p, const Element* tensor, const Index* strides,
                                           int image, int first, int channels, int width, Element* plane, int pitch,
                                           int row_pitch) {
    const int columns = static_cast<int>(p.width);
    const int elements = channels - first < width ? channels - first : width;
    const Element* base = tensor + image * strides[0] + first;
    const int row_stride = static_cast<int>(strides[1]), column_stride = static_cast<int>(strides[2]);  // in an image
    copy_rows(static_cast<int>(p.height) * columns, width, [&](int token) {
        const int row = token / columns, column = token - row * columns;
        return Row{base + (row * row_stride + column * column_stride), plane + row * row_pitch + column * pitch, elements};
    });
}

// The row of the weights of map i in direction d that a channel uses. Channels of a group share the rows of their logits.
__device__ __forceinline__ Index row_number(const ProjectedProblem& p, int i, int d, int channel) {
    if (i >= 3) return d * p.channels + channel;
    return (d * 3 + i) * p.groups + channel / static_cast<int>(p.channels / p.groups);
}
__device__ __forceinline__ const Element* weights_of(const ProjectedProblem& p, int i) {
    return i < 3 ? p.logits_weight : i == 3 ? p.input_gate_weight : p.output_gate_weight;
}

// A row of weights on its way into shared memory; zeros for a channel that does not exist.
__device__ __forceinline__ Row weight_row(const ProjectedProblem& p, const Element* weights, int channel, Index row,
                                          Element* to) {
    const bool exists = channel < p.channels;
    return Row{weights + (exists ? row : 0) * p.proxy_channels, to, exists ? static_cast<int>(p.proxy_channels) : 0};
}

// Load the maps of direction d for the eight channels `group` of a slab. Those of a whole block travel through shared
// memory, MAPS x directions x slab rows at `rows`, as rows that lie side by side fill their sectors.
__device__ __forceinline__ void load_maps(const ProjectedProblem& p, int d, int group, int first_channel,
                                          [[maybe_unused]] Element* rows, Map (&maps)[MAPS]) {
    const int first = group * CHANNELS;
#if GSPN_STORAGE >= 2
    const int slab = static_cast<int>(p.slab), count = static_cast<int>(p.directions) * slab;
    copy_rows(MAPS * count, PROXY, [&](int row) {
        const int i = row / count, direction = row % count / slab, channel = first_channel + row % slab;
        return weight_row(p, weights_of(p, i), channel, row_number(p, i, direction, channel), rows + row * PROXY);
    });
    await_copies();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MAPS; ++i) maps[i].load_shared(rows + (i * count + d * slab + first + lane_row()) * PROXY);
    __syncthreads();
#else
#pragma unroll
    for (int i = 0; i < MAPS; ++i) {
        maps[i].load_rows(static_cast<int>(p.proxy_channels), [&](int n) -> const Element* {
            const int channel = first_channel + first + n;
            if (channel >= p.channels) return nullptr;
            return weights_of(p, i) + row_number(p, i, d, channel) * p.proxy_channels;
        });
    }
#endif
}

// The lines of a direction: where restarts are, and steps from line to line and from position to position.
struct Lines {
    int lines, positions, window;
    bool columns, backwards;

    __device__ Lines(const ProjectedProblem& p, Index code)
        : lines(static_cast<int>(visits_columns(code) ? p.width : p.height)),
          positions(static_cast<int>(visits_columns(code) ? p.height : p.width)),
          window(p.window > 0 && p.window < lines ? static_cast<int>(p.window) : lines),
          columns(visits_columns(code)),
          backwards(visits_backwards(code)) {}
    __device__ int line_of(int visit) const { return backwards ? lines - 1 - visit : visit; }
    // Visits before the state restarts for the first time; then every `window` visits. Segments are cut by absolute
    // index, so backwards the first one is what remains.
    __device__ int first_segment() const { return backwards ? (lines - 1) % window + 1 : window; }
    // Offsets in a plane of shared memory whose tokens lie `pitch` apart, its rows `row_pitch`.
    __device__ int line_step(int pitch, int row_pitch) const { return columns ? pitch : row_pitch; }
    __device__ int position_step(int pitch, int row_pitch) const { return columns ? row_pitch : pitch; }
};

// Counts visits, to tell at which of them the state restarts.
struct Segments {
    int left, length;  // visits before it does, and from then to the next time

    __device__ explicit Segments(const Lines& path) : left(0), length(path.first_segment()) {}
    __device__ bool starts(const Lines& path) {
        const bool restart = left == 0;
        if (restart) {
            left = length;
            length = path.window;
        }
        --left;
        return restart;
    }
};

__device__ __forceinline__ Real projected_merge_weight(const ProjectedProblem& p, int d) {
    const bool is_float = p.merge_is_float != 0;
    const float as_float = load<float>(static_cast<const float*>(p.merge_weight) + d, is_float);
    const Element as_element = load<Element>(static_cast<const Element*>(p.merge_weight) + d, !is_float);
    return is_float ? Real(as_float) : widen(as_element);
}

}  // namespace gspn
