// The scan's kernels for one instruction set; see vectors.h for how this file is included, DESIGN for the mathematics,
// gspn_dit/ops/lines.py for the same derivation in PyTorch.
//
// A task walks the lines of every direction for a block of channels of one sample. The inner loop runs over channels, which
// are contiguous. States live in padded lines: slot 0 and slot N + 1 stand for the neighbours off the line, and are zero.
#include "scan.h"
#include "weights.h"

namespace gspn {
namespace GSPN_ISA {

static GSPN_INLINE int64_t padded(int64_t channels) { return (channels + 31) / 32 * 32; }

// A tensor as [lines, positions, channels of the block], for one direction.
template <class T> struct Lines {
  T* base;
  int64_t line, position;
  GSPN_INLINE T* at(int64_t i, int64_t n) const { return base + i * line + n * position; }
};

// The order in which a direction visits its lines, and where the state restarts.
struct Geometry {
  int64_t lines, positions, window;
  bool columns, reverse;

  Geometry(const Scan& scan, int64_t d) {
    columns = scan.direction[d] == kRight || scan.direction[d] == kLeft;
    reverse = scan.direction[d] == kLeft || scan.direction[d] == kUp;
    lines = columns ? scan.width : scan.height;
    positions = columns ? scan.height : scan.width;
    window = scan.window;
  }
  int64_t index(int64_t step) const { return reverse ? lines - 1 - step : step; }
  bool restarts(int64_t i) const { return reverse ? (i == lines - 1 || (i + 1) % window == 0) : i % window == 0; }

