// Included by kernels.h. Per direction, the states are computed again and kept for the block; then the lines are walked in the
// opposite order with dh[i, n] = m u g + sum_k w_k[i+1, n-k] dh[i+1, n-k], whose second part each position of line i+1 adds
// to the `carried` line as it is visited.

template <class T> struct BackwardPointers {
  typedef typename Accumulator<T>::type A;
  const T *x, *grad_y, *weight_logits, *input_gate, *output_gate;
  const A *state, *before, *carried;  // `before`: the previous line's states at n - 1
  A* passed;                          // the carried line for the line visited before, at n - 1
  A* merge_sums;
  T *grad_weight_logits, *grad_input_gate, *grad_output_gate, *grad_x;
  A* partial;
  int64_t k_stride, grad_k_stride, slot, width;  // slot: from one position's states to the next one's
};

// How the gradients of the per-channel weights are computed: from the logits again, or from what `compute_states` kept.
enum Source { kLogits, kKept, kShared };

// Behind a position's states lie w_0, w_2 and the sum of the three sigmoids, `width` apart.
constexpr int kKeptPlanes = 4;

template <class A> struct KeptWeights {
  typename Simd<A>::V w[3], total;
  GSPN_INLINE KeptWeights(const A* state, int64_t width) {
    w[0] = load(state + width);
    w[2] = load(state + 2 * width);
    w[1] = A(1) - w[0] - w[2];
    total = load(state + 3 * width);
  }
  GSPN_INLINE auto s(int k) const { return one_minus(w[k], total); }
};

// What both kinds of lines share: dh, and the gradients of x, the gates and the merge weight.
template <class T, bool Tail>
static GSPN_INLINE auto gate_gradients(const BackwardPointers<T>& p, int64_t j, int64_t count,
                                       typename Accumulator<T>::type merge, bool add, bool last) {
  typedef typename Accumulator<T>::type A;
  typedef typename Simd<A>::V V;
  const V g = get<T, Tail>(p.grad_y + j, count), output_gate = get<T, Tail>(p.output_gate + j, count);
  const V state = load(p.state + j);
  const V weighted = g * state;
  store(p.merge_sums + j, multiply_add(weighted, output_gate, load(p.merge_sums + j)));
  put<T, Tail>(p.grad_output_gate + j, weighted * merge, count);
  const V gradient = multiply_add(output_gate * merge, g, load(p.carried + j));
  put<T, Tail>(p.grad_input_gate + j, get<T, Tail>(p.x + j, count) * gradient, count);
  add_up<T, Tail>(p.grad_x + j, p.partial + j, get<T, Tail>(p.input_gate + j, count) * gradient, count, add, last);
  return gradient;
}

// A first line of a segment: no logit is used, nothing is passed on.
template <class T, bool Tail>
static GSPN_INLINE void backward_start_vector(const BackwardPointers<T>& p, int64_t j, int64_t count, bool shared,
                                              typename Accumulator<T>::type merge, bool add, bool last) {
  typedef typename Simd<typename Accumulator<T>::type>::V V;
  gate_gradients<T, Tail>(p, j, count, merge, add, last);
  if (shared) return;
  const V zero = {};
  for (int k = 0; k < 3; ++k) put<T, Tail>(p.grad_weight_logits + k * p.grad_k_stride + j, zero, count);
}

