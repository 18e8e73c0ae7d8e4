// What every kernel of the scan shares: storage types, traced access to global memory, the problem's geometry and the
// row-stochastic weights. Compiled once per storage dtype and vector width:
//   GSPN_STORAGE          0 float32, 1 float64, 2 bfloat16, 3 float16
//   GSPN_VECTOR           channels per thread, which are loaded and stored as one word
//   GSPN_SHARED_WEIGHTS   0: one weight per channel (G = C), 1: weights shared by the C / G channels of a group
//   GSPN_LINES            most lines whose logits a thread of a backward kernel keeps in registers
//   GSPN_CLUSTER          blocks per cluster
// The file needs no header of the CUDA toolkit, so that NVRTC compiles it anywhere.
#pragma once

#ifndef GSPN_TRACE
// The host build counts every access to global memory here.
#define GSPN_TRACE(pointer, bytes, active)
#define GSPN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace gspn {

using Index = long long;

constexpr int VECTOR = GSPN_VECTOR;
constexpr int LINES = GSPN_LINES;
constexpr int SPARED_GATES = 4;  // lines whose input gates the backward kernel keeps in shared memory instead
constexpr bool SHARED_WEIGHTS = GSPN_SHARED_WEIGHTS != 0;

// ---------------------------------------------------------------------------------------------------------------
// Storage: `Element` is what lies in memory, `Real` what every sum and recurrence is computed in.

#if GSPN_STORAGE == 0
using Element = float;
using Real = float;
__device__ __forceinline__ Real widen(Element value) { return value; }
__device__ __forceinline__ Element narrow(Real value) { return value; }
#elif GSPN_STORAGE == 1
using Element = double;
using Real = double;
__device__ __forceinline__ Real widen(Element value) { return value; }
__device__ __forceinline__ Element narrow(Real value) { return value; }
#elif GSPN_STORAGE == 2
using Element = unsigned short;  // the upper half of a float32
using Real = float;
__device__ __forceinline__ Real widen(Element value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }
__device__ __forceinline__ Element narrow(Real value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    Element result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
#else
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<Element>((bits >> 16) | 0x40u);
    return static_cast<Element>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
#endif
}
#else
using Element = unsigned short;  // an IEEE binary16
using Real = float;
__device__ __forceinline__ Real widen(Element value) {
#ifdef __CUDA_ARCH__
    Real result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
#else
    return half_bits_to_float(value);
#endif
}
__device__ __forceinline__ Element narrow(Real value) {
#ifdef __CUDA_ARCH__
    Element result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
#else
    return float_to_half_bits(value);
#endif
}
#endif

// N channels as computed.
template <typename Item, int N>
struct alignas(sizeof(Item) * N) Pack {
    Item item[N];
};
using Sums = Pack<Real, VECTOR>;

// N channels as stored, which travel as one word. Two elements of 16 bits stay together in one register.
template <int N>
struct alignas(sizeof(Element) * N) Stored {
#if GSPN_STORAGE < 2
    Element element[N];

    __device__ Real operator[](int v) const { return widen(element[v]); }
    __device__ void set(int v, Real value) { element[v] = narrow(value); }
#else
    unsigned pair[N / 2];

    __device__ Real operator[](int v) const { return widen(static_cast<Element>(pair[v / 2] >> (16 * (v % 2)))); }
    __device__ void set(int v, Real value) {
        const unsigned bits = static_cast<unsigned>(narrow(value)) << (16 * (v % 2));
        pair[v / 2] = v % 2 == 0 ? bits : pair[v / 2] | bits;
    }
#endif
};
template <>
struct alignas(sizeof(Element)) Stored<1> {
    Element element;

    __device__ Real operator[](int) const { return widen(element); }
    __device__ void set(int, Real value) { element = narrow(value); }
};
using Channels = Stored<VECTOR>;
using Logits = Stored<SHARED_WEIGHTS ? 1 : VECTOR>;  // one for all channels of a thread where weights are shared

// ---------------------------------------------------------------------------------------------------------------
// Global memory. Every thread of a warp makes the same calls in the same order; `active` says which lanes take part.

template <typename Word>
__device__ __forceinline__ Word load(const void* address, bool active) {
    GSPN_TRACE(address, sizeof(Word), active);
    Word word = {};
    if (active) word = *static_cast<const Word*>(address);
    return word;
}

