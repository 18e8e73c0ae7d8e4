// Single vectors of one instruction set, on top of vectors.h.
#include "vectors.h"

namespace gspn {
namespace GSPN_ISA {

template <class A> using Vector = typename Simd<A>::U;
template <class A> constexpr int kLanes = kBytes / sizeof(A);

template <class A> static GSPN_INLINE Vector<A> all(A value) { return value - Vector<A>{}; }

static GSPN_INLINE F32 all(F32 value) { return value; }
static GSPN_INLINE F64 all(F64 value) { return value; }

static GSPN_INLINE F32 multiply_add(float a, F32 b, F32 c) { return multiply_add(all(a), b, c); }
static GSPN_INLINE F64 multiply_add(double a, F64 b, F64 c) { return multiply_add(all(a), b, c); }

static GSPN_INLINE bool all_at_most(F32 v, float bound) { return all_true((I32)(v <= all(bound))); }
static GSPN_INLINE bool all_at_most(F64 v, double bound) { return all_true((I32)(v <= all(bound))); }

// Transpose a square of L vectors in place: blocks of S lanes change places, for S = L/2, L/4, …, 1.
template <class A, class I, int S> static GSPN_INLINE void transpose_from(Vector<A>* rows) {
  constexpr int L = kLanes<A>;
  I low, high;
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) low[j] = j & S ? L + j - S : j, high[j] = j & S ? L + j : j + S;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & S) continue;
    const Vector<A> a = rows[i], b = rows[i + S];
#if defined(__clang__)
    for (int j = 0; j < L; ++j) {
      rows[i][j] = low[j] < L ? a[low[j]] : b[low[j] - L];
      rows[i + S][j] = high[j] < L ? a[high[j]] : b[high[j] - L];
    }
#else
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + S] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (S > 1) transpose_from<A, I, S / 2>(rows);
}
static GSPN_INLINE void transpose(F32* rows) { transpose_from<float, I32, kLanes<float> / 2>(rows); }
static GSPN_INLINE void transpose(F64* rows) { transpose_from<double, I64, kLanes<double> / 2>(rows); }

// `count` elements in storage precision from or to a whole vector, whose other lanes are zero, or left alone.
template <class T, class A = typename Accumulator<T>::type>
static GSPN_INLINE Vector<A> load_lanes(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load_one(from);
  T lanes[kLanes<A>] = {};
  memcpy(lanes, from, sizeof(T) * count);
  return load_one(lanes);
}
template <class T, class V> static GSPN_INLINE void store_lanes(T* to, V value, int64_t count) {
  if (count >= (int64_t)(kBytes / sizeof(typename Accumulator<T>::type))) return store_one(to, value);
  T lanes[kBytes / sizeof(typename Accumulator<T>::type)];
  store_one(lanes, value);
  memcpy(to, lanes, sizeof(T) * count);
}

}  // namespace GSPN_ISA
}  // namespace gspn
