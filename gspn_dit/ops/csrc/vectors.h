// SIMD vectors for one instruction set, on the vector extensions that GCC and Clang share. Included once per instruction
// set with GSPN_ISA (a namespace) and GSPN_VECTOR_BYTES set. No standard templates: they would be merged across sets.
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gspn {
namespace GSPN_ISA {

#define GSPN_INLINE inline __attribute__((always_inline))

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T> struct Accumulator { typedef float type; };
template <> struct Accumulator<double> { typedef double type; };

constexpr int kBytes = GSPN_VECTOR_BYTES;
typedef float F32 __attribute__((vector_size(kBytes)));
typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef int64_t I64 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));

// Two vectors side by side, the unit of all work. Two chains of arithmetic fill the pipelines that one leaves half empty.
template <class U> struct Pair {
  U low, high;
};

template <class A> struct Simd;
template <> struct Simd<float> {
  typedef F32 U;
  typedef Pair<F32> V;
  static constexpr int lanes = kBytes / 2;
};
template <> struct Simd<double> {
  typedef F64 U;
  typedef Pair<F64> V;
  static constexpr int lanes = kBytes / 4;
};

#define GSPN_PAIR_OPERATOR(op)                                                                           \
  template <class U> static GSPN_INLINE Pair<U> operator op(Pair<U> a, Pair<U> b) {                      \
    return {a.low op b.low, a.high op b.high};                                                           \
  }                                                                                                      \
  template <class U> static GSPN_INLINE Pair<U> operator op(Pair<U> a, decltype(U()[0] + 0) b) {         \
    return {a.low op b, a.high op b};                                                                    \
  }
GSPN_PAIR_OPERATOR(+)
GSPN_PAIR_OPERATOR(-)
GSPN_PAIR_OPERATOR(*)
GSPN_PAIR_OPERATOR(/)
#undef GSPN_PAIR_OPERATOR
template <class U> static GSPN_INLINE Pair<U> operator/(decltype(U()[0] + 0) a, Pair<U> b) { return {a / b.low, a / b.high}; }
template <class U> static GSPN_INLINE Pair<U> operator-(decltype(U()[0] + 0) a, Pair<U> b) { return {a - b.low, a - b.high}; }
template <class U> static GSPN_INLINE Pair<U> operator-(Pair<U> a) { return {-a.low, -a.high}; }
template <class U> static GSPN_INLINE Pair<U> operator+=(Pair<U>& a, Pair<U> b) { return a = a + b; }

