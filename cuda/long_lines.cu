// Long lines: a block owns a run of positions of one direction and walks `chunk` lines of it per launch. It recomputes
// `halo` positions on each side, so that no block waits on another; states cross launches through global memory.
#include "common.cuh"

namespace gspn {

// One thread per position (halo included) and VECTOR channels. Offsets count lines from the start of a segment in
// memory order, visits count them in the order of the direction.
struct Block {
    const Problem& p;
    Way way;                             // from the first line of this launch on
    int d, channel;
    int start, length;                   // of this segment: its first line in memory, and lines
    Index slot_size, edge;               // of the states between launches, and this thread's place among them
    int visit_begin, visit_end;          // the visits of this launch
    int column_offset, width, rows, row_index;
    bool has_previous, has_next;         // on the line
    bool holds_previous, holds_next;     // in this block; a neighbour beyond the halo is never needed
    bool active, is_owned;

    __device__ explicit Block(const Problem& problem) : p(problem) {
        // Numbers of blocks, lines and channels have 32 bits, offsets 64: only those can be large.
        unsigned rest = blockIdx.x;
        const unsigned slabs = static_cast<unsigned>(p.slabs), tiles = static_cast<unsigned>(p.tiles);
        const Index slab = rest % slabs;
        rest /= slabs;
        const Index first = rest % tiles * p.owned;
        rest /= tiles;
        const Index member = blockIdx.y;
        d = static_cast<int>(p.phase_direction[member]);
        way.columns = visits_columns(p.code[d]);
        way.backwards = visits_backwards(p.code[d]);
        const Index lines = way.columns ? p.width : p.height;
        const Index positions = way.columns ? p.height : p.width;
        const Index window = p.window > 0 && p.window < lines ? p.window : lines;
        const unsigned segments = static_cast<unsigned>(lines + window - 1) / static_cast<unsigned>(window);
        const Index segment = rest % segments;
        way.batch = static_cast<int>(rest / segments);
        start = static_cast<int>(segment * window);
        length = static_cast<int>(start + window < lines ? window : lines - start);
        place_visits(static_cast<int>(p.step), static_cast<int>(p.span));

        width = static_cast<int>(p.slab);
        rows = blockDim.y;
        row_index = threadIdx.y;
        column_offset = threadIdx.x * VECTOR;
        channel = static_cast<int>(slab * p.slab) + column_offset;
        const Index last = first + p.owned < positions ? first + p.owned : positions;
        const Index n = (first > p.halo ? first - p.halo : 0) + row_index;
        way.n = static_cast<int>(n);
        slot_size = p.phase_directions * p.batch * segments * positions * p.channels;
        edge = (((member * p.batch + way.batch) * segments + segment) * positions + n) * p.channels + channel;
        active = channel < p.channels && n < positions && n < last + p.halo;
        is_owned = active && n >= first && n < last;
        has_previous = n > 0;
        has_next = n + 1 < positions;
        holds_previous = active && has_previous && row_index > 0;
        holds_next = active && has_next && row_index + 1 < rows;
    }
    // The lines of the chunks `step` to `step + span`, counted in visiting order.
    __device__ void place_visits(int step, int span) {
        const int chunk = static_cast<int>(p.chunk);
        const int low = (way.backwards ? static_cast<int>(p.chunks) - step - span : step) * chunk;
        const int high = low + span * chunk < length ? low + span * chunk : length;
        visit_begin = way.backwards ? length - high : low;
        visit_end = low < high ? (way.backwards ? length - low : high) : visit_begin;
        way.first = start + (way.backwards ? high - 1 : low);
    }
    // The chunk, in visiting order, that a visit belongs to, and how many of its lines remain from there on.
    __device__ int chunk_of(int visit) const {
        const int chunk = static_cast<int>(p.chunk);
        return way.backwards ? static_cast<int>(p.chunks) - 1 - (length - 1 - visit) / chunk : visit / chunk;
    }
    __device__ int lines_left(int visit) const {
        const int chunk = static_cast<int>(p.chunk);
        return way.backwards ? (length - 1 - visit) % chunk + 1 : chunk - visit % chunk;
    }
    __device__ bool is_empty() const { return visit_begin >= visit_end; }
    // In `states` or `carries` [slot, direction of the phase, batch, segment, position, channel].
    __device__ Index boundary(Index slot) const { return slot * slot_size + edge; }
    __device__ Sums& sums(Real* plane) const { return sums(plane, row_index); }
    __device__ Sums& sums(Real* plane, int row) const {
        return *reinterpret_cast<Sums*>(plane + row * width + column_offset);
    }
    template <typename Word>
    __device__ Word& stored(Element* plane) const {
        return *reinterpret_cast<Word*>(plane + row_index * width + column_offset);
    }
};

// The slot of `states` that enters a chunk.
__device__ __forceinline__ Index slot_of(const Problem& p, int step) { return step % static_cast<int>(p.ring); }

// The neighbourhood of a thread's position on a line in shared memory.
struct Neighbours {
    Sums before, same, after;

