// Logits that a group of whole vectors of channels shares: a vector then holds tokens, so that a position's weights are computed
// once for the group, and its gradients of logits, summed over the group's channels, meet the proxies once.
#include "projected_packing.h"

namespace gspn {
namespace GSPN_ISA {

// Scratch of a task.
template <class A> struct SharedScratch {
  A* turned[2];           // rows, columns: proxies as [chunks, blocks, padded P, L tokens]
  A* weights;             // [D, tokens, 6]
  A *gradients;           // of logits: [D, chunks, blocks, 3, L tokens]
  A* panel_sum;           // [padded P, 3, L]
  int64_t direction = 0;  // elements of `gradients`

  void place(Pieces& pieces, const Projected& call, const Grid<A>& grid, bool backward) {
    for (int64_t columns = 0; columns < 2; ++columns) {
      const Sweep sweep = orientation_sweep(call, grid, columns);
      const Chunks chunks(sweep, grid.L);
      const int64_t blocks = chunks.count(sweep) * chunks.blocks;
      turned[columns] = pieces.take<A>(blocks * grid.padded * grid.L);
      direction = blocks * 3 * grid.L > direction ? blocks * 3 * grid.L : direction;
    }
    weights = pieces.take<A>(call.directions * grid.tokens * kShared);
    if (!backward) return;
    gradients = pieces.take<A>(call.directions * direction);
    panel_sum = pieces.take<A>(grid.panel(3));
  }
};

// The tokens of one chunk.
static GSPN_INLINE int64_t chunk_tokens(const Chunks& chunks, const Sweep& sweep, int64_t chunk) {
  const int64_t left = sweep.lines - chunk * chunks.lines;
  return (left < chunks.lines ? left : chunks.lines) * sweep.positions;
}

// Proxies [tokens, padded P] as [chunks, blocks, padded P, L tokens]; behind a chunk's last token its first is repeated.
template <class A> static void turn_proxies(const Sweep& sweep, const A* proxy, int64_t padded, A* turned) {
  constexpr int L = kLanes<A>;
  const Chunks chunks(sweep, L);
  for (int64_t chunk = 0; chunk < chunks.count(sweep); ++chunk) {
    const int64_t tokens = chunk_tokens(chunks, sweep, chunk);
    const A* from = proxy + chunk * chunks.lines * sweep.positions * padded;
    for (int64_t b = 0; b * L < tokens; ++b)
      for (int64_t p = 0; p < padded; p += L) {
        Vector<A> square[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) square[j] = load_one(from + (b * L + j < tokens ? b * L + j : 0) * padded + p);
        transpose(square);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j)
          if (p + j < padded) store_one(turned + ((chunk * chunks.blocks + b) * padded + p + j) * L, square[j]);
      }
  }
}

// One direction's weights of all tokens, [tokens, 6], from a panel [padded P, 3].
template <class A>
static void compute_weights(const Sweep& sweep, const A* panel, const A* turned, int64_t proxies, int64_t padded, A* weights) {
  constexpr int L = kLanes<A>;
  const Chunks chunks(sweep, L);
  for (int64_t chunk = 0; chunk < chunks.count(sweep); ++chunk) {
    const int64_t tokens = chunk_tokens(chunks, sweep, chunk);
    int64_t position = 0;
    for (int64_t b = 0; b * L < tokens; ++b) {
      Vector<A> logits[3] = {}, minus, plus, values[kShared];
      const A* proxy = turned + (chunk * chunks.blocks + b) * padded * L;
      for (int64_t p = 0; p < proxies; ++p)
        for (int k = 0; k < 3; ++k) logits[k] = multiply_add(panel[p * 3 + k], load_one(proxy + p * L), logits[k]);
      for (int j = 0; j < L; ++j) {
        minus[j] = position > 0, plus[j] = position < sweep.positions - 1;
        position = position + 1 < sweep.positions ? position + 1 : 0;
      }
      const Vector<A> size = multiply_add(logits[2], logits[2], multiply_add(logits[1], logits[1], logits[0] * logits[0]));
      if (!all_at_most(size, Bounds<A>::lost * Bounds<A>::lost)) tame<A>(logits, minus, plus);
      const Propagation<A> w(logits, minus, plus);
      const Vector<A> sigmoids = w.sum / w.product;
      for (int k = 0; k < 3; ++k) {
        values[k] = w.numerator[k] * w.inverse;
        values[3 + k] = multiply_add(-values[k], sigmoids, all(A(1)));
      }
      for (int j = 0; j < L && b * L + j < tokens; ++j, weights += kShared)
        for (int k = 0; k < kShared; ++k) weights[k] = values[k][j];
    }
  }
}

// Join one direction's gradients of logits: into those of the proxies, and into `totals` [padded P, 3].
template <class A>
static void join_shared(const Chunks& chunks, const Sweep& sweep, const A* gradients, const A* panel, const A* turned,
                        int64_t padded, A* proxy_sums, A* panel_sum, A* totals, bool store) {
  constexpr int L = kLanes<A>;
  memset(panel_sum, 0, padded * 3 * kBytes);
  for (int64_t chunk = 0; chunk < chunks.count(sweep); ++chunk) {
    const int64_t first = chunk * chunks.blocks, blocks = (chunk_tokens(chunks, sweep, chunk) + L - 1) / L;
    add_proxy_gradients<3>(gradients + first * 3 * L, panel, blocks, padded, proxy_sums + first * padded * L);
    for (int64_t b = first; b < first + blocks; ++b) {
      const Vector<A> gradient[3] = {load_one(gradients + b * 3 * L), load_one(gradients + (b * 3 + 1) * L),
                                     load_one(gradients + (b * 3 + 2) * L)};
      for (int64_t p = 0; p < padded; ++p)
        for (int k = 0; k < 3; ++k) {
          A* sum = panel_sum + (p * 3 + k) * L;
          store_one(sum, multiply_add(gradient[k], load_one(turned + (b * padded + p) * L), load_one(sum)));
        }
    }
  }
  for (int64_t row = 0; row < padded * 3; ++row) {
    A sum = store ? 0 : totals[row];
    for (int j = 0; j < L; ++j) sum += panel_sum[row * L + j];
    totals[row] = sum;
  }
}

}  // namespace GSPN_ISA
}  // namespace gspn
