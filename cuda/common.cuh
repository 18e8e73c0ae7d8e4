// What every kernel of the scan shares: storage types, traced access to global memory and the problem's geometry.
// Compiled once per storage dtype and vector width:
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

// Minus infinity as stored: the logit of a neighbour that is not there.
#if GSPN_STORAGE == 0
__device__ __forceinline__ Element stored_minus_infinity() { return __uint_as_float(0xff800000u); }
#elif GSPN_STORAGE == 1
__device__ __forceinline__ Element stored_minus_infinity() { return __longlong_as_double(0xfff0000000000000LL); }
#else
__device__ __forceinline__ Element stored_minus_infinity() { return GSPN_STORAGE == 2 ? 0xff80 : 0xfc00; }
#endif

#if GSPN_STORAGE >= 2
__device__ __forceinline__ float power_of_two(float exponent) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
    return result;
#else
    return exp2f(exponent);
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
    __device__ void fill(Element value) {
        for (int v = 0; v < N; ++v) element[v] = value;
    }
#else
    unsigned pair[N / 2];

    __device__ Real operator[](int v) const { return widen(static_cast<Element>(pair[v / 2] >> (16 * (v % 2)))); }
    __device__ void set(int v, Real value) {
        const unsigned bits = static_cast<unsigned>(narrow(value)) << (16 * (v % 2));
        pair[v / 2] = v % 2 == 0 ? bits : pair[v / 2] | bits;
    }
    __device__ void fill(Element element) {
        for (int i = 0; i < N / 2; ++i) pair[i] = element * 0x10001u;
    }
#endif
};
template <>
struct alignas(sizeof(Element)) Stored<1> {
    Element element;

    __device__ Real operator[](int) const { return widen(element); }
    __device__ void set(int, Real value) { element = narrow(value); }
    __device__ void fill(Element value) { element = value; }
};
using Channels = Stored<VECTOR>;
using Logits = Stored<SHARED_WEIGHTS ? 1 : VECTOR>;  // one for all channels of a thread where weights are shared

// ---------------------------------------------------------------------------------------------------------------
// Global memory. Every thread of a warp makes the same calls in the same order; `active` says which lanes take part.

// Load where active, else leave the word as it was: what a loop never loads is set once, in front of it.
template <typename Word>
__device__ __forceinline__ void load_into(Word& word, const void* address, bool active) {
    GSPN_TRACE(address, sizeof(Word), active);
    if (active) word = *static_cast<const Word*>(address);
}

template <typename Word>
__device__ __forceinline__ Word load(const void* address, bool active) {
    Word word = {};
    load_into(word, address, active);
    return word;
}

template <typename Word>
__device__ __forceinline__ void store(void* address, const Word& word, bool active) {
    GSPN_TRACE(address, sizeof(Word), active);
    if (active) *static_cast<Word*>(address) = word;
}

// Two channels as stored, in one instruction where the hardware has it.
#if GSPN_STORAGE >= 2
__device__ __forceinline__ unsigned narrow_pair(Real low, Real high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned result;
#if GSPN_STORAGE == 2
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
    return result;
#else
    return narrow(low) | static_cast<unsigned>(narrow(high)) << 16;
#endif
}
#endif

__device__ __forceinline__ Channels narrow_all(const Sums& sums) {
    Channels result;
#if GSPN_STORAGE >= 2 && GSPN_VECTOR > 1
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i) result.pair[i] = narrow_pair(sums.item[2 * i], sums.item[2 * i + 1]);
#elif GSPN_VECTOR > 1
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) result.element[v] = narrow(sums.item[v]);
#else
    result.element = narrow(sums.item[0]);
#endif
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
// A pointer into global memory stays one: the compiler must not forget that it is, or it emits generic loads.
template <typename Item>
__device__ __forceinline__ void forget(Item*& value) {
#ifdef __CUDA_ARCH__
    size_t address = __cvta_generic_to_global(value);
    asm volatile("" : "+l"(address));
    value = static_cast<Item*>(__cvta_global_to_generic(address));
#else
    (void)value;
#endif
}
template <typename Item>
__device__ __forceinline__ void forget_shared(Item*& value) {
#ifdef __CUDA_ARCH__
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(value));
    asm volatile("" : "+r"(address));
    value = static_cast<Item*>(__cvta_shared_to_generic(address));
#else
    (void)value;
#endif
}
template <typename Word>
__device__ __forceinline__ void forget_word(Word& value) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(value));
#else
    (void)value;
#endif
}
__device__ __forceinline__ void forget(int& value) { forget_word(value); }
__device__ __forceinline__ void forget(unsigned& value) { forget_word(value); }

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
    __device__ void move(Index lines) {
        at += lines * step;
        forget(at);
    }
};

// A token and direction, moving along a way: where its values lie in contiguous tensors [B, H, W, D, ..]. A token is one
// of a single direction.
struct Cell {
    unsigned at;  // token · directions + direction
    int step;

