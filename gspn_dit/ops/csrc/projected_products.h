// The matrix products of the projected scan, in tiles whose sums stay in registers. A panel holds Q weights of one vector of
// channels: [P, Q, L]; proxies of a line lie as [N, P], with `padded` P.
#include "projected_lanes.h"

namespace gspn {
namespace GSPN_ISA {

#if defined(__AVX512F__)
constexpr int kPositions = 4, kWeightRows = 4, kProxyRows = 12;  // 32 registers
#else
constexpr int kPositions = 2, kWeightRows = 2, kProxyRows = 4;  // 16 registers
#endif

// Rows of proxies, and of everything with a row for each, are padded with zeros to a multiple of this.
constexpr int kProxyPadding = 4;

// sum[j][q] = Σ_p panel[p][q] proxy[j][p], the first Q weights of a panel of `Of`.
template <int Positions, int Q, int Of, class A>
static GSPN_INLINE void project(const A* panel, const A* const* proxy, int64_t proxies, Vector<A> (&sum)[Positions][Q]) {
#pragma GCC unroll 8
  for (int j = 0; j < Positions; ++j)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) sum[j][q] = Vector<A>{};
  for (int64_t p = 0; p < proxies; ++p, panel += Of * kLanes<A>) {
    Vector<A> weight[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) weight[q] = load_one(panel + q * kLanes<A>);
#pragma GCC unroll 8
    for (int j = 0; j < Positions; ++j)
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum[j][q] = multiply_add(proxy[j][p], weight[q], sum[j][q]);
  }
}

// sums[p][q] += Σ_token gradients[token][q] proxy[token][p] for `Rows` p.
template <int Rows, int Q, class A>
static GSPN_INLINE void add_weight_rows(const A* gradients, const A* proxy, int64_t padded, int64_t tokens, A* sums) {
  constexpr int L = kLanes<A>;
  Vector<A> sum[Rows][Q] = {};
  for (int64_t token = 0; token < tokens; ++token, gradients += Q * L, proxy += padded) {
    Vector<A> gradient[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) gradient[q] = load_one(gradients + q * L);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum[r][q] = multiply_add(proxy[r], gradient[q], sum[r][q]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q, sums += L) store_one(sums, load_one(sums) + sum[r][q]);
}

// The gradient of a panel, from those of what it projected: [tokens, Q, L]. Few tokens at a time, so that a sum over many is one
// of partial sums, which rounds less.
template <int Q, class A>
static void add_weight_gradients(const A* gradients, const A* proxy, int64_t padded, int64_t tokens, A* sums) {
  constexpr int Rows = Q > 1 ? kWeightRows : 4;
  for (int64_t p = 0; p < padded; p += Rows)
    add_weight_rows<Rows, Q>(gradients, proxy + p, padded, tokens, sums + p * Q * kLanes<A>);
}

// sums[p][block] += Σ_row panel[p][row] gradients[block][row] for `Rows` p and `Blocks` blocks of L tokens.
template <int Rows, int Blocks, int64_t Length, class A>
static GSPN_INLINE void add_proxy_rows(const A* gradients, const A* panel, A* sums, int64_t block_stride) {
  constexpr int L = kLanes<A>;
  Vector<A> sum[Rows][Blocks] = {};
  for (int64_t row = 0; row < Length; ++row) {
    Vector<A> gradient[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) gradient[b] = load_one(gradients + (b * Length + row) * L);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) sum[r][b] = multiply_add(panel[r * Length + row], gradient[b], sum[r][b]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      A* to = sums + b * block_stride + r * L;
      store_one(to, load_one(to) + sum[r][b]);
    }
}

template <int Rows, int64_t Length, class A>
static GSPN_INLINE void add_proxy_blocks(const A* gradients, const A* panel, int64_t blocks, int64_t padded, A* sums) {
  constexpr int L = kLanes<A>;
  const int64_t stride = padded * L;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2)
    add_proxy_rows<Rows, 2, Length>(gradients + b * Length * L, panel, sums + b * stride, stride);
  if (b < blocks) add_proxy_rows<Rows, 1, Length>(gradients + b * Length * L, panel, sums + b * stride, stride);
}

// The gradient of the proxies, [blocks, P, L], from transposed gradients [blocks, Length, L tokens] of what a panel projected.
template <int64_t Length, class A>
static void add_proxy_gradients(const A* transposed, const A* panel, int64_t blocks, int64_t padded, A* sums) {
  int64_t p = 0;
  for (; p + kProxyRows <= padded; p += kProxyRows)
    add_proxy_blocks<kProxyRows, Length>(transposed, panel + p * Length, blocks, padded, sums + p * kLanes<A>);
  for (; p < padded; p += kProxyPadding)
    add_proxy_blocks<kProxyPadding, Length>(transposed, panel + p * Length, blocks, padded, sums + p * kLanes<A>);
}

// Gradients [tokens, Q, L] as [blocks, Q, L, L tokens]; tokens behind the last are those of a last whole block.
template <int Q, class A> static void transpose_gradients(const A* gradients, int64_t blocks, A* transposed) {
  constexpr int L = kLanes<A>;
  for (int64_t b = 0; b < blocks; ++b)
    for (int q = 0; q < Q; ++q) {
      Vector<A> rows[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) rows[j] = load_one(gradients + ((b * L + j) * Q + q) * L);
      transpose(rows);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) store_one(transposed + ((b * Q + q) * L + j) * L, rows[j]);
    }
}

}  // namespace GSPN_ISA
}  // namespace gspn
