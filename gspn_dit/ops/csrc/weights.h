// Propagation weights from logits: w_k = sigmoid(l_k) / sum_j sigmoid(l_j) and s_k = sigmoid(-l_k).
//
// With q_k = 1 + exp(-l_k), sigmoid(l_k) = 1 / q_k, so w_k = P_k / (P_0 + P_1 + P_2), P_k the product of the two other q:
// one division for all three, which 1 / (q_0 q_1 q_2) shares in the backward.
// A neighbour off the line has q = 1, weight 0, and its logit is never used.
#include "vectors.h"

namespace gspn {
namespace GSPN_ISA {

template <class A> struct Range;
template <> struct Range<float> {
  static constexpr float fast = 16, lost = 16, top = 42, bottom = -80;
};
template <> struct Range<double> {
  static constexpr double fast = 64, lost = 48, top = 350, bottom = -700;
};

// 1 - a b.
template <class U> static GSPN_INLINE Pair<U> one_minus(Pair<U> a, Pair<U> b) {
  const U one = U{} + 1;
  return multiply_add(-a, b, Pair<U>{one, one});
}

// w_k is p[k] * inverse; in the backward sigmoid(l_k) is p[k] * of_product.
template <class A> struct Weights {
  typename Simd<A>::V p[3], inverse, of_product;
  GSPN_INLINE typename Simd<A>::V w(int k) const { return p[k] * inverse; }
  GSPN_INLINE typename Simd<A>::V s(int k) const { return one_minus(p[k], of_product); }
};

// The logits of a lane are within the fast range if this is at most its square.
template <class V> static GSPN_INLINE V sum_of_squares(V l0, V l1, V l2) {
  return multiply_add(l2, l2, multiply_add(l1, l1, l0 * l0));
}

// Any finite logits. With t = -l, a common shift of the three t leaves the weights alone as soon as all t > `lost`, where
// 1 + exp(t) rounds to exp(t); it brings the smallest t down to `lost`. What is still above `top` has a weight of about 0.
template <class A, bool Precise, class U>
static GSPN_INLINE void clamped_half(const U* logits, bool minus, bool plus, U* p, U* inverse, U* of_product) {
  typedef Range<A> R;
  const U zero = {}, one = zero + A(1);
  const bool valid[3] = {minus, true, plus};
  U t[3], q[3], a[3];
  U smallest = -logits[1];
  for (int k = 0; k < 3; ++k) {
    t[k] = valid[k] ? -logits[k] : zero;
    if (valid[k]) smallest = (t[k] < smallest) ? t[k] : smallest;
  }
  U excess = smallest - R::lost;
  excess = (excess > zero) ? excess : zero;
  for (int k = 0; k < 3; ++k) {
    const U floor = (smallest > zero + R::lost) ? zero + R::lost : zero + R::bottom, top = zero + R::top;
    t[k] = t[k] - excess;
    t[k] = (t[k] < floor) ? floor : t[k];  // comparisons are false for NaN, which passes
    t[k] = (t[k] > top) ? top : t[k];
    a[k] = exponential<Precise>(t[k]);
    a[k] = (t[k] == t[k]) ? a[k] : t[k];
    if (!valid[k]) a[k] = zero;
    q[k] = one + a[k];
  }
  p[0] = valid[0] ? q[1] * q[2] : zero;
  p[1] = q[0] * q[2];
  p[2] = valid[2] ? q[0] * q[1] : zero;
  *inverse = one / (p[0] + p[1] + p[2]);
  *of_product = one / (q[0] * q[1] * q[2]);
}

// Logits within the fast range. `Edge`: the position may lack neighbours, as `minus` and `plus` say; else it has both.
template <class A, bool Backward, bool Edge, bool Precise>
static GSPN_INLINE Weights<A> fast_weights(typename Simd<A>::V l0, typename Simd<A>::V l1, typename Simd<A>::V l2, bool minus,
                                           bool plus) {
  typedef typename Simd<A>::V V;
  const V zero = {};
  Weights<A> result;
  const V a0 = exponential<Precise>(-l0), a1 = exponential<Precise>(-l1), a2 = exponential<Precise>(-l2);
  V q0 = a0 + A(1), q1 = a1 + A(1), q2 = a2 + A(1);
  if (Edge && !minus) q0 = zero + A(1);
  if (Edge && !plus) q2 = zero + A(1);
  V p0 = q1 * q2, p1 = q0 * q2, p2 = q0 * q1;
  const V product = q0 * p0;
  if (Edge && !minus) p0 = zero;
  if (Edge && !plus) p2 = zero;
  const V sum = p0 + (p1 + p2);
  if (Backward) {
    const V inverse = A(1) / (product * sum);
    result.of_product = sum * inverse;
    result.inverse = product * inverse;
  } else {
    result.inverse = A(1) / sum;
  }
  result.p[0] = p0;
  result.p[1] = p1;
  result.p[2] = p2;
  return result;
}

// Some logits lie out of the fast range: each lane gets what it would get beside any others.
template <class A, bool Backward, bool Edge, bool Precise>
static __attribute__((noinline, cold)) void mixed_weights(const typename Simd<A>::V* logits, bool minus, bool plus,
                                                          Weights<A>& result) {
  typedef typename Simd<A>::U U;
  result = fast_weights<A, Backward, Edge, Precise>(logits[0], logits[1], logits[2], minus, plus);
  U l[3], p[3], inverse, of_product;
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 3; ++k) l[k] = half ? logits[k].high : logits[k].low;
    const auto fast = sum_of_squares(l[0], l[1], l[2]) <= U{} + Range<A>::fast * Range<A>::fast;
    clamped_half<A, Precise>(l, minus, plus, p, &inverse, &of_product);
    const auto blend = [&](typename Simd<A>::V& into, U value) {
      U& target = half ? into.high : into.low;
      target = fast ? target : value;
    };
    blend(result.inverse, inverse);
    for (int k = 0; k < 3; ++k) blend(result.p[k], p[k]);
    if (Backward) blend(result.of_product, of_product);
  }
}

template <class A, bool Backward, bool Edge, bool Precise>
static GSPN_INLINE Weights<A> weights(typename Simd<A>::V l0, typename Simd<A>::V l1, typename Simd<A>::V l2, bool minus,
                                      bool plus) {
  typedef typename Simd<A>::V V;
  const V zero = {};
  if (Edge && !minus) l0 = zero;
  if (Edge && !plus) l2 = zero;
  Weights<A> result;
  if (__builtin_expect(all_below(sum_of_squares(l0, l1, l2), Range<A>::fast * Range<A>::fast), 1)) {
    result = fast_weights<A, Backward, Edge, Precise>(l0, l1, l2, minus, plus);
  } else {
    const V logits[3] = {l0, l1, l2};
    mixed_weights<A, Backward, Edge, Precise>(logits, !Edge || minus, !Edge || plus, result);
  }
  if (Edge && !minus && !plus) result.p[1] = result.inverse = zero + A(1);  // exactly, so that the gradient is exactly 0
  return result;
}

}  // namespace GSPN_ISA
}  // namespace gspn