    __device__ Neighbours(const Block& b, Real* states) : before(), same(), after() {
        if (b.active) same = b.sums(states);
        if (b.holds_previous) before = b.sums(states, b.row_index - 1);
        if (b.holds_next) after = b.sums(states, b.row_index + 1);
    }
};

__device__ __forceinline__ void propagate(const Block& b, const Logits (&logits)[3], const Neighbours& from, Sums& h) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const Weights w(logits, v, b.has_previous, b.has_next);
        h.item[v] += w.weight[0] * from.before.item[v] + w.weight[1] * from.same.item[v] +
                     w.weight[2] * from.after.item[v];
    }
}

// The sum over directions of y or grad_x. The last direction to come by writes the result, the others what they have
// so far. Sums of float32 and float64 lie in the result itself, so both pointers are then the same.
struct Total {
    Element* result;
    Real* sums;
    Index offset, step;  // of this thread's channels in both, in elements
    bool accumulate, final;

    __device__ Total(const Block& b, Element* tensor)
        : result(tensor), sums(b.p.sums), accumulate(b.is_owned && b.p.accumulate != 0), final(b.p.final != 0) {
        const Index token = (b.way.batch * b.p.height + b.way.row()) * b.p.width + b.way.column();
        offset = token * b.p.channels + b.channel;
        step = b.way.signed_step(b.p.width * b.p.channels, b.p.channels);
    }
    __device__ void move(Index lines) { offset += lines * step; }
    __device__ void add(const Block& b, Sums value) const {
        const Sums sum = load<Sums>(sums + offset, accumulate);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) value.item[v] += sum.item[v];
        store(result + offset, narrow_all(value), b.is_owned && final);
        store(sums + offset, value, b.is_owned && !final);
    }
};

struct Inputs {
    Stream<const Element> x, logits, input_gate;

    __device__ explicit Inputs(const Block& b)
        : x(b.p.x, b.p.x_stride, b.way, b.channel),
          logits(b.p.weight_logits, b.p.weight_logits_stride, b.way,
                 b.d * b.p.weight_logits_stride[3] + logit_of(b.p, b.channel)),
          input_gate(b.p.input_gate, b.p.input_gate_stride, b.way, b.d * b.p.input_gate_stride[3] + b.channel) {}
    __device__ void move(Index lines) {
        logits.move(lines);
        x.move(lines);
        input_gate.move(lines);
    }
};

__device__ __forceinline__ Stream<const Element> output_gate_of(const Block& b) {
    return {b.p.output_gate, b.p.output_gate_stride, b.way, b.d * b.p.output_gate_stride[3] + b.channel};
}

struct LineInputs {
    Logits logits[3];
    Channels x, input_gate;

    __device__ void load_line(const Block& b, Inputs& inputs, int visit) {
        const bool wanted = b.active && visit < b.visit_end;
        load_logits(inputs.logits.at, b.p.weight_logits_stride[4], wanted && visit > 0, logits);
        x = load<Channels>(inputs.x.at, wanted);
        input_gate = load<Channels>(inputs.input_gate.at, wanted);
        inputs.move(1);
    }
};

// One launch of the recurrence; with OUTPUT the contributions to y are added up, without only the states go on.
template <bool OUTPUT>
__device__ void walk(const Problem& p, Real* states) {
    const Block b(p);
    if (b.is_empty()) return;
    const Real merge = OUTPUT ? merge_weight(p, b.d) : Real(0);
    const int line_size = b.rows * b.width;
    Inputs inputs(b);
    Stream<const Element> output_gate = output_gate_of(b);
    Total y(b, p.y);
    LineInputs next;
    next.load_line(b, inputs, b.visit_begin);
    Channels next_gate = {};
    if (OUTPUT) next_gate = load<Channels>(output_gate.at, b.is_owned);
    int step = b.chunk_of(b.visit_begin), left = b.lines_left(b.visit_begin);
    const Sums entering = load<Sums>(p.states + b.boundary(slot_of(p, step)), b.active && b.visit_begin > 0);
    if (b.active) b.sums(states) = entering;
    __syncthreads();
    int turn = 0;  // which of the two lines in shared memory is the line before
#pragma unroll 1
    for (int visit = b.visit_begin; visit < b.visit_end; ++visit) {
        const LineInputs now = next;
        const Channels gate = next_gate;
        next.load_line(b, inputs, visit + 1);
        output_gate.move(1);
        if (OUTPUT) next_gate = load<Channels>(output_gate.at, b.is_owned && visit + 1 < b.visit_end);
        Sums h = {};
        if (visit > 0) propagate(b, now.logits, Neighbours(b, states + turn * line_size), h);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) h.item[v] += now.input_gate[v] * now.x[v];
        turn ^= 1;
        if (b.active) b.sums(states + turn * line_size) = h;
        if (OUTPUT) {
            Sums contribution;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) contribution.item[v] = merge * gate[v] * h.item[v];
            y.add(b, contribution);
            y.move(1);
        }
        if (--left == 0) {  // the chunk ends here
            ++step;
            left = static_cast<int>(p.chunk);
            store(p.states + b.boundary(slot_of(p, step)), h, b.is_owned && visit + 1 < b.length);
        }
        __syncthreads();  // forward line
    }
}

