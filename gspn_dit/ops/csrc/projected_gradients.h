// The backward's tasks: gradients of a share of the channels for a share of the samples, and joining the shares.
#include "projected_tasks.h"

namespace gspn {
namespace GSPN_ISA {

template <class A> struct BackwardScratch {
  A *x, *grad_y, *grad_x, *kept, *passed, *gradients, *panel_sum, *transposed, *minus, *plus, *products;
  A* proxy_sums[2];  // rows, columns
  int64_t proxy_elements[2];
  SharedScratch<A> shared;

  int64_t place(char* memory, const Projected& call, const Grid<A>& grid, bool group) {
    Pieces pieces{memory};
    if (group) shared.place(pieces, call, grid, true);
    x = pieces.take<A>(kMostVectors * grid.plane);
    grad_y = pieces.take<A>(kMostVectors * grid.plane);
    grad_x = pieces.take<A>(kMostVectors * grid.plane);
    kept = pieces.take<A>((grid.tokens + 2 * grid.longest) * (group ? kKept<true> : kKept<false>) * grid.L);
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
    products = pieces.take<A>(kMatrices ? kTileRows * kProjected * grid.L : 0);
    return pieces.bytes;
  }
};

template <class A> static void add_all(A* to, const A* from, int64_t count, bool store) {
  for (int64_t j = 0; j < count; j += kLanes<A>)
    store_one(to + j, store ? load_one(from + j) : load_one(to + j) + load_one(from + j));
}

// One direction of one vector of channels: states, then gradients.
template <bool Shared, class T, class A>
static void differentiate(const Work<T>& work, const BackwardScratch<A>& scratch, int64_t batch, int64_t d, int64_t v,
                          int64_t plane, bool add, A* panel_total, bool first_sample) {
  const Grid<A>& grid = work.grid;
  const Sweep sweep = make_sweep(work.call, grid, work.call.direction[d]);
  Line<A> line =
      make_line(work, sweep, batch, d, v, scratch.x + plane, (A*)nullptr, scratch.minus, scratch.plus, scratch.products, add);
  if (Shared) line.weights = scratch.shared.weights + d * grid.tokens * kShared;
  scan_lines<true, Shared>(sweep, line, scratch.kept);
  memset(scratch.panel_sum, 0, grid.panel(work.projected) * sizeof(A));
  const ProductSums<A> sums = {scratch.panel_sum, scratch.proxy_sums[sweep.columns], scratch.transposed,
                               Shared ? scratch.shared.gradients + d * scratch.shared.direction : nullptr};
  reverse_lines<Shared>(sweep, line, scratch.grad_y + plane, scratch.grad_x + plane, scratch.kept, scratch.passed,
                        scratch.gradients, sums);
  add_all(panel_total, scratch.panel_sum, grid.panel(work.projected), first_sample);
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
  const ProductSums<A> sums = {scratch.panel_sum, scratch.proxy_sums[0], scratch.transposed, nullptr};
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

// Join the gradients of the logits that group `g` shares, once those of a share's channels are summed.
template <class T, class A>
static void differentiate_shared(const Work<T>& work, const BackwardScratch<A>& scratch, int64_t g, int64_t share, A* totals,
                                 bool first_sample) {
  const Grid<A>& grid = work.grid;
  for (int64_t d = 0; d < work.call.directions; ++d) {
    const Sweep sweep = make_sweep(work.call, grid, work.call.direction[d]);
    join_shared(Chunks(sweep, grid.L), sweep, scratch.shared.gradients + d * scratch.shared.direction, work.logit_panel(d, g),
                scratch.shared.turned[sweep.columns], grid.padded, scratch.proxy_sums[sweep.columns], scratch.shared.panel_sum,
                totals + work.logit_sum(d, g, share), first_sample);
  }
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
  const int64_t begin = work.share_begin(share), end = work.share_begin(share + 1), group = work.group;
  const int64_t first_sample = sample_share * call.batch / work.sample_shares;
  A* panel_sums = work.panel_sums + sample_share * work.panel_elements();
  A* skip_sums = work.skip_sums + sample_share * work.skip_elements();
  A* logit_sums = work.logit_sums + sample_share * work.logit_elements();
  BackwardScratch<A> scratch;
  scratch.place(memory, call, grid, group);
  [[maybe_unused]] TileShape shape;
  for (int64_t batch = first_sample; batch < (sample_share + 1) * call.batch / work.sample_shares; ++batch) {
    for (int64_t columns = 0; columns < 2; ++columns)
      memset(scratch.proxy_sums[columns], 0, scratch.proxy_elements[columns] * sizeof(A));
    if (group) turn_sample(work, scratch.shared, batch);
    for (int64_t v = begin; v < end; v += kMostVectors) {
      const int64_t count = end - v < kMostVectors ? end - v : kMostVectors;
      read_planes(grid, (const T*)call.x + batch * call.x_stride[0], call.x_stride + 1, v, count, scratch.x);
      read_planes(grid, (const T*)call.grad_y + batch * call.grad_y_stride[0], call.grad_y_stride + 1, v, count, scratch.grad_y);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t vector = v + j;
        if (group && (vector == begin || vector % group == 0)) {
          share_weights(work, scratch.shared, vector / group);
          memset(scratch.shared.gradients, 0, call.directions * scratch.shared.direction * sizeof(A));
        }
        bool add = call.skip_weight != nullptr;
        if (add)
          differentiate_skip(work, scratch, batch, vector, j * grid.plane, skip_sums + vector * grid.panel(1),
                             batch == first_sample);
        for (int64_t d = 0; d < call.directions; ++d, add = true)
          (group ? differentiate<true, T, A> : differentiate<false, T, A>)(
              work, scratch, batch, d, vector, j * grid.plane, add,
              panel_sums + (d * grid.vectors + vector) * grid.panel(work.projected), batch == first_sample);
        if (group && (vector + 1 == end || (vector + 1) % group == 0))
          differentiate_shared(work, scratch, vector / group, share, logit_sums, batch == first_sample);
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
  A* sum = skip ? work.skip_sums + (panel - panels) * grid.panel(1) : work.panel_sums + panel * grid.panel(work.projected);
  for (int64_t share = 1; share < work.sample_shares; ++share)
    add_all(sum, sum + share * (skip ? work.skip_elements() : work.panel_elements()), grid.panel(skip ? 1 : work.projected),
            false);
}

// The gradient of the logits' weight k of a direction that groups share: the sum over samples' shares and shares of channels.
template <class T> static void write_shared_weight(const Work<T>& work, int64_t d, int k, typename Work<T>::A* sum) {
  const Projected& call = work.call;
  const int64_t proxies = call.proxy_channels;
  for (int64_t g = 0; g < call.groups; ++g) {
    memset(sum, 0, proxies * sizeof(*sum));
    for (int64_t sample_share = 0; sample_share < work.sample_shares; ++sample_share)
      for (int64_t share = 0; share < work.shares; ++share) {
        if (work.share_begin(share + 1) <= g * work.group || work.share_begin(share) >= (g + 1) * work.group) continue;
        const auto* from = work.logit_sums + sample_share * work.logit_elements() + work.logit_sum(d, g, share) + k;
        for (int64_t p = 0; p < proxies; ++p) sum[p] += from[p * 3];
      }
    write_row(sum, proxies, (T*)call.grad_logits_weight + ((d * 3 + k) * call.groups + g) * proxies);
  }
}

// One of the five weights of a direction, or the skip's.
template <class T> static void write_task(const Work<T>& work, int64_t task, char* scratch) {
  typedef typename Work<T>::A A;
  const Grid<A>& grid = work.grid;
  A *row = (A*)scratch, *sum = row + grid.padded;
  const int64_t d = task / kProjected, q = task % kProjected;
  const A* panels = work.panel_sums + d * grid.vectors * grid.panel(work.projected);
  if (d == work.call.directions)
    write_weight<T, 1>(work.call, grid, Map::skip(work.call), 0, work.skip_sums, row, sum);
  else if (!work.group)
    work.products[task] = write_weight<T, kProjected>(work.call, grid, Map(work.call, d, q), q, panels, row, sum);
  else if (q >= kInputGate)
    work.products[task] = write_weight<T, kGates>(work.call, grid, Map(work.call, d, q), q - kInputGate, panels, row, sum);
  else
    write_shared_weight(work, d, q, sum);
}

}  // namespace GSPN_ISA
}  // namespace gspn