template <class T, bool Edge, Source source, bool Tail>
static GSPN_INLINE void backward_vector(const BackwardPointers<T>& p, int64_t j, int64_t count,
                                        typename Accumulator<T>::type merge, bool minus, bool plus,
                                        const SharedLine<typename Accumulator<T>::type>& line, bool add, bool last) {
  typedef typename Accumulator<T>::type A;
  typedef typename Simd<A>::V V;
  const V gradient = gate_gradients<T, Tail>(p, j, count, merge, add, last);
  const A* before = p.before + j;
  V passed[3];
  if constexpr (source == kShared) {
    for (int k = 0; k < 3; ++k) {
      passed[k] = load(line.we + k * p.width + j) * gradient;
      put<A, Tail>(line.dw + k * p.width + j, gradient * load(before + k * p.slot), count);
    }
  } else {
    // The gradient of logit k is w_k s_k dh (h[i-1, n+k] - sum_j w_j h[i-1, n+j]).
    V mean, s[3];
    if constexpr (source == kKept) {
      const KeptWeights<A> value(p.state + j, p.width);
      mean = weighted_sum(value.w, load(before), load(before + p.slot), load(before + 2 * p.slot));
      for (int k = 0; k < 3; ++k) passed[k] = value.w[k] * gradient, s[k] = value.s(k);
    } else {
      const T* l = p.weight_logits + j;
      const auto value = weights<A, true, Edge, in_place<T>()>(
          get<T, Tail>(l, count), get<T, Tail>(l + p.k_stride, count), get<T, Tail>(l + 2 * p.k_stride, count), minus, plus);
      const V scaled = gradient * value.inverse;
      mean = weighted_sum(value.p, load(before), load(before + p.slot), load(before + 2 * p.slot)) * value.inverse;
      for (int k = 0; k < 3; ++k) passed[k] = value.p[k] * scaled, s[k] = value.s(k);
    }
    for (int k = 0; k < 3; ++k) {
      V result = passed[k] * s[k] * (load(before + k * p.slot) - mean);
      if (Edge && ((k == 0 && !minus) || (k == 2 && !plus))) result = V{};  // even where a NaN is about
      put<T, Tail>(p.grad_weight_logits + k * p.grad_k_stride + j, result, count);
    }
  }
  // Positions come in ascending order: n + 1 is touched for the first time here, n only at the start of the line.
  A* to = p.passed + j;
  if (!Edge || minus) {
    store(to, load(to) + passed[0]);
    store(to + p.width, load(to + p.width) + passed[1]);
  } else {
    store(to + p.width, passed[1]);
  }
  if (!Edge || plus) store(to + 2 * p.width, passed[2]);
}

template <class T, Source source>
static GSPN_INLINE void prefetch_position(const BackwardPointers<T>& p, const Ahead& ahead, int64_t j) {
  if (sizeof(T) < 4 && j % (64 / (int64_t)sizeof(T))) return;
  prefetch(p.x + ahead.x + j);
  prefetch(p.grad_y + ahead.grad_y + j);
  for (int k = 0; k < 3 && source == kLogits; ++k) prefetch(p.weight_logits + k * p.k_stride + ahead.weight_logits + j);
  prefetch(p.input_gate + ahead.input_gate + j);
  prefetch(p.output_gate + ahead.output_gate + j);
  if (in_place<T>()) prefetch(p.grad_x + ahead.sum + j);
  else prefetch(p.partial + ahead.partial + j), prefetch(p.partial + ahead.partial + j + 16);
}

template <class T, bool Edge, Source source>
static GSPN_INLINE void backward_position(const BackwardPointers<T>& p, const Ahead& ahead, int64_t channels,
                                          typename Accumulator<T>::type merge, bool minus, bool plus,
                                          const SharedLine<typename Accumulator<T>::type>& line, bool add, bool last) {
  constexpr int L = Simd<typename Accumulator<T>::type>::lanes;
  int64_t j = 0;
  for (; j + L <= channels; j += L) {
    prefetch_position<T, source>(p, ahead, j);
    backward_vector<T, Edge, source, false>(p, j, L, merge, minus, plus, line, add, last);
  }
  if (j < channels) backward_vector<T, Edge, source, true>(p, j, channels - j, merge, minus, plus, line, add, last);
}

