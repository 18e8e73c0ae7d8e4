// Propagation weights from logits: w_k = sigmoid(l_k) / sum_j sigmoid(l_j) and s_k = sigmoid(-l_k).
//
// With q_k = 1 + exp(-l_k), sigmoid(l_k) = 1 / q_k, so w_k = P_k / (P_0 + P_1 + P_2), P_k the product of the two other q:
// one division for all three. In the backward s_k = exp(-l_k) P_k / (q_0 q_1 q_2) shares that division.
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

template <class A> struct Weights {
  typename Simd<A>::V w[3], s[3];
};

// Any finite logits. With t = -l, a common shift of the three t leaves the weights alone as soon as all t > `lost`, where
// 1 + exp(t) rounds to exp(t); it brings the smallest t down to `lost`. What is still above `top` has a weight of about 0.
template <class A, bool Precise>
static __attribute__((noinline, cold)) void clamped_weights(const typename Simd<A>::V* logits, bool minus, bool plus,
                                                            Weights<A>& result) {
  typedef typename Simd<A>::V V;
  typedef Range<A> R;
  const V zero = {}, one = zero + A(1);
  const bool valid[3] = {minus, true, plus};
  V t[3], q[3], a[3];
  V smallest = -logits[1];
  for (int k = 0; k < 3; ++k) {
    t[k] = valid[k] ? -logits[k] : zero;
    if (valid[k]) smallest = (t[k] < smallest) ? t[k] : smallest;
  }
  V excess = smallest - R::lost;
  excess = (excess > zero) ? excess : zero;
  for (int k = 0; k < 3; ++k) {
    const V floor = (smallest > zero + R::lost) ? zero + R::lost : zero + R::bottom, top = zero + R::top;
    t[k] = t[k] - excess;
    t[k] = (t[k] < floor) ? floor : t[k];  // comparisons are false for NaN, which passes
    t[k] = (t[k] > top) ? top : t[k];
    a[k] = valid[k] ? exponential<Precise>(t[k]) : zero;
    q[k] = valid[k] ? one + a[k] : one;
  }
  V p[3] = {valid[0] ? q[1] * q[2] : zero, q[0] * q[2], valid[2] ? q[0] * q[1] : zero};
  V inverse = one / (p[0] + p[1] + p[2]);
  for (int k = 0; k < 3; ++k) {
    result.w[k] = p[k] * inverse;
    result.s[k] = a[k] / q[k];
  }
  if (!minus && !plus) result.w[1] = one + zero * a[1];
}

// `Edge`: the position may lack neighbours, as `minus` and `plus` say; else it has both.
template <class A, bool Backward, bool Edge, bool Precise>
static GSPN_INLINE Weights<A> weights(typename Simd<A>::V l0, typename Simd<A>::V l1, typename Simd<A>::V l2, bool minus,
                                      bool plus) {
  typedef typename Simd<A>::V V;
  const V zero = {};
  if (Edge && !minus) l0 = zero;
  if (Edge && !plus) l2 = zero;
  const V squares = l0 * l0 + l1 * l1 + l2 * l2;
  Weights<A> result;
  if (__builtin_expect(!all_true(squares <= zero + Range<A>::fast * Range<A>::fast), 0)) {
    const V logits[3] = {l0, l1, l2};
    clamped_weights<A, Precise>(logits, !Edge || minus, !Edge || plus, result);
    return result;
  }
  const V a0 = exponential<Precise>(-l0), a1 = exponential<Precise>(-l1), a2 = exponential<Precise>(-l2);
  V q0 = a0 + A(1), q1 = a1 + A(1), q2 = a2 + A(1);
  if (Edge && !minus) q0 = zero + A(1);
  if (Edge && !plus) q2 = zero + A(1);
  V p0 = q1 * q2, p1 = q0 * q2, p2 = q0 * q1;
  const V product = q0 * p0;
  if (Edge && !minus) p0 = zero;
  if (Edge && !plus) p2 = zero;
  const V sum = p0 + p1 + p2;
  if (Backward) {
    const V inverse = A(1) / (product * sum);
    const V of_sum = product * inverse, of_product = sum * inverse;
    result.w[0] = p0 * of_sum;
    result.w[1] = p1 * of_sum;
    result.w[2] = p2 * of_sum;
    result.s[0] = a0 * (p0 * of_product);
    result.s[1] = a1 * (p1 * of_product);
    result.s[2] = a2 * (p2 * of_product);
  } else {
    const V inverse = A(1) / sum;
    result.w[0] = p0 * inverse;
    result.w[1] = p1 * inverse;
    result.w[2] = p2 * inverse;
  }
  if (Edge && !minus && !plus) result.w[1] = zero + A(1);  // exactly, so that its gradient is exactly 0
  return result;
}

}  // namespace GSPN_ISA
}  // namespace gspn