// Where a backward block keeps a chunk in shared memory: lines of [position, channel].
struct ChunkMemory {
    int size;             // of a line
    Real* states;         // line 0 is the one before the chunk
    Real* messages;       // two lines in turn, each to n - 1 and to n + 1
    Element* x_lines;
    Element* gate_lines;
    Element* logit_lines;  // three per line

    __device__ ChunkMemory(const Block& b, unsigned char* memory) : size(b.rows * b.width) {
        const int chunk = static_cast<int>(b.p.chunk);
        states = reinterpret_cast<Real*>(memory);
        messages = states + (chunk + 1) * size;
        x_lines = reinterpret_cast<Element*>(messages + 4 * size);
        gate_lines = x_lines + chunk * size;
        logit_lines = gate_lines + chunk * size;
    }
};

// What a thread keeps of one line of the chunk.
struct ChunkLine {
    Logits logits[3];
    Channels x, input_gate;

    __device__ ChunkLine(const Block& b, const ChunkMemory& lines, int i) : logits(), x(), input_gate() {
        if (!b.active) return;
        x = b.stored<Channels>(lines.x_lines + i * lines.size);
        input_gate = b.stored<Channels>(lines.gate_lines + i * lines.size);
#pragma unroll
        for (int k = 0; k < 3; ++k) logits[k] = b.stored<Logits>(lines.logit_lines + (3 * i + k) * lines.size);
    }
};

// Load the chunk, keep it, and compute its states from the one that enters it. All loads are independent of the states.
__device__ __forceinline__ void recompute_states(const Block& b, const ChunkMemory& lines, int step) {
    const Problem& p = b.p;
    const bool enters = b.visit_begin > 0;
    const int count = b.visit_end - b.visit_begin;
    const Sums entering = load<Sums>(p.states + b.boundary(slot_of(p, step)), b.active && enters);
    if (b.active) b.sums(lines.states) = entering;
    Inputs inputs(b);
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
        LineInputs line;
        line.load_line(b, inputs, b.visit_begin + i);
        if (!b.active) continue;
        b.stored<Channels>(lines.x_lines + i * lines.size) = line.x;
        b.stored<Channels>(lines.gate_lines + i * lines.size) = line.input_gate;
#pragma unroll
        for (int k = 0; k < 3; ++k) b.stored<Logits>(lines.logit_lines + (3 * i + k) * lines.size) = line.logits[k];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        Sums h = {};
        const ChunkLine line(b, lines, i);
        if (i > 0 || enters) propagate(b, line.logits, Neighbours(b, lines.states + i * lines.size), h);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) h.item[v] += line.input_gate[v] * line.x[v];
        if (b.active) b.sums(lines.states + (i + 1) * lines.size) = h;
        __syncthreads();  // state line
    }
}

