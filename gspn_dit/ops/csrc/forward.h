// Included by kernels.h.

// Where one position's channels are. A neighbour is `width` away, a logit of the next k `k_stride`.
template <class T> struct ForwardPointers {
  typedef typename Accumulator<T>::type A;
  const T *x, *weight_logits, *input_gate, *output_gate;
  const A* before;  // the previous line's states at n - 1
  A* state;
  T* y;
  A* partial;
  int64_t k_stride, width;
};

// How far the data of a position visited a little later are from those of this one.
struct Ahead {
  int64_t x, grad_y, weight_logits, input_gate, output_gate, sum, partial;
};

template <class T, bool Backward, bool Edge, bool Tail>
static GSPN_INLINE auto weights_at(const T* weight_logits, int64_t k_stride, int64_t count, bool minus, bool plus) {
  return weights<typename Accumulator<T>::type, Backward, Edge, in_place<T>()>(
      get<T, Tail>(weight_logits, count), get<T, Tail>(weight_logits + k_stride, count),
      get<T, Tail>(weight_logits + 2 * k_stride, count), minus, plus);
}

template <class V> static GSPN_INLINE V weighted_sum(const V* weights, V minus_one, V same, V plus_one) {
  return multiply_add(weights[2], plus_one, multiply_add(weights[1], same, weights[0] * minus_one));
}

template <class T, bool Edge, bool Shared, bool Tail>
static GSPN_INLINE auto next_state(const T* x, const T* input_gate, const T* weight_logits, int64_t k_stride,
                                   const typename Accumulator<T>::type* before, int64_t slot,
                                   const typename Accumulator<T>::type* we, int64_t width, int64_t count, bool minus,
                                   bool plus) {
  const auto input = get<T, Tail>(input_gate, count) * get<T, Tail>(x, count);
  const auto minus_one = load(before), same = load(before + slot), plus_one = load(before + 2 * slot);
  if (Shared) {
    const auto with_minus = multiply_add(load(we), minus_one, input);
    return multiply_add(load(we + 2 * width), plus_one, multiply_add(load(we + width), same, with_minus));
  }
  const auto value = weights_at<T, false, Edge, Tail>(weight_logits, k_stride, count, minus, plus);
  return multiply_add(weighted_sum(value.p, minus_one, same, plus_one), value.inverse, input);
}

template <class T, bool Edge, bool Shared, bool Tail>
static GSPN_INLINE void forward_vector(const ForwardPointers<T>& p, int64_t j, int64_t count,
                                       typename Accumulator<T>::type merge, bool minus, bool plus,
                                       const typename Accumulator<T>::type* we, bool add, bool last) {
  const auto state = next_state<T, Edge, Shared, Tail>(p.x + j, p.input_gate + j, p.weight_logits + j, p.k_stride,
                                                       p.before + j, p.width, we + j, p.width, count, minus, plus);
  store(p.state + j, state);
  add_up<T, Tail>(p.y + j, p.partial + j, get<T, Tail>(p.output_gate + j, count) * merge * state, count, add, last);
}

template <class T, bool Tail>
static GSPN_INLINE void forward_start_vector(const ForwardPointers<T>& p, int64_t j, int64_t count,
                                             typename Accumulator<T>::type merge, bool add, bool last) {
  typedef typename Accumulator<T>::type A;
  typename Simd<A>::V state = get<T, Tail>(p.input_gate + j, count) * get<T, Tail>(p.x + j, count);
  store(p.state + j, state);
  add_up<T, Tail>(p.y + j, p.partial + j, get<T, Tail>(p.output_gate + j, count) * merge * state, count, add, last);
}

template <class T> static GSPN_INLINE void prefetch_position(const ForwardPointers<T>& p, const Ahead& ahead, int64_t j) {
  if (sizeof(T) < 4 && j % (64 / (int64_t)sizeof(T))) return;
  prefetch(p.x + ahead.x + j);
  for (int k = 0; k < 3; ++k) prefetch(p.weight_logits + k * p.k_stride + ahead.weight_logits + j);
  prefetch(p.input_gate + ahead.input_gate + j);
  prefetch(p.output_gate + ahead.output_gate + j);
  if (in_place<T>()) prefetch(p.y + ahead.sum + j);
  else prefetch(p.partial + ahead.partial + j), prefetch(p.partial + ahead.partial + j + 16);
}

template <class T, bool Edge, bool Shared>
static GSPN_INLINE void forward_position(const ForwardPointers<T>& p, const Ahead& ahead, int64_t channels,
                                         typename Accumulator<T>::type merge, bool minus, bool plus,
                                         const typename Accumulator<T>::type* we, bool add, bool last) {
  constexpr int L = Simd<typename Accumulator<T>::type>::lanes;
  int64_t j = 0;
  for (; j + L <= channels; j += L) {
    prefetch_position(p, ahead, j);
    forward_vector<T, Edge, Shared, false>(p, j, L, merge, minus, plus, we, add, last);
  }
  if (j < channels) forward_vector<T, Edge, Shared, true>(p, j, channels - j, merge, minus, plus, we, add, last);
}

template <class T> static GSPN_INLINE void forward_start(const ForwardPointers<T>& p, int64_t channels,
                                                         typename Accumulator<T>::type merge, bool add, bool last) {
  constexpr int L = Simd<typename Accumulator<T>::type>::lanes;
  int64_t j = 0;
  for (; j + L <= channels; j += L) forward_start_vector<T, false>(p, j, L, merge, add, last);
  if (j < channels) forward_start_vector<T, true>(p, j, channels - j, merge, add, last);
}