// The same past the caches: gradients go into a corner of the L1 cache first and from there to memory, one tensor after the
// other, because the processor combines such stores only as long as few streams take turns.
template <class T, Source source>
static GSPN_INLINE void stream_position(const BackwardPointers<T>& p, const Ahead& ahead, int64_t channels,
                                        typename Accumulator<T>::type merge,
                                        const SharedLine<typename Accumulator<T>::type>& line, bool add, bool last) {
  constexpr int L = Simd<typename Accumulator<T>::type>::lanes;
  constexpr int64_t piece = 512 / sizeof(T);
  alignas(64) T corner[5 * piece + L];
  BackwardPointers<T> q = p;
  for (int64_t begin = 0; begin < channels; begin += piece) {
    const int64_t end = begin + piece < channels ? begin + piece : channels, bytes = (end - begin) * sizeof(T);
    if (source != kShared) q.grad_weight_logits = corner - begin, q.grad_k_stride = piece;
    q.grad_input_gate = corner + 3 * piece - begin;
    q.grad_output_gate = corner + 4 * piece - begin;
    for (int64_t j = begin; j < end; j += L) {
      prefetch_position<T, source>(p, ahead, j);
      backward_vector<T, false, source, false>(q, j, L, merge, true, true, line, add, last);
    }
    for (int k = 0; k < 3 && source != kShared; ++k)
      copy_past_caches(p.grad_weight_logits + k * p.grad_k_stride + begin, corner + k * piece, bytes);
    copy_past_caches(p.grad_input_gate + begin, corner + 3 * piece, bytes);
    copy_past_caches(p.grad_output_gate + begin, corner + 4 * piece, bytes);
  }
}

template <class T> static GSPN_INLINE void backward_start(const BackwardPointers<T>& p, int64_t channels, bool shared,
                                                          typename Accumulator<T>::type merge, bool add, bool last) {
  constexpr int L = Simd<typename Accumulator<T>::type>::lanes;
  int64_t j = 0;
  for (; j + L <= channels; j += L) backward_start_vector<T, false>(p, j, L, shared, merge, add, last);
  if (j < channels) backward_start_vector<T, true>(p, j, channels - j, shared, merge, add, last);
}

// Sum dw over the channels of each group and write the gradients of the group's logits at one position.
template <class A, class Out>
static void group_gradients(const SharedLine<A>& line, int64_t n, int64_t channels, Lines<Out> grads, int64_t k_stride,
                            int64_t i, bool minus, bool plus) {
  const int64_t stride = padded(channels);
  for (int64_t g = 0; g < line.groups; ++g) {
    A of_weight[3], mean = 0;
    for (int k = 0; k < 3; ++k) {
      const bool valid = (k != 0 || minus) && (k != 2 || plus);
      of_weight[k] = 0;
      const A* from = line.dw + k * stride + g * line.size;
      constexpr int L = Simd<A>::lanes;
      typename Simd<A>::V sum = {};
      int64_t j = 0;
      for (; j + L <= line.size; j += L) sum += load(from + j);
      if (j < line.size) sum += load_some(from + j, line.size - j);
      if (valid) of_weight[k] = lane_sum(sum);
      mean += line.w[k * line.plane + n * line.groups + g] * of_weight[k];
    }
    for (int k = 0; k < 3; ++k) {
      const bool valid = (k != 0 || minus) && (k != 2 || plus);
      const int64_t at = k * line.plane + n * line.groups + g;
      typename Simd<A>::V result = {};
      if (valid) result = result + line.w[at] * line.s[at] * (of_weight[k] - mean);
      store_some(grads.at(i, n) + k * k_stride + g, result, 1);
    }
  }
}

template <class A, class Out>
static void clear_group_gradients(const SharedLine<A>& line, Lines<Out> grads, int64_t k_stride, int64_t i, int64_t n) {
  for (int k = 0; k < 3; ++k) memset(grads.at(i, n) + k * k_stride, 0, sizeof(Out) * line.groups);
}