    __device__ Cell(const Problem& p, const Way& way, int d) : Cell(p, way, static_cast<int>(p.directions), d) {}
    __device__ Cell(const Problem& p, const Way& way, int directions, int d) {
        const int width = static_cast<int>(p.width);
        const unsigned row = static_cast<unsigned>(way.batch) * static_cast<unsigned>(p.height) + way.row();
        at = (row * width + way.column()) * directions + d;
        step = static_cast<int>(way.signed_step(width * directions, directions));
    }
    __device__ void move(int lines) {
        at += lines * step;
        forget(at);
    }
    // In a tensor of so many values per token and direction.
    template <typename Item>
    __device__ Item* in(Item* tensor, Index values, Index inner) const {
        return reinterpret_cast<Item*>(in(reinterpret_cast<char*>(tensor + inner), values * sizeof(Item)));
    }
    // Where so many bytes are a token and direction's: one multiply-add, which the compiler does not find.
    __device__ char* in(char* tensor, Index bytes) const {
#ifdef __CUDA_ARCH__
        size_t address;
        asm("mad.wide.u32 %0, %1, %2, %3;"
            : "=l"(address)
            : "r"(at), "r"(static_cast<unsigned>(bytes)), "l"(__cvta_generic_to_global(tensor)));
        return static_cast<char*>(__cvta_global_to_generic(address));
#else
        return tensor + size_t(at) * static_cast<unsigned>(bytes);
#endif
    }
};

// The channel, or with shared weights the group, whose logits channel `channel` uses.
__device__ __forceinline__ Index logit_of(const Problem& p, Index channel) {
    if (!SHARED_WEIGHTS) return channel;
    const unsigned channels = static_cast<unsigned>(p.channels), groups = static_cast<unsigned>(p.groups);
    return static_cast<unsigned>(channel) / (channels / groups);
}

// ---------------------------------------------------------------------------------------------------------------
// Functions of real numbers.

// raised(x · GSPN_UNIT) = e^x. A sum of sigmoids of logits below -GSPN_SMALL is one of exponentials to the last bit, so
// such logits may be shifted together; of two logits that lie further apart than GSPN_TINY - GSPN_SMALL the smaller one
// has no weight.
#if GSPN_STORAGE == 1
#define GSPN_UNIT 1.0
#define GSPN_SMALL 60.0
#define GSPN_TINY 200.0
__device__ __forceinline__ Real exponential(Real value) { return exp(value); }
__device__ __forceinline__ Real raised(Real value) { return exp(value); }
__device__ __forceinline__ Real reciprocal(Real value) { return 1.0 / value; }
#elif GSPN_STORAGE == 0
#define GSPN_UNIT 1.0f
#define GSPN_SMALL 17.0f
#define GSPN_TINY 35.0f
__device__ __forceinline__ Real exponential(Real value) { return expf(value); }
__device__ __forceinline__ Real raised(Real value) { return expf(value); }
__device__ __forceinline__ Real reciprocal(Real value) { return __fdividef(1.0f, value); }
#else
#define GSPN_UNIT 1.44269504f
#define GSPN_SMALL 17.0f
#define GSPN_TINY (GSPN_UNIT * 35.0f)
__device__ __forceinline__ Real exponential(Real value) { return __expf(value); }
__device__ __forceinline__ Real raised(Real value) { return power_of_two(value); }
__device__ __forceinline__ Real reciprocal(Real value) { return __fdividef(1.0f, value); }
#endif
#if GSPN_STORAGE == 1
__device__ __forceinline__ Real minus_infinity() { return __longlong_as_double(0xfff0000000000000LL); }
#else
__device__ __forceinline__ Real minus_infinity() { return __uint_as_float(0xff800000u); }
#endif
__device__ __forceinline__ Real larger(Real a, Real b) {
#if GSPN_STORAGE == 1
    return fmax(a, b);
#else
    return fmaxf(a, b);
#endif
}
__device__ __forceinline__ Real smaller(Real a, Real b) {
#if GSPN_STORAGE == 1
    return fmin(a, b);
#else
    return fminf(a, b);
#endif
}
__device__ __forceinline__ Real multiply_add(Real a, Real b, Real c) {
#if GSPN_STORAGE == 1
    return fma(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}
// What is not a number stays that.
__device__ __forceinline__ Real at_most(Real value, Real limit) {
#if GSPN_STORAGE != 1 && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(limit));
    return value;
#else
    return value > limit ? limit : value;
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Deterministic sums.

// Sum over all threads of a block with one threadIdx.z, in a fixed order; valid in the first of them. `scratch` holds 32
// values.
__device__ __forceinline__ Real block_sum(Real value, Real* scratch) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int warps = (blockDim.x * blockDim.y + 31) / 32;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if (thread % 32 == 0) scratch[thread / 32] = value;
    __syncthreads();
    Real total = Real(0);
    if (thread == 0) {
#pragma unroll 1
        for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
    }
    __syncthreads();
    return total;
}

}  // namespace gspn
