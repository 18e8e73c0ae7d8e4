// One direction of the projected scan for one vector of channels: projections and recurrence, which never leave the registers.
#include "projected.h"
#include "projected_tiles.h"

namespace gspn {
namespace GSPN_ISA {

// What a panel projects a proxy to: the logits for k = -1, 0, +1, then λ, then u times the direction's merge weight.
// A panel of channels that share their logits holds the two gates alone.
constexpr int kProjected = 5, kInputGate = 3, kOutputGate = 4, kGates = 2;

// What a group of channels shares at a position: w_k, then 1 - w_k Σ sigmoid(l_j), a factor of the gradients of l_k.
constexpr int kShared = 6;

// The order in which a direction visits its lines, where the state restarts, and how its lines lie in a plane of vectors.
struct Sweep {
  int64_t lines, positions, window, line_step, position_step;
  bool columns, reverse;

  int64_t index(int64_t step) const { return reverse ? lines - 1 - step : step; }
  bool restarts(int64_t i) const { return reverse ? (i == lines - 1 || (i + 1) % window == 0) : i % window == 0; }
};

// Bounds on a logit. Below -lost, 1 + exp(-l) rounds to exp(-l).
template <class A> struct Bounds;
template <> struct Bounds<float> {
  static constexpr float lost = 17, lowest = -35, highest = 80, largest = 3.402823466e38f, not_a_number = -88.9f;
};
template <> struct Bounds<double> {
  static constexpr double lost = 37, lowest = -75, highest = 700, largest = 1.7976931348623157e308, not_a_number = -709.96;
};

// Bring any logits into the range of `Propagation` without changing the weights: they stay the same if all l < -lost grow alike, and
// what is still below `lowest` weighs nothing. Logits with |l| <= lost keep their values. A NaN becomes one whose exp(-l) is one.
template <class A> static __attribute__((noinline, cold)) void tame(Vector<A>* logits, Vector<A> minus, Vector<A> plus) {
  typedef Bounds<A> B;
  const Vector<A> zero = {}, valid[3] = {minus, all(A(1)), plus};
  Vector<A> greatest = all(-B::largest);
  for (int k = 0; k < 3; ++k) {
    logits[k] = valid[k] != zero ? logits[k] : zero;
    logits[k] = logits[k] < all(-B::largest) ? all(-B::largest) : logits[k];
    greatest = (logits[k] > greatest) & (valid[k] != zero) ? logits[k] : greatest;
  }
  for (int k = 0; k < 3; ++k) {
    Vector<A> value = greatest < all(-B::lost) ? logits[k] - greatest - all(B::lost) : logits[k];
    value = value < all(B::lowest) ? all(B::lowest) : value;
    value = value > all(B::highest) ? all(B::highest) : value;
    logits[k] = value == value ? value : all(B::not_a_number);
  }
}

// w_k = sigmoid(l_k) / Σ sigmoid(l_j) as numerator[k] * inverse. With q_k = 1 + exp(-l_k), sigmoid(l_k) = 1 / q_k, and the numerators
// are products of the two other q. `minus` and `plus` are 1, or 0 where the neighbour is off the line: then q = 1, w = 0; of
// all lanes, or one for each.
template <class A> struct Propagation {
  Vector<A> numerator[3], sum, inverse, product;

  template <class M> GSPN_INLINE Propagation(const Vector<A>* logits, M minus, M plus) {
    const Vector<A> one = all(A(1));
    const Vector<A> q0 = multiply_add(minus, exponential<true>(-logits[0]), one), q1 = exponential<true>(-logits[1]) + one;
    const Vector<A> q2 = multiply_add(plus, exponential<true>(-logits[2]), one), outer = q0 * q2;
    numerator[0] = q1 * q2 * all(minus);
    numerator[1] = outer;
    numerator[2] = q0 * q1 * all(plus);
    sum = numerator[0] + numerator[1] + numerator[2];
    inverse = one / sum;
    product = outer * q1;
  }
};

// What the backward keeps of a position: h, λ, u, and where weights are not shared w_0, w_2, Σ sigmoid(l_k).
enum Kept { kState, kKeptInput, kKeptOutput, kFirstWeight, kLastWeight, kSigmoids };
template <bool Shared> constexpr int kKept = Shared ? 3 : 6;

// One line in a direction. A position's state and what is kept with it are `slot` vectors; those at -1 and N are zero.
template <class A> struct Line {
  const A *panel, *proxy;  // [P, 5 or 2, L], [N, padded P]
  const A* weights;        // [N, 6] where a group shares them
  const A* x;
  A* y;
  int64_t step;  // between positions of x and y
  const A* before;
  A* state;
  const A *minus, *plus;  // [N]: whether there is a neighbour
  int64_t positions, proxies, padded;
  bool add;  // to y

  // With matrix instructions, in the place of panel and proxy: tiles, whose weights lack the direction's merge weight.
  const BFloat16 *panel_tiles, *proxy_tiles;
  A merge;
  A* products;  // [16, 5 or 2, L]
};

template <int Positions, class A>
static GSPN_INLINE void tame_all(const Line<A>& line, int64_t n, int64_t count, Vector<A> (&sum)[Positions][kProjected]) {
  Vector<A> size = {};
#pragma GCC unroll 8
  for (int j = 0; j < Positions; ++j)
    for (int k = 0; k < 3; ++k) size = multiply_add(sum[j][k], sum[j][k], size);
  if (__builtin_expect(all_at_most(size, Bounds<A>::lost * Bounds<A>::lost), 1)) return;
#pragma GCC unroll 8
  for (int j = 0; j < Positions; ++j) {
    if (j >= count) continue;
    Vector<A> logits[3] = {sum[j][0], sum[j][1], sum[j][2]};  // a copy, so that the sums themselves can stay in registers
    tame<A>(logits, all(line.minus[n + j]), all(line.plus[n + j]));
    for (int k = 0; k < 3; ++k) sum[j][k] = logits[k];
  }
}

template <bool Restart, bool Keep, bool Shared, class A>
static GSPN_INLINE void advance(const Line<A>& line, int64_t n, const Vector<A>* projected) {
  constexpr int L = kLanes<A>;
  constexpr int64_t slot = (Keep ? kKept<Shared> : 1) * L;
  constexpr int first = Restart || Shared ? kInputGate : 0;  // of what is projected
  const Vector<A> in = projected[kInputGate - first], out = projected[kOutputGate - first];
  A* to = line.state + n * slot;
  Vector<A> state = in * load_one(line.x + n * line.step);
  if constexpr (!Restart && Shared) {
    const A *from = line.before + n * slot, *w = line.weights + n * kShared;
    for (int k = 0; k < 3; ++k) state = multiply_add(w[k], load_one(from + (k - 1) * slot), state);
  } else if constexpr (!Restart) {
    const A* from = line.before + n * slot;
    const Propagation<A> w(projected, line.minus[n], line.plus[n]);
    Vector<A> carried = w.numerator[0] * load_one(from - slot);
    carried = multiply_add(w.numerator[1], load_one(from), carried);
    carried = multiply_add(w.numerator[2], load_one(from + slot), carried);
    state = multiply_add(carried, w.inverse, state);
    if (Keep) {
      store_one(to + kFirstWeight * L, w.numerator[0] * w.inverse);
      store_one(to + kLastWeight * L, w.numerator[2] * w.inverse);
      store_one(to + kSigmoids * L, w.sum / w.product);
    }
  }
  store_one(to + kState * L, state);
  if (Keep) {
    store_one(to + kKeptInput * L, in);
    store_one(to + kKeptOutput * L, out);
  } else {
    A* y = line.y + n * line.step;
    store_one(y, line.add ? multiply_add(out, state, load_one(y)) : out * state);
  }
}

// What a panel projects the proxies of the positions from n on to, the last Q values of `Of`. Behind the last position of a line
// there is anything.
template <int Positions, int Q, int Of, class A>
static GSPN_INLINE void project_positions(const Line<A>& line, int64_t n, Vector<A> (&sum)[Positions][Q]) {
  constexpr int L = kLanes<A>;
  if constexpr (kMatrices) {
    const int64_t within = n % kTileRows, blocks = tile_blocks(line.proxies);
    if (within == 0)
      project_tiles<Q, Of>(line.panel_tiles + (Of - Q) * kTileElements,
                           line.proxy_tiles + n / kTileRows * blocks * kTileElements, blocks, line.products);
#pragma GCC unroll 8
    for (int j = 0; j < Positions; ++j) {
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum[j][q] = load_one(line.products + ((within + j) * Q + q) * L);
      sum[j][Q - 1] = sum[j][Q - 1] * line.merge;
    }
  } else {
    const A* proxy[Positions];
    for (int j = 0; j < Positions; ++j) proxy[j] = line.proxy + (n + j < line.positions ? n + j : n) * line.padded;
    project<Positions, Q, Of>(line.panel + (Of - Q) * L, proxy, line.proxies, sum);
  }
}

template <bool Restart, bool Keep, bool Shared, class A> static void scan_line(const Line<A>& line) {
  constexpr int tile = Shared ? 2 * kPositions : kPositions;
  constexpr int Of = Shared ? kGates : kProjected, Q = Restart ? kGates : Of;
  for (int64_t n = 0; n < line.positions; n += tile) {
    const int64_t count = line.positions - n;
    Vector<A> sum[tile][Q];
    project_positions<tile, Q, Of>(line, n, sum);
    if constexpr (!Restart && !Shared) tame_all(line, n, count, sum);
#pragma GCC unroll 8
    for (int j = 0; j < tile; ++j)
      if (j < count) advance<Restart, Keep, Shared>(line, n + j, sum[j]);
  }
}

// All lines of a direction. `line` holds what they share; x, y and proxies are those of line 0. Forward, `states` are two lines,
// which take turns; with `Keep` they are all lines. Each has a zero at both ends.
template <bool Keep, bool Shared, class A>
static void scan_lines(const Sweep& sweep, Line<A> line, A* states) {
  constexpr int64_t slot = (Keep ? kKept<Shared> : 1) * kLanes<A>;
  const int64_t size = (sweep.positions + 2) * slot;
  for (int64_t i = 0; i < (Keep ? sweep.lines : 2); ++i) {
    memset(states + i * size, 0, kBytes);
    memset(states + (i + 1) * size - slot, 0, kBytes);
  }
  const Line<A> whole = line;
  line.before = states + slot;
  for (int64_t step = 0; step < sweep.lines; ++step) {
    const int64_t i = sweep.index(step);
    line.proxy = whole.proxy + i * sweep.positions * line.padded;
    if (Shared) line.weights = whole.weights + i * sweep.positions * kShared;
    if (kMatrices)
      line.proxy_tiles = whole.proxy_tiles + i * line_tiles(sweep.positions) * tile_blocks(line.proxies) * kTileElements;
    line.x = whole.x + i * sweep.line_step;
    line.y = whole.y + i * sweep.line_step;
    line.state = states + slot + (Keep ? i : step & 1) * size;
    if (sweep.restarts(i)) scan_line<true, Keep, Shared>(line);
    else scan_line<false, Keep, Shared>(line);
    line.before = line.state;
  }
}

}  // namespace GSPN_ISA
}  // namespace gspn