__device__ __forceinline__ void walk_back(const Block& b, const ChunkMemory& lines, Real merge, Sums& carry,
                                          Real& merge_sum) {
    const Problem& p = b.p;
    const bool enters = b.visit_begin > 0;
    const int count = b.visit_end - b.visit_begin;
    Stream<const Element> output_gate = output_gate_of(b);
    Stream<const Element> grad_y(p.grad_y, p.grad_y_stride, b.way, b.channel);
    GatePlace place(p, b.way, b.channel, b.d);
    LogitGradients grad_logits(p, b.way, b.channel, b.d);
    Total total(b, p.grad_x);
    grad_y.move(count - 1);
    place.move(count - 1);
    grad_logits.move(count - 1);
    total.move(count - 1);
    output_gate.move(count - 1);
    Channels gate = load<Channels>(output_gate.at, b.active);
    Channels grad = load<Channels>(grad_y.at, b.active);
#pragma unroll 1
    for (int i = count - 1; i >= 0; --i) {
        Sums h = {}, dh, grad_output_gate, grad_input_gate, grad_x;
        const ChunkLine line(b, lines, i);
        if (b.active) h = b.sums(lines.states + (i + 1) * lines.size);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            dh.item[v] = merge * gate[v] * grad[v] + carry.item[v];
            grad_output_gate.item[v] = merge * grad[v] * h.item[v];
            if (b.is_owned) merge_sum += grad[v] * gate[v] * h.item[v];
            grad_input_gate.item[v] = line.x[v] * dh.item[v];
            grad_x.item[v] = line.input_gate[v] * dh.item[v];
        }
        store(p.grad_input_gate + place.offset, narrow_all(grad_input_gate), b.is_owned);
        store(p.grad_output_gate + place.offset, narrow_all(grad_output_gate), b.is_owned);
        output_gate.move(-1);
        grad_y.move(-1);
        gate = load<Channels>(output_gate.at, b.active && i > 0);
        grad = load<Channels>(grad_y.at, b.active && i > 0);
        total.add(b, grad_x);
        total.move(-1);

        LineGradient gradient;
        carry = Sums{};
        Real* previous_line = lines.messages + (i & 1) * 2 * lines.size;
        Real* next_line = previous_line + lines.size;
        if (i > 0 || enters) {
            const Neighbours from(b, lines.states + i * lines.size);
            Sums to_next;
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const Weights w(line.logits, v, b.has_previous, b.has_next);
                Real slope[3];
                w.gradients(from.before.item[v], from.same.item[v], from.after.item[v], b.has_previous, b.has_next,
                            slope);
                gradient.add(v, slope, dh.item[v]);
                carry.item[v] = w.weight[1] * dh.item[v];
                to_next.item[v] = w.weight[2] * dh.item[v];
                dh.item[v] *= w.weight[0];
            }
            if (b.active) {
                b.sums(previous_line) = dh;
                b.sums(next_line) = to_next;
            }
        }
        grad_logits.put(gradient, place, b.is_owned);
        grad_logits.move(-1);
        place.move(-1);
        __syncthreads();  // gradient line
        if (i > 0 || enters) {
            Sums from_previous = {}, from_next = {};
            if (b.holds_previous) from_previous = b.sums(next_line, b.row_index - 1);
            if (b.holds_next) from_next = b.sums(previous_line, b.row_index + 1);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
        }
    }
}

}  // namespace gspn

// grid: (slabs x tiles x segments x batch, directions of the phase); block: (slab / VECTOR, positions with halo).
extern "C" __global__ void __launch_bounds__(GSPN_FORWARD_THREADS, 1) gspn_scan_forward_kernel(const gspn::Problem p) {
    GSPN_DYNAMIC_SHARED(memory);
    gspn::walk<true>(p, reinterpret_cast<gspn::Real*>(memory));
}

// The same walk without y: leaves the state at the end of every chunk for the backward kernel.
extern "C" __global__ void __launch_bounds__(GSPN_FORWARD_THREADS, 1) gspn_scan_states_kernel(const gspn::Problem p) {
    GSPN_DYNAMIC_SHARED(memory);
    gspn::walk<false>(p, reinterpret_cast<gspn::Real*>(memory));
}

// Chunks backwards: recompute the states of each from the one that enters it, then walk its lines in reverse.
// shared: chunk + 1 lines of states, two lines of messages to both sides, chunk lines of x, its gate and logits.
extern "C" __global__ void __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_scan_backward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    __shared__ Real scratch[32];
    Block b(p);
    if (b.is_empty()) return;
    const Real merge = merge_weight(p, b.d);
    const ChunkMemory lines(b, memory);
    const int first_step = b.chunk_of(b.visit_begin), last_step = b.chunk_of(b.visit_end - 1);
    const bool enters = b.visit_begin > 0, leaves = b.visit_end < b.length;
    // The sum over k of w_k dh that the line visited next sends here.
    Sums carry = load<Sums>(p.carries + b.boundary((last_step + 1) & 1), b.active && leaves);
    Real merge_sum = Real(0);
#pragma unroll 1
    for (int step = last_step; step >= first_step; --step) {
        forget(b.channel);
        forget(b.d);
        forget(b.way.n);
        forget(b.way.batch);
        b.place_visits(step, 1);
        recompute_states(b, lines, step);
        walk_back(b, lines, merge, carry, merge_sum);
    }
    store(p.carries + b.boundary(first_step & 1), carry, b.is_owned && enters);
    const Real block_total = block_sum(merge_sum, scratch);
    const bool leader = threadIdx.x == 0 && threadIdx.y == 0;
    store(p.merge_sums + b.d * p.merge_blocks + p.merge_offset + blockIdx.x, block_total, leader);
}