template <class T> struct BackwardViews {
  typedef typename Accumulator<T>::type A;
  Lines<const T> x, grad_y, input_gate, output_gate, weight_logits;
  Sum<T> grad_x;
  Lines<T> grad_input_gate, grad_output_gate, grad_weight_logits;
  Lines<A> logit_parts;
  int64_t k_stride;

  BackwardViews(const Scan& scan, const Plan& plan, const Block& block, const Geometry& geometry, int64_t d,
                A* partial_plane)
      : grad_x(geometry, scan, plan, block, d, scan.grad_x, partial_plane) {
    const int64_t channels = scan.channels, groups = scan.groups, D = scan.directions;
    const int64_t group = block.channel * groups / channels;
    x = view3<T>(geometry, block, scan.x, scan.x_stride);
    grad_y = view3<T>(geometry, block, scan.grad_y, scan.grad_y_stride);
    input_gate = view4<T>(geometry, block, d, scan.input_gate, scan.input_gate_stride);
    output_gate = view4<T>(geometry, block, d, scan.output_gate, scan.output_gate_stride);
    weight_logits = view4<T>(geometry, Block{block.batch, group, 0, 0, 0}, d, scan.weight_logits, scan.weight_logits_stride);
    grad_input_gate = output<T>(geometry, scan, block, scan.grad_input_gate, D * channels, d * channels + block.channel);
    grad_output_gate = output<T>(geometry, scan, block, scan.grad_output_gate, D * channels, d * channels + block.channel);
    grad_weight_logits = output<T>(geometry, scan, block, scan.grad_weight_logits, D * 3 * groups, d * 3 * groups + group);
    const int64_t plane = scan.batch * scan.height * scan.width * D * 3 * groups;
    logit_parts = output<A>(geometry, scan, block, plan.logit_parts, D * 3 * groups,
                            block.part * plane + d * 3 * groups + group);
    k_stride = scan.weight_logits_stride[4];
  }
};

template <Source source> constexpr int64_t slot_width(int64_t width) { return source == kKept ? kKeptPlanes * width : width; }

template <class T, bool Edge, Source source, bool Tail, class A>
static GSPN_INLINE void keep_state(A* to, const T* x, const T* input_gate, const T* weight_logits, int64_t k_stride,
                                   const A* before, int64_t slot, int64_t width, const A* we, int64_t count, bool minus,
                                   bool plus) {
  if constexpr (source == kKept) {
    const auto value = weights_at<T, true, Edge, Tail>(weight_logits, k_stride, count, minus, plus);
    const auto w0 = value.w(0), w1 = value.w(1), w2 = value.w(2);
    auto sum = multiply_add(w0, load(before), get<T, Tail>(input_gate, count) * get<T, Tail>(x, count));
    sum = multiply_add(w1, load(before + slot), sum);
    store(to, multiply_add(w2, load(before + 2 * slot), sum));
    store(to + width, w0);
    store(to + 2 * width, w2);
    store(to + 3 * width, (value.p[0] + value.p[1] + value.p[2]) * value.of_product);
  } else {
    store(to, next_state<T, Edge, source == kShared, Tail>(x, input_gate, weight_logits, k_stride, before, slot, we, width,
                                                           count, minus, plus));
  }
}

// The states of every line of one direction: [lines, N + 2, slot].
template <class T, Source source>
static void compute_states(const Geometry& geometry, const Block& block, const BackwardViews<T>& view,
                           SharedLine<typename Accumulator<T>::type>& line, typename Accumulator<T>::type* states) {
  typedef typename Accumulator<T>::type A;
  constexpr int L = Simd<A>::lanes;
  const int64_t width = padded(block.channels), slot = slot_width<source>(width), positions = geometry.positions;
  const int64_t size = (positions + 2) * slot, channels = block.channels, k_stride = view.k_stride;
  const A* before = nullptr;
  for (int64_t step = 0; step < geometry.lines; ++step) {
    const int64_t i = geometry.index(step);
    const int64_t next = step + 1 < geometry.lines ? geometry.index(step + 1) : i;
    const bool restart = geometry.restarts(i);
    A* state = states + i * size;
    clear(state, width);
    clear(state + (positions + 1) * slot, width);
    if (source == kShared && !restart) shared_weights<T, false>(line, view.weight_logits, k_stride, i, positions);
    for (int64_t n = 0; n < positions; ++n) {
      const T *gate = view.input_gate.at(i, n), *x = view.x.at(i, n), *l = view.weight_logits.at(i, n);
      const A* from = before + n * slot;
      A* to = state + (n + 1) * slot;
      const bool here = n + 1 < positions;
      const int64_t ii = here ? i : next, nn = here ? n + 1 : 0;
      const T *next_gate = view.input_gate.at(ii, nn), *next_x = view.x.at(ii, nn), *next_l = view.weight_logits.at(ii, nn);
      const bool minus = n > 0, plus = n < positions - 1;
      if (source == kShared && !restart) repeat_groups(line, n, channels);
      for (int64_t j = 0; j < channels; j += L) {
        if (sizeof(T) >= 4 || j % (64 / (int64_t)sizeof(T)) == 0) {
          prefetch(next_gate + j);
          prefetch(next_x + j);
          for (int q = 0; q < 3; ++q) prefetch(next_l + q * k_stride + j);
        }
        const int64_t count = channels - j;
        if (restart)
          store(to + j, count < L ? load_some(gate + j, count) * load_some(x + j, count) : load(gate + j) * load(x + j));
        else if (count < L)
          keep_state<T, true, source, true>(to + j, x + j, gate + j, l + j, k_stride, from + j, slot, width, line.we + j, count,
                                            minus, plus);
        else if (minus && plus)
          keep_state<T, false, source, false>(to + j, x + j, gate + j, l + j, k_stride, from + j, slot, width, line.we + j, L,
                                              true, true);
        else
          keep_state<T, true, source, false>(to + j, x + j, gate + j, l + j, k_stride, from + j, slot, width, line.we + j, L,
                                             minus, plus);
      }
    }
    before = state;
  }
}