// a b + c, rounded once where the processor can. The compiler may not fuse by itself (setup.py), because it would choose
// differently in each copy of the code: whole vectors and tails, edges and middles must give the same bits.
static GSPN_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
static GSPN_INLINE F64 multiply_add(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
template <class U> static GSPN_INLINE Pair<U> multiply_add(Pair<U> a, Pair<U> b, Pair<U> c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}
static GSPN_INLINE F32 multiply_add(F32 a, float b, F32 c) { return multiply_add(a, F32{} + b, c); }
static GSPN_INLINE F32 multiply_add(F32 a, float b, float c) { return multiply_add(a, F32{} + b, F32{} + c); }
static GSPN_INLINE F32 multiply_add(F32 a, F32 b, float c) { return multiply_add(a, b, F32{} + c); }
static GSPN_INLINE F64 multiply_add(F64 a, double b, F64 c) { return multiply_add(a, F64{} + b, c); }
static GSPN_INLINE F64 multiply_add(F64 a, double b, double c) { return multiply_add(a, F64{} + b, F64{} + c); }
static GSPN_INLINE F64 multiply_add(F64 a, F64 b, double c) { return multiply_add(a, b, F64{} + c); }

static GSPN_INLINE F32 load_one(const float* p) { F32 v; memcpy(&v, p, kBytes); return v; }
static GSPN_INLINE F64 load_one(const double* p) { F64 v; memcpy(&v, p, kBytes); return v; }
static GSPN_INLINE void store_one(float* p, F32 v) { memcpy(p, &v, kBytes); }
static GSPN_INLINE void store_one(double* p, F64 v) { memcpy(p, &v, kBytes); }

#if defined(__AVX2__) && !defined(__AVX512F__)
static GSPN_INLINE F32 load_one(const BFloat16* p) {
  const __m256i high_halves =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (F32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), high_halves);
}
// Round to nearest even. A NaN needs no care: no operation sets bits below those that a 16-bit input or the processor's own
// NaN has (the merge weight is made such a NaN), and rounding does not carry into what is kept of it.
static GSPN_INLINE void store_one(BFloat16* p, F32 v) {
  const __m256i bits = (__m256i)v;
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
#else
static GSPN_INLINE F32 load_one(const BFloat16* p) {
  U16 half;
  memcpy(&half, p, kBytes / 2);
  return (F32)(__builtin_convertvector(half, U32) << 16);
}
// Round to nearest even; a NaN stays one whatever its payload.
static GSPN_INLINE void store_one(BFloat16* p, F32 v) {
  U32 bits = (U32)v;
  U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  U32 kept = (v == v) ? rounded : (bits | 0x400000u);
  U16 half = __builtin_convertvector(kept >> 16, U16);
  memcpy(p, &half, kBytes / 2);
}
#endif

#if defined(__AVX512F__)
static GSPN_INLINE F32 load_one(const Float16* p) {
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static GSPN_INLINE void store_one(Float16* p, F32 v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
static GSPN_INLINE F32 load_one(const Float16* p) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static GSPN_INLINE void store_one(Float16* p, F32 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static GSPN_INLINE F32 load_one(const Float16* p) {
  U16 half;
  memcpy(&half, p, kBytes / 2);
  U32 bits = __builtin_convertvector(half, U32);
  U32 exponent = bits & 0x7c00u, mantissa = bits & 0x3ffu;
  U32 normal = ((bits & 0x7fffu) << 13) + (112u << 23);
  U32 special = ((bits & 0x7fffu) << 13) | 0x7f800000u;
  U32 tiny = (U32)(__builtin_convertvector((I32)mantissa, F32) * 0x1p-24f);
  U32 magnitude = (exponent == 0x7c00u) ? special : ((exponent == 0u) ? tiny : normal);
  return (F32)(magnitude | ((bits & 0x8000u) << 16));
}
static GSPN_INLINE void store_one(Float16* p, F32 v) {
  U32 bits = (U32)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  U32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  U32 tiny = (U32)((F32)magnitude * 0x1p24f + 0x1.8p23f) & 0x7ffu;  // the addition rounds to nearest even
  U32 special = (magnitude > 0x7f800000u) ? (0x7e00u | (magnitude & 0u)) : (0x7c00u | (magnitude & 0u));
  U32 kept = (magnitude >= 0x477ff000u) ? special : ((magnitude < 0x38800000u) ? tiny : normal);
  U16 half = __builtin_convertvector(kept | sign, U16);
  memcpy(p, &half, kBytes / 2);
}
#endif

template <class T> static GSPN_INLINE auto load(const T* p) {
  typedef typename Simd<typename Accumulator<T>::type>::V V;
  return V{load_one(p), load_one(p + sizeof(V) / sizeof(typename Accumulator<T>::type) / 2)};
}
template <class T, class U> static GSPN_INLINE void store(T* p, Pair<U> v) {
  store_one(p, v.low);
  store_one(p + sizeof(U) / sizeof(typename Accumulator<T>::type), v.high);
}

// Copy without bringing the target into the cache first. The target and the bytes are multiples of 64.
static GSPN_INLINE void copy_past_caches(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512((__m512i*)((char*)to + i), _mm512_loadu_si512((const char*)from + i));
#elif defined(__AVX2__)
  for (int64_t i = 0; i < bytes; i += 64) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)((const char*)from + i));
    const __m256i high = _mm256_loadu_si256((const __m256i*)((const char*)from + i + 32));
    _mm256_stream_si256((__m256i*)((char*)to + i), low);
    _mm256_stream_si256((__m256i*)((char*)to + i + 32), high);
  }
#else
  memcpy(to, from, bytes);
#endif
}
static GSPN_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first `count` lanes; the others are zero, or left alone.
template <class T, class A = typename Accumulator<T>::type>
static GSPN_INLINE typename Simd<A>::V load_some(const T* p, int64_t count) {
  T lanes[Simd<A>::lanes] = {};
  memcpy(lanes, p, sizeof(T) * count);
  return load(lanes);
}
template <class T, class V> static GSPN_INLINE void store_some(T* p, V v, int64_t count) {
  T lanes[sizeof(V) / sizeof(typename Accumulator<T>::type)];
  store(lanes, v);
  memcpy(p, lanes, sizeof(T) * count);
}

static GSPN_INLINE bool all_true(I32 mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#else
  int32_t all = -1;
  for (int i = 0; i < kBytes / 4; ++i) all &= mask[i];
  return all != 0;
#endif
}
template <class U> static GSPN_INLINE bool all_below(Pair<U> v, decltype(U()[0] + 0) bound) {
  const U limit = U{} + bound;
  return all_true((I32)((v.low <= limit) & (v.high <= limit)));
}

template <class U> static GSPN_INLINE auto lane_sum(Pair<U> v) {
  const U both = v.low + v.high;
  auto sum = both[0];
  for (unsigned i = 1; i < kBytes / sizeof(sum); ++i) sum += both[i];
  return sum;
}

static GSPN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// exp(t) for |t| <= 80. The relative error is below 2e-7, or 3e-6 where `Precise` is false (half-precision storage). The power
// of two is added to the exponent bits, which may turn a NaN into a number: callers look for NaN themselves. The polynomials
// are cut in halves, for a shorter chain.
template <bool Precise> static GSPN_INLINE F32 exponential(F32 t) {
  constexpr float magic = 0x1.8p23f;  // rounds to an integer n and leaves it in the low bits
  const F32 shifted = multiply_add(t, 0x1.715476p+0f, magic);
  const F32 n = shifted - magic;
#ifdef __FMA__
  const F32 r = multiply_add(t, 0x1.715476p+0f, -n);  // fused, hence exact but for the constant
  const F32 square = r * r;
  F32 p;
  if (Precise) {
    p = multiply_add(r, 0x1.5c0884p-10f, 0x1.3d0ccep-7f);
    p = multiply_add(p, square, multiply_add(r, 0x1.c6b6e8p-5f, 0x1.ebf916p-3f));
    p = multiply_add(p, square, multiply_add(r, 0x1.62e428p-1f, 0x1.000002p+0f));
  } else {
    p = multiply_add(square, 0x1.39976ep-7f, multiply_add(r, 0x1.ca151ep-5f, 0x1.ec06e0p-3f));
    p = multiply_add(p, square, multiply_add(r, 0x1.62e0dcp-1f, 0x1.ffffe8p-1f));
  }
#else
  const F32 r = (t - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts; the first product is exact
  F32 p = r * 0x1.0fe57ap-7f + 0x1.575f72p-5f;
  p = p * r + 0x1.555a1ap-3f;
  p = p * r + 0x1.fffd18p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 0x1.000002p+0f;
#endif
  return (F32)((U32)p + ((U32)shifted << 23));
}

// exp(t) for |t| <= 700, to a few units in the last place.
template <bool Precise> static GSPN_INLINE F64 exponential(F64 t) {
  constexpr double magic = 0x1.8p52;
  const F64 shifted = multiply_add(t, 0x1.71547652b82fep+0, magic);
  const F64 n = shifted - magic;
  const F64 r = multiply_add(n, -1.90821492927058770002e-10, multiply_add(n, -6.93147180369123816490e-01, t));
  constexpr double inverse_factorial[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                          1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                          1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5, 1.0, 1.0};
  F64 p = multiply_add(r, inverse_factorial[0], inverse_factorial[1]);
  for (int i = 2; i < 14; ++i) p = multiply_add(p, r, inverse_factorial[i]);
  return (F64)((U64)p + ((U64)shifted << 52));
}

template <bool Precise, class U> static GSPN_INLINE Pair<U> exponential(Pair<U> t) {
  return {exponential<Precise>(t.low), exponential<Precise>(t.high)};
}

}  // namespace GSPN_ISA
}  // namespace gspn
