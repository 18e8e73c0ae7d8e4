// The way back of one direction for one vector of channels, over what `scan_lines` kept. With g = grad_y and h, w, λ, u as in
// gspn_dit/ops/lines.py, i+1 the line visited next, u with the merge weight in it:
//
//   dh[i, n] = u g + Σ_k w_k[i+1, n-k] dh[i+1, n-k]      dx += λ dh      dλ = x dh      du = g h
//   dl_k = w_k sigmoid(-l_k) dh (h[i-1, n+k] - Σ_j w_j h[i-1, n+j])
//
// These five gradients of a position stay in a buffer until some lines are there, and then become gradients of weights and proxies.
#include "projected_forward.h"

namespace gspn {
namespace GSPN_ISA {

template <class A> struct ReverseLine {
  const A *x, *grad_y;
  A* grad_x;
  int64_t step;             // between positions of these three
  const A *kept, *before;   // of this line and of the one visited before: [N, 6 or 3, L]
  const A* weights;         // [N, 6] where a group shares them
  const A* next;            // w_k dh of the line visited next: [N, 3, L], zero at -1 and N
  A* passed;                // the same of this line
  A* gradients;             // [N, 5, L], or [N, 2, L] of the gates
  A* logits;                // and [N, 3, L]
  int64_t positions;
  bool add;                 // to grad_x
};

template <bool Restart, bool Shared, class A> static void reverse_line(const ReverseLine<A>& line) {
  constexpr int L = kLanes<A>, Q = Shared ? kGates : kProjected, slot = kKept<Shared> * L;
  for (int64_t n = 0; n < line.positions; ++n) {
    const A *kept = line.kept + n * slot, *next = line.next + n * 3 * L;
    A *passed = line.passed + n * 3 * L, *gradients = line.gradients + n * Q * L;
    A *gates = gradients + (Q - kGates) * L, *logits = Shared ? line.logits + n * 3 * L : gradients;
    const Vector<A> g = load_one(line.grad_y + n * line.step), x = load_one(line.x + n * line.step);
    const Vector<A> carried = load_one(next + 3 * L) + load_one(next + L) + load_one(next - L);
    const Vector<A> gradient = multiply_add(load_one(kept + kKeptOutput * L), g, carried);
    store_one(gates, x * gradient);
    store_one(gates + L, g * load_one(kept + kState * L));
    A* grad_x = line.grad_x + n * line.step;
    const Vector<A> in = load_one(kept + kKeptInput * L);
    store_one(grad_x, line.add ? multiply_add(in, gradient, load_one(grad_x)) : in * gradient);
    if constexpr (Restart) {
      memset(passed, 0, 3 * kBytes);
      memset(logits, 0, 3 * kBytes);
    } else {
      const A* before = line.before + n * slot;
      const Vector<A> h[3] = {load_one(before - slot), load_one(before), load_one(before + slot)};
      Vector<A> w[3], factor[3];
      if constexpr (Shared) {
        const A* shared = line.weights + n * kShared;
        for (int k = 0; k < 3; ++k) w[k] = all(shared[k]), factor[k] = all(shared[3 + k]);
      } else {
        w[0] = load_one(kept + kFirstWeight * L), w[2] = load_one(kept + kLastWeight * L);
        w[1] = all(A(1)) - w[0] - w[2];
        const Vector<A> sigmoids = load_one(kept + kSigmoids * L);
        for (int k = 0; k < 3; ++k) factor[k] = multiply_add(-w[k], sigmoids, all(A(1)));
      }
      const Vector<A> mean = multiply_add(w[2], h[2], multiply_add(w[1], h[1], w[0] * h[0]));
      for (int k = 0; k < 3; ++k) {
        const Vector<A> share = w[k] * gradient;
        store_one(passed + k * L, share);
        store_one(logits + k * L, share * factor[k] * (h[k] - mean));
      }
    }
  }
}

// How the tokens of one orientation are cut into chunks of whole lines, whose gradients are joined at once.
struct Chunks {
  int64_t lines, blocks;  // of a chunk; blocks of L tokens

