// How a call of the projected scan is cut into tasks. Forward, a task computes a few vectors of channels of one sample. Backward, a
// task owns a share of the channels for some samples: the gradients of its weights, and its part of the proxies' gradient. Shares
// follow from the shape alone, and their sums are joined in a fixed order: bits do not depend on threads.
#include "projected_shared.h"

namespace gspn {
namespace GSPN_ISA {

constexpr int64_t kShares = 8;       // of the channels, at most
constexpr int64_t kMostVectors = 4;  // that a task reads at a time

template <class T> struct Work {
  typedef typename Accumulator<T>::type A;
  const Projected& call;
  Grid<A> grid;
  bool backward, orientation[2] = {false, false};  // rows, columns
  int64_t group;                                   // vectors of channels that share logits, or 0
  int64_t projected;                               // what a panel holds
  int64_t block;                                   // vectors of a forward task
  int64_t shares, sample_shares;                   // of the channels, of the batch
  A *panels, *skip_panels, *proxies;               // [D, V, P, 5 or 2, L], [V, P, 1, L], [B, 2, H W, P]
  A *logit_panels, *logit_sums;                    // shared: [D, G, P, 3], [sample shares, D, G + shares, P, 3]
  A *panel_sums, *skip_sums;                       // [sample shares, like the panels]
  A* proxy_sums;                                   // [B, shares, H W, P]
  double* products;                                // [D, 5]
  // With matrix instructions the forward's products read these in the place of panels and proxies.
  BFloat16 *panel_tiles, *proxy_tiles;  // [D, V, blocks, 5 or 2, 16, 32], [B, rows and columns, tiles of a line, blocks, 16, 32]

  Work(const Projected& call, bool backward) : call(call), grid(call), backward(backward) {
    for (int64_t d = 0; d < call.directions; ++d) orientation[make_sweep(call, grid, call.direction[d]).columns] = true;
    orientation[0] |= call.skip_weight != nullptr;
    const int64_t shared = call.channels / call.groups;
    group = shared % grid.L == 0 ? shared / grid.L : 0;
    projected = group ? kGates : kProjected;
    const int64_t busy = call.batch * grid.vectors / (4 * call.threads);
    block = call.block ? call.block : busy < 1 ? 1 : busy < kMostVectors ? busy : kMostVectors;
    if (!call.block && group && block > group) block -= block % group;
    shares = grid.vectors < kShares ? grid.vectors : kShares;
    // As many copies of the weights' gradients as take no more memory than x.
    sample_shares = call.batch * grid.tokens / (call.directions * projected * grid.padded);
    sample_shares = sample_shares < 1 ? 1 : sample_shares < call.batch ? sample_shares : call.batch;
    sample_shares = sample_shares < 8 ? sample_shares : 8;
  }
  bool panels_are_read() const { return backward || !kMatrices; }
  bool proxies_are_read() const { return panels_are_read() || group || call.skip_weight; }
  int64_t tile_elements() const { return tile_blocks(call.proxy_channels) * kTileElements; }
  int64_t row_tiles() const { return grid.height * line_tiles(grid.width); }
  int64_t column_tiles() const { return grid.width * line_tiles(grid.height); }
  int64_t panel_elements() const { return call.directions * grid.vectors * grid.panel(projected); }
  int64_t skip_elements() const { return call.skip_weight ? grid.vectors * grid.panel(1) : 0; }

  int64_t logit_elements() const { return group ? call.directions * (call.groups + shares) * grid.padded * 3 : 0; }
  // Where a share of the channels sums the logits of direction d and group g: from each pair of share and group that overlap to
  // the next, g + share grows.
  int64_t logit_sum(int64_t d, int64_t g, int64_t share) const {
    return (d * (call.groups + shares) + g + share) * grid.padded * 3;
  }
  int64_t share_begin(int64_t share) const { return share * grid.vectors / shares; }

  int64_t place(char* memory) {
    Pieces pieces{memory};
    panels = pieces.take<A>(panels_are_read() ? panel_elements() : 0);
    skip_panels = pieces.take<A>(skip_elements());
    logit_panels = pieces.take<A>(group ? call.directions * call.groups * grid.padded * 3 : 0);
    if (proxies_are_read())
      proxies = pieces.take<A>(call.batch * 2 * grid.tokens * grid.padded + grid.L);  // whole vectors are read of the last row
    if (kMatrices) {
      panel_tiles = pieces.take<BFloat16>(call.directions * grid.vectors * projected * tile_elements());
      proxy_tiles = pieces.take<BFloat16>(call.batch * (row_tiles() + column_tiles()) * tile_elements());
    }
    if (backward) {
      panel_sums = pieces.take<A>(sample_shares * panel_elements());
      skip_sums = pieces.take<A>(sample_shares * skip_elements());
      logit_sums = pieces.take<A>(sample_shares * logit_elements());
      proxy_sums = pieces.take<A>(call.batch * shares * grid.tokens * grid.padded);
      products = pieces.take<double>(call.directions * kProjected);
    }
    return pieces.bytes;
  }
  const A* panel(int64_t d, int64_t v) const { return panels + (d * grid.vectors + v) * grid.panel(projected); }
  const A* logit_panel(int64_t d, int64_t g) const { return logit_panels + (d * call.groups + g) * grid.padded * 3; }
  const A* proxies_of(int64_t batch, bool columns) const {
    return proxies + (batch * 2 + columns) * grid.tokens * grid.padded;
  }
  BFloat16* panel_tiles_of(int64_t d, int64_t v) const {
    return panel_tiles + (d * grid.vectors + v) * projected * tile_elements();
  }
  BFloat16* proxy_tiles_of(int64_t batch, bool columns) const {
    return proxy_tiles + (batch * (row_tiles() + column_tiles()) + (columns ? row_tiles() : 0)) * tile_elements();
  }
  int64_t packing_scratch() const {
    const int64_t rows = weight_scratch(grid) * sizeof(A), tiles = tile_elements() * sizeof(BFloat16);
    return kMatrices && tiles > rows ? tiles : rows;
  }
  int run(int64_t tasks, int64_t bytes, TaskFunction function) const {
    return run_tasks({call.threads, call.parallel}, tasks, bytes, function, this);
  }
};

// -- packing --

template <class T> static int64_t packing_tasks(const Work<T>& work) {
  return (work.call.directions + (work.call.skip_weight != nullptr)) * work.grid.vectors + 2 * work.call.batch +
         (work.group ? work.call.directions : 0);
}

template <class T> static void pack(const Work<T>& work, int64_t task, char* scratch) {
  typedef typename Work<T>::A A;
  const Projected& call = work.call;
  const Grid<A>& grid = work.grid;
  const int64_t panels = call.directions * grid.vectors, skips = call.skip_weight ? grid.vectors : 0;
  A* rows = (A*)scratch;
  if (task < panels) {
    const int64_t d = task / grid.vectors, v = task % grid.vectors;
    A* panel = work.panels + task * grid.panel(work.projected);
    const int first = kProjected - (int)work.projected;
    for (int q = first; q < kProjected; ++q) {
      const Map map(call, d, q);
      if (kMatrices)
        read_weight_tiles(call, grid, map, v, q - first, (int)work.projected, (BFloat16*)scratch, work.panel_tiles_of(d, v));
      if (!work.panels_are_read()) continue;
      if (work.group) read_weight<T, kGates>(call, grid, map, v, q - first, rows, panel);
      else read_weight<T, kProjected>(call, grid, map, v, q, rows, panel);
    }
  } else if (task < panels + skips) {
    const int64_t v = task - panels;
    read_weight<T, 1>(call, grid, Map::skip(call), v, 0, rows, work.skip_panels + v * grid.panel(1));
  } else if (task >= panels + skips + 2 * call.batch) {
    const int64_t d = task - panels - skips - 2 * call.batch;
    read_shared_weights<T>(call, grid, d, rows, work.logit_panels + d * call.groups * grid.padded * 3);
  } else {
    const int64_t batch = (task - panels - skips) / 2, columns = (task - panels - skips) % 2;
    if (!work.orientation[columns]) return;
    if (kMatrices) read_proxy_tiles(call, grid, batch, columns, work.proxy_tiles_of(batch, columns));
    if (work.proxies_are_read())
      read_proxies<T>(call, grid, batch, columns, work.proxies + (batch * 2 + columns) * grid.tokens * grid.padded);
  }
}

// -- forward --

template <class A> struct ForwardScratch {
  A *x, *y, *states, *minus, *plus, *products;
  SharedScratch<A> shared;

  int64_t place(char* memory, const Projected& call, const Grid<A>& grid, int64_t vectors, bool group) {
    Pieces pieces{memory};
    if (group) shared.place(pieces, call, grid, false);
    x = pieces.take<A>(vectors * grid.plane);
    y = pieces.take<A>(vectors * grid.plane);
    states = pieces.take<A>(2 * (grid.longest + 2) * grid.L);
    minus = pieces.take<A>(grid.longest);
    plus = pieces.take<A>(grid.longest);
    products = pieces.take<A>(kMatrices ? kTileRows * kProjected * grid.L : 0);
    return pieces.bytes;
  }
};

template <class A> static void mark_neighbours(int64_t positions, A* minus, A* plus) {
  for (int64_t n = 0; n < positions; ++n) minus[n] = n > 0, plus[n] = n < positions - 1;
}

// The weights that group `g` shares in all directions of a sample.
template <class T, class A> static void share_weights(const Work<T>& work, const SharedScratch<A>& scratch, int64_t g) {
  for (int64_t d = 0; d < work.call.directions; ++d) {
    const Sweep sweep = make_sweep(work.call, work.grid, work.call.direction[d]);
    compute_weights(sweep, work.logit_panel(d, g), scratch.turned[sweep.columns], work.call.proxy_channels, work.grid.padded,
                    scratch.weights + d * work.grid.tokens * kShared);
  }
}

// A sample's proxies, turned, in every orientation that its directions have.
template <class T, class A> static void turn_sample(const Work<T>& work, const SharedScratch<A>& scratch, int64_t batch) {
  for (int64_t columns = 0; columns < 2; ++columns)
    if (work.orientation[columns])
      turn_proxies(orientation_sweep(work.call, work.grid, columns), work.proxies_of(batch, columns), work.grid.padded,
                   scratch.turned[columns]);
}

// What the lines of a direction share, for vector `v` of the channels.
template <class T, class A>
static Line<A> make_line(const Work<T>& work, const Sweep& sweep, int64_t batch, int64_t d, int64_t v, const A* x, A* y, A* minus,
                         A* plus, A* products, bool add) {
  Line<A> line = {};
  line.panel = work.panel(d, v);
  line.proxy = work.proxies_of(batch, sweep.columns);
  line.x = x;
  line.y = y;
  line.step = sweep.position_step;
  line.minus = minus;
  line.plus = plus;
  line.positions = sweep.positions;
  line.proxies = work.call.proxy_channels;
  line.padded = work.grid.padded;
  line.add = add;
  if (kMatrices) {
    line.panel_tiles = work.panel_tiles_of(d, v);
    line.proxy_tiles = work.proxy_tiles_of(batch, sweep.columns);
    line.merge = (A)work.call.merge[d];
    line.products = products;
  }
  mark_neighbours(sweep.positions, minus, plus);
  return line;
}

// y = (W_s p) x for one vector of channels; with gradients, x's and [tokens, 1, L] those of W_s p too.
template <class A>
static void skip_tokens(const Grid<A>& grid, const A* panel, const A* proxy, int64_t proxies, const A* x, A* y, int64_t h,
                        const A* grad_y, A* gradients) {
  constexpr int tile = 8;
  for (int64_t w = 0; w < grid.width; w += tile) {
    const A* rows[tile];
    for (int j = 0; j < tile; ++j) rows[j] = proxy + (h * grid.width + (w + j < grid.width ? w + j : w)) * grid.padded;
    Vector<A> sum[tile][1];
    project<tile, 1, 1>(panel, rows, proxies, sum);
#pragma GCC unroll 8
    for (int j = 0; j < tile; ++j) {
      if (w + j >= grid.width) continue;
      const int64_t at = h * grid.pitch + (w + j) * grid.L;
      const Vector<A> other = load_one((grad_y ? grad_y : x) + at);
      store_one(y + at, sum[j][0] * other);
      if (grad_y) store_one(gradients + (w + j) * grid.L, other * load_one(x + at));
    }
  }
}

template <class T> static void forward_task(const Work<T>& work, int64_t task, char* memory) {
  typedef typename Work<T>::A A;
  const Projected& call = work.call;
  const Grid<A>& grid = work.grid;
  const int64_t blocks = (grid.vectors + work.block - 1) / work.block;
  // Panels that leave a cache between two samples are read for all samples in turn.
  const bool large = work.panel_elements() * (int64_t)sizeof(A) > (1 << 20);
  const int64_t batch = large ? task % call.batch : task / blocks;
  const int64_t first = (large ? task / call.batch : task % blocks) * work.block;
  const int64_t count = grid.vectors - first < work.block ? grid.vectors - first : work.block;
  ForwardScratch<A> scratch;
  scratch.place(memory, call, grid, work.block, work.group);
  if (work.group) turn_sample(work, scratch.shared, batch);
  [[maybe_unused]] TileShape shape;
  read_planes(grid, (const T*)call.x + batch * call.x_stride[0], call.x_stride + 1, first, count, scratch.x);
  for (int64_t v = 0; v < count; ++v) {
    const A* x = scratch.x + v * grid.plane;
    A* y = scratch.y + v * grid.plane;
    if (work.group && (v == 0 || (first + v) % work.group == 0))
      share_weights(work, scratch.shared, (first + v) / work.group);
    bool add = call.skip_weight != nullptr;
    for (int64_t h = 0; add && h < grid.height; ++h)
      skip_tokens<A>(grid, work.skip_panels + (first + v) * grid.panel(1), work.proxies_of(batch, false), call.proxy_channels, x,
                     y, h, nullptr, nullptr);
    for (int64_t d = 0; d < call.directions; ++d, add = true) {
      const Sweep sweep = make_sweep(call, grid, call.direction[d]);
      Line<A> line = make_line(work, sweep, batch, d, first + v, x, y, scratch.minus, scratch.plus, scratch.products,
                               add);
      if (work.group) {
        line.weights = scratch.shared.weights + d * grid.tokens * kShared;
        scan_lines<false, true>(sweep, line, scratch.states);
      } else {
        scan_lines<false, false>(sweep, line, scratch.states);
      }
    }
  }
  write_planes(grid, scratch.y, first, count, (T*)call.y + batch * grid.tokens * grid.channels);
}

template <class T> static int64_t forward_tasks(const Work<T>& work) {
  return work.call.batch * ((work.grid.vectors + work.block - 1) / work.block);
}

}  // namespace GSPN_ISA
}  // namespace gspn