template <typename Word>
__device__ __forceinline__ void store(void* address, const Word& word, bool active) {
    GSPN_TRACE(address, sizeof(Word), active);
    if (active) *static_cast<Word*>(address) = word;
}

__device__ __forceinline__ Channels narrow_all(const Sums& sums) {
    Channels result;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) result.set(v, sums.item[v]);
    return result;
}

// ---------------------------------------------------------------------------------------------------------------
// The call. Eight-byte fields only, in the order of `FIELDS` in gspn_dit/ops/cuda/types.py. Strides count elements.

struct Problem {
    const Element *x, *weight_logits, *input_gate, *output_gate, *grad_y;
    const void* merge_weight;
    Element *y, *grad_x, *grad_weight_logits, *grad_input_gate, *grad_output_gate;
    void* grad_merge_weight;
    Real *sums;           // partial sums over directions of y or grad_x (long lines)
    Real *states;         // states at the ends of chunks (long lines)
    Real *carries;        // gradients of states at the ends of chunks (long lines)
    Real *merge_sums;     // one partial sum per direction and block
    Real *group_sums;     // partial gradients of shared logits, one per slab
    Index batch, height, width, channels, groups, directions, code[4], window, merge_is_float;
    Index x_stride[3], grad_y_stride[3], weight_logits_stride[5], input_gate_stride[4], output_gate_stride[4];
    Index slab, slabs, group_slots;                        // channels per block; blocks per row; groups per slab
    Index owned, halo, tiles;                              // positions per block, more on each side, blocks per line
    Index chunk, chunks, ring;                             // lines per chunk, chunks per segment, slots of `states`
    Index step, span;                                      // this launch's first chunk in visiting order, and how many
    Index phase_direction[2], phase_directions;            // the directions of this launch
    Index accumulate, final;                               // whether `sums` is read, and whether the result is written
    Index merge_offset, merge_blocks;                      // where this launch's partial sums lie, of how many
};

// Directions 0 right, 1 left, 2 down, 3 up: columns are the lines of 0 and 1; 1 and 3 visit them from the last.
__device__ __forceinline__ bool visits_columns(Index code) { return code < 2; }
__device__ __forceinline__ bool visits_backwards(Index code) { return (code & 1) != 0; }

__device__ __forceinline__ Real merge_weight(const Problem& p, Index d) {
    const bool is_float = p.merge_is_float != 0;
    const float as_float = load<float>(static_cast<const float*>(p.merge_weight) + d, is_float);
    const Element as_element = load<Element>(static_cast<const Element*>(p.merge_weight) + d, !is_float);
    return is_float ? Real(as_float) : widen(as_element);
}

// Hide where a value comes from: an unrolled loop must not precompute the addresses of all its turns, nor a loop's way
// in everything that each turn starts from. There are no registers for that.
__device__ __forceinline__ void forget(Index& value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(value));
#else
    (void)value;
#endif
}
template <typename Item>
__device__ __forceinline__ void forget(Item*& value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(value));
#else
    (void)value;
#endif
}
__device__ __forceinline__ void forget(int& value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(value));
#else
    (void)value;
#endif
}

// The way of one thread over the lines of a direction: always at position n, from the line `first` on.
struct Way {
    int batch, n, first;
    bool columns, backwards;

    __device__ int row() const { return columns ? n : first; }
    __device__ int column() const { return columns ? first : n; }
    __device__ Index signed_step(Index row_step, Index column_step) const {
        const Index step = columns ? column_step : row_step;
        return backwards ? -step : step;
    }
};

// A pointer that moves along a way, from line to line.
template <typename Item>
struct Stream {
    Item* at;
    Index step;

    // `strides` of batch, row and column; `inner` is the offset inside a token.
    __device__ Stream(Item* base, const Index* strides, const Way& way, Index inner)
        : at(base + (way.batch * strides[0] + way.row() * strides[1] + way.column() * strides[2] + inner)),
          step(way.signed_step(strides[1], strides[2])) {}
    // The same in a contiguous tensor [B, H, W, size].
    __device__ Stream(Item* base, const Problem& p, Index size, const Way& way, Index inner)
        : at(base + (((way.batch * p.height + way.row()) * p.width + way.column()) * size + inner)),
          step(way.signed_step(p.width * size, size)) {}
    __device__ void move(Index lines) {
        at += lines * step;
        forget(at);
    }
};