template <class T, Source source>
static void backward_direction(const Scan& scan, const Plan& plan, const Block& block, int64_t d,
                               typename Accumulator<T>::type* states, typename Accumulator<T>::type* carries,
                               SharedLine<typename Accumulator<T>::type> line,
                               typename Accumulator<T>::type* merge_sums,
                               typename Accumulator<T>::type* partial_plane) {
  typedef typename Accumulator<T>::type A;
  const Geometry geometry(scan, d);
  const BackwardViews<T> view(scan, plan, block, geometry, d, partial_plane);
  compute_states<T, source>(geometry, block, view, line, states);
  constexpr bool shared = source == kShared;
  const int64_t positions = geometry.positions, width = padded(block.channels), size = (positions + 2) * width;
  const int64_t slot = slot_width<source>(width), states_size = (positions + 2) * slot;
  const int64_t groups = scan.groups;
  const bool add = block.share == 0 && d > 0, last = plan.shares == 1 && d == scan.directions - 1;
  const A merge = merge_weight<A>(scan, d);
  double* merge_total = plan.merge_sums + (block.batch * scan.directions + d) * scan.channels + block.channel;
  for (int64_t c = 0; c < block.channels; ++c) merge_total[c] = 0;
  A *carried = carries, *passed = carries + size;
  bool none_carried = true;
  for (int64_t step = geometry.lines - 1; step >= 0; --step) {
    const int64_t i = geometry.index(step), before = step > 0 ? geometry.index(step - 1) : i;
    const bool restart = geometry.restarts(i);
    if (none_carried) clear(carried, size);
    clear(merge_sums, width);
    if (shared && !restart) shared_weights<T, true>(line, view.weight_logits, view.k_stride, i, positions);
    for (int64_t n = 0; n < positions; ++n) {
      BackwardPointers<T> p;
      p.x = view.x.at(i, n);
      p.grad_y = view.grad_y.at(i, n);
      p.input_gate = view.input_gate.at(i, n);
      p.output_gate = view.output_gate.at(i, n);
      p.state = states + i * states_size + (n + 1) * slot;
      p.carried = carried + (n + 1) * width;
      p.weight_logits = view.weight_logits.at(i, n);
      p.before = states + before * states_size + n * slot;
      p.passed = passed + n * width;
      p.grad_weight_logits = view.grad_weight_logits.at(i, n);
      p.k_stride = view.k_stride;
      p.grad_k_stride = groups;
      p.slot = slot;
      p.width = width;
      p.merge_sums = merge_sums;
      p.grad_input_gate = view.grad_input_gate.at(i, n);
      p.grad_output_gate = view.grad_output_gate.at(i, n);
      p.grad_x = view.grad_x.result.at(i, n);
      p.partial = view.grad_x.partial.at(i, n);
      if (restart) {
        backward_start<T>(p, block.channels, shared, merge, add, last);
        if (shared && plan.parts > 1) clear_group_gradients(line, view.logit_parts, groups, i, n);
        else if (shared) clear_group_gradients(line, view.grad_weight_logits, groups, i, n);
        continue;
      }
      const int64_t distance = block.channels * (int64_t)sizeof(T) < 512 ? 2 : 1;
      const bool here = n + distance < positions;
      const int64_t ii = here ? i : before, nn = here ? n + distance : (n + distance - positions) % positions;
      const Ahead ahead = {view.x.at(ii, nn) - p.x,
                           view.grad_y.at(ii, nn) - p.grad_y,
                           view.weight_logits.at(ii, nn) - p.weight_logits,
                           view.input_gate.at(ii, nn) - p.input_gate,
                           view.output_gate.at(ii, nn) - p.output_gate,
                           view.grad_x.result.at(ii, nn) - p.grad_x,
                           view.grad_x.partial.at(ii, nn) - p.partial};
      const bool minus = n > 0, plus = n < positions - 1;
      if (shared) repeat_groups(line, n, block.channels);
      const int64_t channels = block.channels;
      if (plan.stream && minus && plus)
        stream_position<T, source>(p, ahead, channels, merge, line, add, last);
      else if (minus && plus)
        backward_position<T, false, source>(p, ahead, channels, merge, true, true, line, add, last);
      else
        backward_position<T, true, source>(p, ahead, channels, merge, minus, plus, line, add, last);
      if (shared && plan.parts > 1)
        group_gradients(line, n, block.channels, view.logit_parts, groups, i, minus, plus);
      else if (shared)
        group_gradients(line, n, block.channels, view.grad_weight_logits, groups, i, minus, plus);
    }
    for (int64_t c = 0; c < block.channels; ++c) merge_total[c] += (double)merge_sums[c];
    none_carried = restart;
    A* swap = carried;
    carried = passed;
    passed = swap;
  }
}