  Chunks(const Sweep& sweep, int64_t lanes) {
    constexpr int64_t tokens = 64;  // their gradients fit in an L1 cache
    lines = sweep.positions < tokens ? tokens / sweep.positions : 1;
    lines = lines < sweep.lines ? lines : sweep.lines;
    blocks = (lines * sweep.positions + lanes - 1) / lanes;
  }
  int64_t count(const Sweep& sweep) const { return (sweep.lines + lines - 1) / lines; }
};

// Where the gradients of a panel and of the proxies are summed.
template <class A> struct ProductSums {
  A* panel;       // [padded P, Q, L]
  A* proxies;     // [chunks, blocks, padded P, L]
  A* transposed;  // scratch: [blocks, Q, L, L]
  A* logits;      // [chunks, blocks, 3, L tokens] where a group shares them
};

// Join the gradients [tokens, Q, L] of one chunk.
template <int Q, class A>
static void join_chunk(const ProductSums<A>& sums, const A* panel, const A* proxy, int64_t padded, const Chunks& chunks,
                       int64_t chunk, int64_t tokens, A* gradients) {
  constexpr int L = kLanes<A>;
  const int64_t blocks = (tokens + L - 1) / L;
  memset(gradients + tokens * Q * L, 0, (blocks * L - tokens) * Q * kBytes);
  add_weight_gradients<Q>(gradients, proxy, padded, tokens, sums.panel);
  transpose_gradients<Q>(gradients, blocks, sums.transposed);
  add_proxy_gradients<Q * L>(sums.transposed, panel, blocks, padded, sums.proxies + chunk * chunks.blocks * padded * L);
}

// Add the gradients of logits, [tokens, 3, L] of one chunk, over the lanes: channels that share them.
template <class A>
static void join_logits(const ProductSums<A>& sums, const Chunks& chunks, int64_t chunk, int64_t tokens, A* gradients) {
  constexpr int L = kLanes<A>;
  const int64_t blocks = (tokens + L - 1) / L;
  memset(gradients + tokens * 3 * L, 0, (blocks * L - tokens) * 3 * kBytes);
  transpose_gradients<3>(gradients, blocks, sums.transposed);
  A* to = sums.logits + chunk * chunks.blocks * 3 * L;
  for (int64_t row = 0; row < blocks * 3; ++row) {
    Vector<A> sum = load_one(sums.transposed + row * L * L);
    for (int j = 1; j < L; ++j) sum += load_one(sums.transposed + (row * L + j) * L);
    store_one(to + row * L, load_one(to + row * L) + sum);
  }
}

// All lines of a direction, in the opposite order. x, y (of `line`) and grad are those of line 0; `passed` is room for two lines
// of [N + 2, 3, L], `gradients` for one chunk, `kept` what `scan_lines` left.
template <bool Shared, class A>
static void reverse_lines(const Sweep& sweep, const Line<A>& line, const A* grad_y, A* grad_x, const A* kept, A* passed,
                          A* gradients, const ProductSums<A>& sums) {
  constexpr int L = kLanes<A>, Q = Shared ? kGates : kProjected, slot = kKept<Shared> * L;
  const int64_t positions = sweep.positions, kept_size = (positions + 2) * slot, passed_size = (positions + 2) * 3 * L;
  const Chunks chunks(sweep, L);
  A* logits = gradients + chunks.blocks * kGates * L * L;
  memset(passed, 0, 2 * passed_size * sizeof(A));
  for (int64_t step = sweep.lines - 1; step >= 0; --step) {
    const int64_t i = sweep.index(step), chunk = i / chunks.lines, first = chunk * chunks.lines;
    ReverseLine<A> reverse;
    reverse.x = line.x + i * sweep.line_step;
    reverse.grad_y = grad_y + i * sweep.line_step;
    reverse.grad_x = grad_x + i * sweep.line_step;
    reverse.step = line.step;
    reverse.kept = kept + i * kept_size + slot;
    reverse.before = step > 0 ? kept + sweep.index(step - 1) * kept_size + slot : nullptr;
    reverse.weights = Shared ? line.weights + i * positions * kShared : nullptr;
    reverse.next = passed + ((step + 1) & 1) * passed_size + 3 * L;
    reverse.passed = passed + (step & 1) * passed_size + 3 * L;
    reverse.gradients = gradients + (i - first) * positions * Q * L;
    reverse.logits = logits + (i - first) * positions * 3 * L;
    reverse.positions = positions;
    reverse.add = line.add;
    if (sweep.restarts(i)) reverse_line<true, Shared>(reverse);
    else reverse_line<false, Shared>(reverse);
    if (step > 0 && sweep.index(step - 1) / chunks.lines == chunk) continue;
    const int64_t lines = sweep.lines - first < chunks.lines ? sweep.lines - first : chunks.lines;
    join_chunk<Q>(sums, line.panel, line.proxy + first * positions * line.padded, line.padded, chunks, chunk, lines * positions,
                  gradients);
    if (Shared) join_logits(sums, chunks, chunk, lines * positions, logits);
  }
}

}  // namespace GSPN_ISA
}  // namespace gspn