// One thread's place in the contiguous gradients of the gates [B, H, W, D, C], moving along a way. The gradients of its
// logits [B, H, W, D, 3, C] lie at a multiple of that, so that one register pair serves all of them.
struct GatePlace {
    Index offset, step;

    __device__ GatePlace(const Problem& p, const Way& way, int channel, int d) {
        const Index size = p.directions * p.channels;
        offset = ((way.batch * p.height + way.row()) * p.width + way.column()) * size + d * p.channels + channel;
        step = way.signed_step(p.width * size, size);
    }
    __device__ void move(Index lines) {
        offset += lines * step;
        forget(offset);
    }
    __device__ Index logits(int channel) const { return 3 * offset - 2 * channel; }
};

// The channel, or with shared weights the group, whose logits channel `channel` uses.
__device__ __forceinline__ Index logit_of(const Problem& p, Index channel) {
    if (!SHARED_WEIGHTS) return channel;
    const unsigned channels = static_cast<unsigned>(p.channels), groups = static_cast<unsigned>(p.groups);
    return static_cast<unsigned>(channel) / (channels / groups);
}

__device__ __forceinline__ void load_logits(const Element* at, Index stride, bool active, Logits (&result)[3]) {
#pragma unroll
    for (int k = 0; k < 3; ++k) result[k] = load<Logits>(at + k * stride, active);
}

// ---------------------------------------------------------------------------------------------------------------
// Weights: w_k = sigmoid(l_k) / sum of the sigmoids of the neighbours that lie on the line.

#if GSPN_STORAGE == 1
__device__ __forceinline__ Real exponential(Real value) { return exp(value); }
__device__ __forceinline__ Real reciprocal(Real value) { return 1.0 / value; }
__device__ __forceinline__ Real minus_infinity() { return __longlong_as_double(0xfff0000000000000LL); }
#else
__device__ __forceinline__ Real minus_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ Real reciprocal(Real value) { return __fdividef(1.0f, value); }
#if GSPN_STORAGE == 0
__device__ __forceinline__ Real exponential(Real value) { return expf(value); }
#else
__device__ __forceinline__ Real exponential(Real value) { return __expf(value); }
#endif
#endif

struct Weights {
    Real weight[3];
    Real slope[3];  // sigmoid(-l_k), the derivative of log sigmoid(l_k)

    // With m the largest min(l_k, 0), numerators exp(min(l_k, 0) - m) and denominators q_k = 1 + exp(-|l_k|), all
    // finite and their sum at least 1/2, sigmoid(l_k) = e^m numerator_k / q_k. Neighbours off the line have logit
    // minus infinity, whatever was read for them.
    __device__ Weights(const Logits (&logits)[3], int v, bool has_previous, bool has_next) {
        const int at = SHARED_WEIGHTS ? 0 : v;
        const Real l[3] = {has_previous ? logits[0][at] : minus_infinity(), logits[1][at],
                           has_next ? logits[2][at] : minus_infinity()};
        Real most = l[0] > l[1] ? l[0] : l[1];
        most = most > l[2] ? most : l[2];
        most = most < Real(0) ? most : Real(0);
        const Real scale = exponential(most);
        Real numerator[3], q[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const bool negative = l[k] < Real(0);
            const Real power = exponential(negative ? l[k] - most : -l[k]);
            numerator[k] = negative ? power : Real(1);
            q[k] = Real(1) + (negative ? power * scale : power);
            slope[k] = negative ? Real(1) : power;
        }
        const Real others[3] = {q[1] * q[2], q[0] * q[2], q[0] * q[1]};
        const Real inverse = reciprocal(others[0] * q[0]);
        Real total = Real(0);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            weight[k] = numerator[k] * others[k];
            total += weight[k];
            slope[k] *= others[k] * inverse;
        }
        const Real normaliser = reciprocal(total);
#pragma unroll
        for (int k = 0; k < 3; ++k) weight[k] *= normaliser;
    }

    // d(sum of w_k h_k) / d(logit_k) = w_k sigmoid(-l_k) (h_k - mean), exactly 0 for a neighbour off the line.
    __device__ void gradients(Real before, Real same, Real after, bool has_previous, bool has_next,
                              Real (&gradient)[3]) const {
        const Real mean = weight[0] * before + weight[1] * same + weight[2] * after;
        gradient[0] = has_previous ? weight[0] * slope[0] * (before - mean) : Real(0);
        gradient[1] = weight[1] * slope[1] * (same - mean);
        gradient[2] = has_next ? weight[2] * slope[2] * (after - mean) : Real(0);
    }
};