  template <class T> Lines<T> view(T* base, int64_t height_stride, int64_t width_stride) const {
    return columns ? Lines<T>{base, width_stride, height_stride} : Lines<T>{base, height_stride, width_stride};
  }
};

// A block of an input [B, H, W, C] or [B, H, W, D, C].
template <class T>
static Lines<const T> view3(const Geometry& geometry, const Block& block, const void* data, const int64_t* stride) {
  return geometry.view((const T*)data + block.batch * stride[0] + block.channel, stride[1], stride[2]);
}
template <class T>
static Lines<const T> view4(const Geometry& geometry, const Block& block, int64_t d, const void* data,
                            const int64_t* stride) {
  return geometry.view((const T*)data + block.batch * stride[0] + d * stride[3] + block.channel, stride[1], stride[2]);
}

// A contiguous output [B, H, W, per_token].
template <class T> static Lines<T> output(const Geometry& geometry, const Scan& scan, const Block& block, void* data,
                                          int64_t per_token, int64_t offset) {
  T* base = (T*)data + block.batch * scan.height * scan.width * per_token + offset;
  return geometry.view(base, scan.width * per_token, per_token);
}

template <class T> constexpr bool in_place() { return sizeof(T) == sizeof(typename Accumulator<T>::type); }

// A sum over directions. An output in the accumulation type holds it itself; one in half precision is written at the end,
// from a plane of the task's scratch. Where a second task has the later directions, each of these goes into a plane of its
// own, and `join_sums` adds them to the sum of the earlier ones in the order in which one task alone would have.
template <class T> struct Sum {
  typedef typename Accumulator<T>::type A;
  Lines<T> result;
  Lines<A> partial;

  Sum(const Geometry& geometry, const Scan& scan, const Plan& plan, const Block& block, int64_t d, void* data, A* scratch) {
    const int64_t plane = scan.batch * scan.height * scan.width * scan.channels, width = padded(block.channels);
    const int64_t own = block.share == 0 ? 0 : 1 + d - first_of_second_share(scan);
    A* shared = plan.shares > 1 ? (A*)plan.sums + own * plane : nullptr;
    result = output<T>(geometry, scan, block, in_place<T>() && own > 0 ? (void*)shared : data, scan.channels, block.channel);
    partial = plan.shares > 1 ? output<A>(geometry, scan, block, shared, scan.channels, block.channel)
                              : geometry.view(scratch, scan.width * width, width);
    if (in_place<T>() || scan.directions == 1) partial = Lines<A>{scratch, 0, 0};  // not used
  }
};

// A NaN becomes the processor's own.
template <class A> static A merge_weight(const Scan& scan, int64_t d) {
  const double merge = scan.merge[d];
  return merge == merge ? (A)merge : (A)__builtin_nanf("");
}

struct Directions {
  int64_t begin, end;
  Directions(const Scan& scan, const Plan& plan, const Block& block)
      : begin(block.share == 0 ? 0 : first_of_second_share(scan)),
        end(plan.shares == 1 || block.share == 1 ? scan.directions : first_of_second_share(scan)) {}
};

// `add` to what is there, and `last`: the sum is complete.
template <class T, bool Tail, class V>
static GSPN_INLINE void add_up(T* result, typename Accumulator<T>::type* partial, V value, int64_t count, bool add,
                               bool last) {
  typedef typename Accumulator<T>::type A;
  A* sum = in_place<T>() ? (A*)result : partial;
  if (add) value += Tail ? load_some(sum, count) : load(sum);
  if (!in_place<T>() && last) Tail ? store_some(result, value, count) : store(result, value);
  else Tail ? store_some(sum, value, count) : store(sum, value);
}

// Add what each direction of the second share gave to the sum of the first, for the elements [begin, end) of an output like x.
template <class T> static void join_sums(const Scan& scan, const Plan& plan, void* data, int64_t begin, int64_t end) {
  typedef typename Accumulator<T>::type A;
  constexpr int L = Simd<A>::lanes;
  const int64_t plane = scan.batch * scan.height * scan.width * scan.channels;
  const A *first = in_place<T>() ? (const A*)data : (const A*)plan.sums, *sums = (const A*)plan.sums;
  T* result = (T*)data;
  for (int64_t j = begin; j < end; j += L) {
    const int64_t count = end - j;
    typename Simd<A>::V sum = count < L ? load_some(first + j, count) : load(first + j);
    for (int64_t own = 1; own < sum_planes(scan, plan); ++own)
      sum += count < L ? load_some(sums + own * plane + j, count) : load(sums + own * plane + j);
    count < L ? store_some(result + j, sum, count) : store(result + j, sum);
  }
}

template <class T, bool Tail> static GSPN_INLINE auto get(const T* p, int64_t count) {
  return Tail ? load_some(p, count) : load(p);
}
template <class T, bool Tail, class V> static GSPN_INLINE void put(T* p, V v, int64_t count) {
  Tail ? store_some(p, v, count) : store(p, v);
}

// Weights that several channels share, computed for a whole line: [3, N, groups of the block].
template <class A> struct SharedLine {
  A *w, *s;         // per group
  A *we, *dw;       // of one position, repeated for its channels: [3, padded channels]
  int64_t groups, size, plane;  // groups of the block, channels per group within the block, N * groups
};

template <class T, bool Backward>
static void shared_weights(SharedLine<typename Accumulator<T>::type>& line, Lines<const T> weight_logits,
                           int64_t k_stride, int64_t i, int64_t positions) {
  typedef typename Accumulator<T>::type A;
  constexpr int L = Simd<A>::lanes;
  const int64_t groups = line.groups, plane = line.plane;
  for (int64_t n = 0; n < positions; ++n)
    for (int k = 0; k < 3; ++k) {
      const T* from = weight_logits.at(i, n) + k * k_stride;
      A* to = line.w + k * plane + n * groups;
      int64_t g = 0;
      for (; g + L <= groups; g += L) store(to + g, load(from + g));
      if (g < groups) store_some(to + g, load_some(from + g, groups - g), groups - g);
    }
  const int64_t bounds[4] = {0, groups, positions > 1 ? (positions - 1) * groups : groups, positions * groups};
  for (int part = 0; part < 3; ++part)
    for (int64_t j = bounds[part]; j < bounds[part + 1]; j += L) {
      const int64_t count = bounds[part + 1] - j < L ? bounds[part + 1] - j : L;
      const bool minus = part > 0, plus = part < 2 && positions > 1;
      typename Simd<A>::V l[3];
      for (int k = 0; k < 3; ++k) l[k] = load_some(line.w + k * plane + j, count);
      const Weights<A> value = weights<A, Backward, true, sizeof(T) == sizeof(A)>(l[0], l[1], l[2], minus, plus);
      for (int k = 0; k < 3; ++k) {
        store_some(line.w + k * plane + j, value.w(k), count);
        if (Backward) store_some(line.s + k * plane + j, value.s(k), count);
      }
    }
}

template <class A> static GSPN_INLINE void repeat_groups(const SharedLine<A>& line, int64_t n, int64_t channels) {
  constexpr int L = Simd<A>::lanes;
  const int64_t stride = padded(channels);
  for (int k = 0; k < 3; ++k)
    for (int64_t g = 0; g < line.groups; ++g) {
      const typename Simd<A>::V zero = {};
      const A w = line.w[k * line.plane + n * line.groups + g];
      A* to = line.we + k * stride + g * line.size;
      // Whole vectors may run over into the next group, which is written after this one, or into the padding.
      for (int64_t j = 0; j < line.size; j += L) store(to + j, zero + w);
    }
}

#include "forward.h"
#include "backward.h"

}  // namespace GSPN_ISA
}  // namespace gspn