template <class T, bool Shared>
static void forward_direction(const Scan& scan, const Plan& plan, const Block& block, int64_t d,
                              typename Accumulator<T>::type* states, SharedLine<typename Accumulator<T>::type> line,
                              typename Accumulator<T>::type* partial_plane) {
  typedef typename Accumulator<T>::type A;
  const Geometry geometry(scan, d);
  const int64_t lines = geometry.lines, positions = geometry.positions, width = padded(block.channels);
  const int64_t group = block.channel * scan.groups / scan.channels;
  const Lines<const T> x = view3<T>(geometry, block, scan.x, scan.x_stride);
  const Lines<const T> input_gate = view4<T>(geometry, block, d, scan.input_gate, scan.input_gate_stride);
  const Lines<const T> output_gate = view4<T>(geometry, block, d, scan.output_gate, scan.output_gate_stride);
  const Lines<const T> weight_logits =
      view4<T>(geometry, Block{block.batch, group, 0, 0, 0}, d, scan.weight_logits, scan.weight_logits_stride);
  const Sum<T> sum(geometry, scan, plan, block, d, scan.y, partial_plane);
  const bool add = block.share == 0 && d > 0, last = plan.shares == 1 && d == scan.directions - 1;
  const A merge = merge_weight<A>(scan, d);
  const int64_t k_stride = scan.weight_logits_stride[4], size = (positions + 2) * width;
  A *before = states, *state = states + size;
  for (int64_t step = 0; step < lines; ++step) {
    const int64_t i = geometry.index(step);
    const int64_t next = step + 1 < lines ? geometry.index(step + 1) : i;
    const bool restart = geometry.restarts(i);
    if (Shared && !restart) shared_weights<T, false>(line, weight_logits, k_stride, i, positions);
    for (int64_t n = 0; n < positions; ++n) {
      ForwardPointers<T> p;
      const T* l = weight_logits.at(i, n);
      p.x = x.at(i, n);
      p.weight_logits = l;
      p.before = before + n * width;
      p.k_stride = k_stride;
      p.width = width;
      p.input_gate = input_gate.at(i, n);
      p.output_gate = output_gate.at(i, n);
      p.state = state + (n + 1) * width;
      p.y = sum.result.at(i, n);
      p.partial = sum.partial.at(i, n);
      if (restart) {
        forward_start<T>(p, block.channels, merge, add, last);
        continue;
      }
      const int64_t distance = block.channels * (int64_t)sizeof(T) < 512 ? 2 : 1;
      const bool here = n + distance < positions;
      const int64_t ii = here ? i : next, nn = here ? n + distance : (n + distance - positions) % positions;
      const Ahead ahead = {x.at(ii, nn) - p.x,
                           0,
                           weight_logits.at(ii, nn) - l,
                           input_gate.at(ii, nn) - p.input_gate,
                           output_gate.at(ii, nn) - p.output_gate,
                           sum.result.at(ii, nn) - p.y,
                           sum.partial.at(ii, nn) - p.partial};
      if (Shared) repeat_groups(line, n, block.channels);
      if (Shared || (n > 0 && n < positions - 1))
        forward_position<T, false, Shared>(p, ahead, block.channels, merge, true, true, line.we, add, last);
      else
        forward_position<T, true, Shared>(p, ahead, block.channels, merge, n > 0, n < positions - 1, line.we, add, last);
    }
    A* swap = before;
    before = state;
    state = swap;
  }
}

// Scratch in front of what differs between forward and backward: the line buffers of shared weights.
template <class A> static SharedLine<A> shared_line(const Scan& scan, const Block& block, A* scratch) {
  SharedLine<A> line = {};
  const int64_t longest = scan.height > scan.width ? scan.height : scan.width;
  const int64_t group_size = scan.channels / scan.groups;
  line.groups = block.channels > group_size ? block.channels / group_size : 1;
  line.size = block.channels / line.groups;
  line.plane = longest * line.groups;
  line.w = scratch;
  line.s = line.w + 3 * line.plane;
  line.we = line.s + 3 * line.plane;
  line.dw = line.we + 3 * padded(block.channels) + 64;
  return line;
}

static int64_t shared_line_size(const Scan& scan, const Plan& plan) {
  if (scan.groups == scan.channels) return 0;
  const int64_t longest = scan.height > scan.width ? scan.height : scan.width;
  return padded(6 * longest * plan.block + 2 * (3 * padded(plan.block) + 64));
}

template <class T> static int64_t forward_scratch(const Scan& scan, const Plan& plan) {
  typedef typename Accumulator<T>::type A;
  const int64_t longest = scan.height > scan.width ? scan.height : scan.width, width = padded(plan.block);
  int64_t size = 2 * (longest + 2) * width + shared_line_size(scan, plan);
  if (!in_place<T>() && scan.directions > 1 && plan.shares == 1) size += scan.height * scan.width * width;
  return size * sizeof(A);
}

template <class A> static void clear(A* values, int64_t count) { memset(values, 0, sizeof(A) * count); }

template <class T> static void forward(const Scan& scan, const Plan& plan, const Block& block, char* scratch) {
  typedef typename Accumulator<T>::type A;
  const int64_t longest = scan.height > scan.width ? scan.height : scan.width, width = padded(block.channels);
  A* states = (A*)scratch;
  A* shared = states + 2 * (longest + 2) * padded(plan.block);
  A* partial = shared + shared_line_size(scan, plan);
  const Directions directions(scan, plan, block);
  for (int64_t d = directions.begin; d < directions.end; ++d) {
    clear(states, 2 * (longest + 2) * width);
    if (scan.groups == scan.channels) forward_direction<T, false>(scan, plan, block, d, states, SharedLine<A>{}, partial);
    else forward_direction<T, true>(scan, plan, block, d, states, shared_line<A>(scan, block, shared), partial);
  }
}