// ---------------------------------------------------------------------------------------------------------------
// Deterministic sums.

// Sum over all threads of a block, in a fixed order; valid in thread 0. `scratch` holds 32 values.
__device__ __forceinline__ Real block_sum(Real value, Real* scratch) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int warps = (blockDim.x * blockDim.y + 31) / 32;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if (thread % 32 == 0) scratch[thread / 32] = value;
    __syncthreads();
    Real total = Real(0);
    if (thread == 0) {
        for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
    }
    __syncthreads();
    return total;
}

// Sum `value` over this lane and the lanes above it that hold channels of the same position and group; the total of a
// group arrives in its first lane. Each position's lanes lie side by side in one warp.
__device__ __forceinline__ Real sum_to_first_lane(Real value, Index group) {
    const int lane = threadIdx.x;
    const int lanes = blockDim.x;
    for (int offset = 1; offset < lanes; offset *= 2) {
        const Real other = __shfl_down_sync(0xffffffffu, value, offset);
        const Index other_group = __shfl_down_sync(0xffffffffu, group, offset);
        if (lane + offset < lanes && other_group == group) value += other;
    }
    return value;
}

// The gradients of one thread's three logits on a line: per channel as they are stored, or the sum over its channels.
struct LineGradient {
    Channels channels[3];
    Real sum[3];

    __device__ LineGradient() : channels(), sum() {}
    __device__ void add(int v, const Real (&slope)[3], Real dh) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            if (SHARED_WEIGHTS) {
                sum[k] += slope[k] * dh;
            } else {
                channels[k].set(v, slope[k] * dh);
            }
        }
    }
};

// Where one thread stores the gradients of its three logits: per channel, or summed over the channels of its group.
struct LogitGradients {
    const Problem& p;
    int channel;
    Index group, pitch;
    Stream<Element> elements;
    Stream<Real> sums;
    bool to_sums, is_first;

    __device__ LogitGradients(const Problem& problem, const Way& way, int first_channel, int d)
        : p(problem),
          channel(first_channel),
          group(logit_of(p, channel)),
          pitch(p.groups),
          elements(p.grad_weight_logits, p, p.directions * 3 * p.groups, way, d * 3 * p.groups + group),
          sums(p.group_sums, p, p.directions * 3 * p.group_slots, way, 0),
          to_sums(SHARED_WEIGHTS && p.group_sums != nullptr),
          is_first(false) {
        if (!SHARED_WEIGHTS) return;
        const unsigned width = static_cast<unsigned>(p.channels) / static_cast<unsigned>(p.groups);
        const unsigned slab = static_cast<unsigned>(channel) / static_cast<unsigned>(p.slab);
        is_first = threadIdx.x == 0 || static_cast<unsigned>(channel) % width == 0;
        if (!to_sums) return;
        const Index slot = group - slab * static_cast<unsigned>(p.slab) / width;
        pitch = p.group_slots;
        sums.at += (Index(slab) * p.batch * p.height * p.width * p.directions + d) * 3 * p.group_slots + slot;
    }
    __device__ void move(Index lines) {
        if (!SHARED_WEIGHTS) return;
        if (to_sums) {
            sums.move(lines);
        } else {
            elements.move(lines);
        }
    }
    __device__ void put(const LineGradient& gradient, const GatePlace& place, bool active) const {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            if (!SHARED_WEIGHTS) {
                store(p.grad_weight_logits + (place.logits(channel) + k * p.channels), gradient.channels[k], active);
                continue;
            }
            const Real total = sum_to_first_lane(active ? gradient.sum[k] : Real(0), group);
            if (to_sums) {
                store(sums.at + k * pitch, total, active && is_first);
            } else {
                store(elements.at + k * pitch, narrow(total), active && is_first);
            }
        }
    }
};

}  // namespace gspn