template <class T> static int64_t backward_scratch(const Scan& scan, const Plan& plan) {
  typedef typename Accumulator<T>::type A;
  const int64_t height = scan.height, width = scan.width, channels = padded(plan.block);
  const int64_t longest = height > width ? height : width;
  int64_t size = (height * width + 2 * longest) * channels * (plan.keep ? kKeptPlanes : 1);
  size += 2 * (longest + 2) * channels + channels;
  size += shared_line_size(scan, plan);
  if (!in_place<T>() && scan.directions > 1 && plan.shares == 1) size += height * width * channels;
  return size * sizeof(A);
}

template <class T> static void backward(const Scan& scan, const Plan& plan, const Block& block, char* scratch) {
  typedef typename Accumulator<T>::type A;
  const int64_t longest = scan.height > scan.width ? scan.height : scan.width, channels = padded(plan.block);
  A* states = (A*)scratch;
  A* carries = states + (scan.height * scan.width + 2 * longest) * channels * (plan.keep ? kKeptPlanes : 1);
  A* merge_sums = carries + 2 * (longest + 2) * channels;
  A* shared = merge_sums + channels;
  A* partial = shared + shared_line_size(scan, plan);
  const Directions directions(scan, plan, block);
  for (int64_t d = directions.begin; d < directions.end; ++d) {
    if (plan.keep)
      backward_direction<T, kKept>(scan, plan, block, d, states, carries, SharedLine<A>{}, merge_sums, partial);
    else if (scan.groups == scan.channels)
      backward_direction<T, kLogits>(scan, plan, block, d, states, carries, SharedLine<A>{}, merge_sums, partial);
    else
      backward_direction<T, kShared>(scan, plan, block, d, states, carries, shared_line<A>(scan, block, shared), merge_sums,
                                     partial);
  }
  if (plan.stream) finish_streams();
}

// Add up what the tasks of one group contributed to its logits, for the logits [begin, end).
template <class T> static void join_parts(const Scan& scan, const Plan& plan, int64_t begin, int64_t end) {
  typedef typename Accumulator<T>::type A;
  constexpr int L = Simd<A>::lanes;
  const int64_t plane = scan.batch * scan.height * scan.width * scan.directions * 3 * scan.groups;
  const A* parts = (const A*)plan.logit_parts;
  for (int64_t j = begin; j < end; j += L) {
    const int64_t count = end - j < L ? end - j : L;
    typename Simd<A>::V sum = {};
    for (int64_t part = 0; part < plan.parts; ++part) sum += load_some(parts + part * plane + j, count);
    store_some((T*)scan.grad_weight_logits + j, sum, count);
  }
}
