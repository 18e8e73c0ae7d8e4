// The backward's tasks: gradients of a share of the channels for a share of the samples, and joining the shares.
#include "projected_tasks.h"

namespace gspn {
namespace GSPN_ISA {

// The orientation of rows (0) or of columns (1), whatever the directions.
template <class A> static Sweep orientation_sweep(const Projected& call, const Grid<A>& grid, int64_t columns) {
  return make_sweep(call, grid, columns ? kRight : kDown);
}

template <class A> struct BackwardScratch {
  A *x, *grad_y, *grad_x, *kept, *passed, *gradients, *panel_sum, *transposed, *minus, *plus;
  A* proxy_sums[2];  // rows, columns
  int64_t proxy_elements[2];

  int64_t place(char* memory, const Projected& call, const Grid<A>& grid) {
    Pieces pieces{memory};
    x = pieces.take<A>(kMostVectors * grid.plane);
    grad_y = pieces.take<A>(kMostVectors * grid.plane);
    grad_x = pieces.take<A>(kMostVectors * grid.plane);
    kept = pieces.take<A>((grid.tokens + 2 * grid.longest) * kKept * grid.L);
    passed = pieces.take<A>(2 * (grid.longest + 2) * 3 * grid.L);
    int64_t blocks = 0;
    for (int64_t columns = 0; columns < 2; ++columns) {
      const Sweep sweep = orientation_sweep(call, grid, columns);
      const Chunks chunks(sweep, grid.L);
      proxy_elements[columns] = chunks.count(sweep) * chunks.blocks * grid.padded * grid.L;
      proxy_sums[columns] = pieces.take<A>(proxy_elements[columns]);
      blocks = chunks.blocks > blocks ? chunks.blocks : blocks;
    }
    gradients = pieces.take<A>(blocks * kProjected * grid.L * grid.L);
    transposed = pieces.take<A>(blocks * kProjected * grid.L * grid.L);
    panel_sum = pieces.take<A>(grid.panel(kProjected));
    minus = pieces.take<A>(grid.longest);
    plus = pieces.take<A>(grid.longest);
    return pieces.bytes;
  }
};

template <class A> static void add_all(A* to, const A* from, int64_t count, bool store) {
  for (int64_t j = 0; j < count; j += kLanes<A>)
    store_one(to + j, store ? load_one(from + j) : load_one(to + j) + load_one(from + j));
}

// One direction of one vector of channels: states, then gradients.
template <class T, class A>
static void differentiate(const Work<T>& work, const BackwardScratch<A>& scratch, int64_t batch, int64_t d, int64_t v,
                          int64_t plane, bool add, A* panel_total, bool first_sample) {
  const Grid<A>& grid = work.grid;
  const Sweep sweep = make_sweep(work.call, grid, work.call.direction[d]);
  const Line<A> line =
      make_line(work, sweep, batch, d, v, scratch.x + plane, (A*)nullptr, scratch.minus, scratch.plus, add);
  scan_lines<true>(sweep, line, scratch.kept);
  memset(scratch.panel_sum, 0, grid.panel(kProjected) * sizeof(A));
  const ProductSums<A> sums = {scratch.panel_sum, scratch.proxy_sums[sweep.columns], scratch.transposed};
  reverse_lines(sweep, line, scratch.grad_y + plane, scratch.grad_x + plane, scratch.kept, scratch.passed, scratch.gradients,
                sums);
  add_all(panel_total, scratch.panel_sum, grid.panel(kProjected), first_sample);
}

// The skip of one vector of channels.
template <class T, class A>
static void differentiate_skip(const Work<T>& work, const BackwardScratch<A>& scratch, int64_t batch, int64_t v, int64_t plane,
                               A* panel_total, bool first_sample) {
  const Grid<A>& grid = work.grid;
  const Sweep sweep = orientation_sweep(work.call, grid, 0);
  const Chunks chunks(sweep, grid.L);
  const A *panel = work.skip_panels + v * grid.panel(1), *proxy = work.proxies_of(batch, false);
  memset(scratch.panel_sum, 0, grid.panel(1) * sizeof(A));
  const ProductSums<A> sums = {scratch.panel_sum, scratch.proxy_sums[0], scratch.transposed};
  for (int64_t first = 0; first < grid.height; first += chunks.lines) {
    const int64_t lines = grid.height - first < chunks.lines ? grid.height - first : chunks.lines;
    for (int64_t h = first; h < first + lines; ++h)
      skip_tokens<A>(grid, panel, proxy, work.call.proxy_channels, scratch.x + plane, scratch.grad_x + plane, h,
                     scratch.grad_y + plane, scratch.gradients + (h - first) * grid.width * grid.L);
    join_chunk<1>(sums, panel, proxy + first * grid.width * grid.padded, grid.padded, chunks, first / chunks.lines,
                  lines * grid.width, scratch.gradients);
  }
  add_all(panel_total, scratch.panel_sum, grid.panel(1), first_sample);
}

// [tokens, P] of one sample, the sum over its rows' and columns' [chunks, blocks, P, L].
template <class T, class A>
static void gather_proxy_sums(const Work<T>& work, const BackwardScratch<A>& scratch, A* to) {
  const Grid<A>& grid = work.grid;
  const int64_t padded = grid.padded;
  bool add = false;
  for (int64_t columns = 0; columns < 2; ++columns) {
    if (!work.orientation[columns]) continue;
    const Sweep sweep = orientation_sweep(work.call, grid, columns);
    const Chunks chunks(sweep, grid.L);
    for (int64_t i = 0; i < sweep.lines; ++i)
      for (int64_t n = 0; n < sweep.positions; ++n) {
        const int64_t within = i % chunks.lines * sweep.positions + n;
        const A* from = scratch.proxy_sums[columns] + within % grid.L +
                        (i / chunks.lines * chunks.blocks + within / grid.L) * padded * grid.L;
        A* token = to + (columns ? n * grid.width + i : i * grid.width + n) * padded;
        for (int64_t p = 0; p < padded; ++p) token[p] = (add ? token[p] : 0) + from[p * grid.L];
      }
    add = true;
  }
}

template <class T> static void backward_task(const Work<T>& work, int64_t task, char* memory) {
  typedef typename Work<T>::A A;
  const Projected& call = work.call;
  const Grid<A>& grid = work.grid;
  const int64_t share = task % work.shares, sample_share = task / work.shares;
  const int64_t begin = share * grid.vectors / work.shares, end = (share + 1) * grid.vectors / work.shares;
  const int64_t first_sample = sample_share * call.batch / work.sample_shares;
  A* panel_sums = work.panel_sums + sample_share * work.panel_elements();
  A* skip_sums = work.skip_sums + sample_share * work.skip_elements();
  BackwardScratch<A> scratch;
  scratch.place(memory, call, grid);
  for (int64_t batch = first_sample; batch < (sample_share + 1) * call.batch / work.sample_shares; ++batch) {
    for (int64_t columns = 0; columns < 2; ++columns)
      memset(scratch.proxy_sums[columns], 0, scratch.proxy_elements[columns] * sizeof(A));
    for (int64_t v = begin; v < end; v += kMostVectors) {
      const int64_t count = end - v < kMostVectors ? end - v : kMostVectors;
      read_planes(grid, (const T*)call.x + batch * call.x_stride[0], call.x_stride + 1, v, count, scratch.x);
      read_planes(grid, (const T*)call.grad_y + batch * call.grad_y_stride[0], call.grad_y_stride + 1, v, count, scratch.grad_y);
      for (int64_t j = 0; j < count; ++j) {
        bool add = call.skip_weight != nullptr;
        if (add)
          differentiate_skip(work, scratch, batch, v + j, j * grid.plane, skip_sums + (v + j) * grid.panel(1),
                             batch == first_sample);
        for (int64_t d = 0; d < call.directions; ++d, add = true)
          differentiate(work, scratch, batch, d, v + j, j * grid.plane, add,
                        panel_sums + (d * grid.vectors + v + j) * grid.panel(kProjected), batch == first_sample);
      }
      write_planes(grid, scratch.grad_x, v, count, (T*)call.grad_x + batch * grid.tokens * grid.channels);
    }
    gather_proxy_sums(work, scratch, work.proxy_sums + (batch * work.shares + share) * grid.tokens * grid.padded);
  }
}

// -- joining the shares --

// A sample's proxies, or the panels of one direction and vector (behind the directions', the skip's).
template <class T> static void join_task(const Work<T>& work, int64_t task, char*) {
  typedef typename Work<T>::A A;
  const Projected& call = work.call;
  const Grid<A>& grid = work.grid;
  if (task < call.batch) {
    const int64_t size = grid.tokens * grid.padded;
    A* sum = work.proxy_sums + task * work.shares * size;
    for (int64_t share = 1; share < work.shares; ++share)
      for (int64_t j = 0; j < size; ++j) sum[j] += sum[share * size + j];
    for (int64_t token = 0; token < grid.tokens; ++token)
      write_row(sum + token * grid.padded, call.proxy_channels,
                (T*)call.grad_proxy + (task * grid.tokens + token) * call.proxy_channels);
    return;
  }
  const int64_t panel = task - call.batch, panels = call.directions * grid.vectors;
  const bool skip = panel >= panels;
  A* sum = skip ? work.skip_sums + (panel - panels) * grid.panel(1) : work.panel_sums + panel * grid.panel(kProjected);
  for (int64_t share = 1; share < work.sample_shares; ++share)
    add_all(sum, sum + share * (skip ? work.skip_elements() : work.panel_elements()), grid.panel(skip ? 1 : kProjected), false);
}

// One of the five weights of a direction, or the skip's.
template <class T> static void write_task(const Work<T>& work, int64_t task, char* scratch) {
  typedef typename Work<T>::A A;
  const Grid<A>& grid = work.grid;
  A *row = (A*)scratch, *sum = row + grid.padded;
  const int64_t d = task / kProjected, q = task % kProjected;
  if (d == work.call.directions)
    write_weight<T, 1>(work.call, grid, Map::skip(work.call), 0, work.skip_sums, row, sum);
  else
    work.products[task] = write_weight<T, kProjected>(work.call, grid, Map(work.call, d, q), q,
                                                      work.panel_sums + d * grid.vectors * grid.panel(kProjected), row, sum);
}

}  // namespace GSPN_ISA
}  // namespace gspn
