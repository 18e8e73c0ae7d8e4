// Long lines: a block owns a run of positions of one direction; the sums over directions go through global memory, as do
// the states that cross launches. In a cluster, whose blocks own whole lines together, neighbours hand each other the
// edges of their runs; without, a block recomputes `halo` positions on each side, so that none waits on another, and
// walks `chunk` lines per launch.
#include "edges.cuh"

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
    int column_offset, width, row;
    int rank, strip;                     // of this block in its cluster, and the positions it owns
    unsigned bytes;                      // that arrive from neighbouring blocks for every line
    bool has_previous, has_next;         // on the line
    bool active, is_owned;

    __device__ explicit Block(const Problem& problem) : p(problem) {
        // Numbers of blocks, lines and channels have 32 bits, offsets 64: only those can be large.
        unsigned rest = blockIdx.x;
        const unsigned slabs = static_cast<unsigned>(p.slabs), tiles = static_cast<unsigned>(p.tiles);
        const unsigned tile = rest % tiles;  // a cluster's blocks are numbered one after the other
        const Index first = tile * p.owned;
        rest /= tiles;
        const Index slab = rest % slabs;
        rest /= slabs;
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
        row = threadIdx.y;
        column_offset = threadIdx.x * VECTOR;
        channel = static_cast<int>(slab * p.slab) + column_offset;
        const Index last = first + p.owned < positions ? first + p.owned : positions;
        const Index n = (first > p.halo ? first - p.halo : 0) + row;
        way.n = static_cast<int>(n);
        slot_size = p.phase_directions * p.batch * segments * positions * p.channels;
        edge = (((member * p.batch + way.batch) * segments + segment) * positions + n) * p.channels + channel;
        active = channel < p.channels && n < positions && n < last + p.halo;
        is_owned = active && n >= first && n < last;
        has_previous = n > 0;
        has_next = n + 1 < positions;
        rank = static_cast<int>(tile);
        strip = static_cast<int>(p.owned);
        const Index channels_left = p.channels - slab * p.slab;
        const unsigned row_bytes = static_cast<unsigned>(channels_left < width ? channels_left : width) * sizeof(Real);
        bytes = ((first > 0 && first < positions) + (first + p.owned < positions)) * row_bytes;
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
    __device__ bool is_active() const { return active; }
    // On the run of another block of the cluster.
    __device__ bool borders_previous() const { return CLUSTER > 1 && active && row == 0 && has_previous; }
    __device__ bool borders_next() const { return CLUSTER > 1 && active && row == strip - 1 && has_next; }
    __device__ bool is_empty() const { return visit_begin >= visit_end; }
    // In `states` or `carries` [slot, direction of the phase, batch, segment, position, channel].
    __device__ Index boundary(Index slot) const { return slot * slot_size + edge; }
    // A line in shared memory has one more position on either side: a neighbouring block's, or nothing.
    __device__ int line_size() const { return (blockDim.y + 2) * width; }
    __device__ Sums& sums(Real* line, int at) const {
        return *reinterpret_cast<Sums*>(line + at * width + column_offset);
    }
    __device__ Real* place(Real* line) const { return &sums(line, row + 1).item[0]; }
    // What lies beyond a halo is not needed.
    __device__ void clear_sides(Real* line) const {
        if (row == 0 && !borders_previous()) sums(line, 0) = Sums{};
        if ((row == static_cast<int>(blockDim.y) - 1 || !has_next) && !borders_next()) sums(line, row + 2) = Sums{};
    }
    template <typename Word>
    __device__ Word& stored(Element* line) const {
        return *reinterpret_cast<Word*>(line + row * width + column_offset);
    }
};

// With a cluster, the counters that its edges arrive at; without, lines end at a barrier of the block.
#if GSPN_CLUSTER > 1
using LineEnds = Edges;
__device__ __forceinline__ void start_together() { cluster_barrier(); }  // before anything arrives
#else
struct LineEnds {
    __device__ explicit LineEnds(unsigned char*) {}
    __device__ void put_state(const Block& b, const Block&, Real* place, const Sums& h) const {
        if (b.active) *reinterpret_cast<Sums*>(place) = h;
    }
    __device__ void send_previous(const Block&, const Block&, Real*, const Sums&) const {}
    __device__ void send_next(const Block&, const Block&, Real*, const Sums&) const {}
    __device__ void end_line(const Block&, int) const { __syncthreads(); }  // line
    __device__ void await_neighbours(const Block&) const {}
};
__device__ __forceinline__ void start_together() {}
#endif

__device__ __forceinline__ Real* behind_counters(unsigned char* memory) {
    return reinterpret_cast<Real*>(memory + (CLUSTER > 1 ? 2 * sizeof(Arrivals) : 0));
}

// The slot of `states` that enters a chunk.
__device__ __forceinline__ Index slot_of(const Problem& p, int step) { return step % static_cast<int>(p.ring); }

// The sum over directions of y or grad_x. The last direction to come by writes the result, the others what they have
// so far. Sums of float32 and float64 lie in the result itself, so both pointers are then the same.
struct Total {
    const Block& b;
    Element* result;
    Cell token;
    bool accumulate, final;

    __device__ Total(const Block& block, Element* tensor)
        : b(block),
          result(tensor),
          token(b.p, b.way, 1, 0),
          accumulate(b.is_owned && b.p.accumulate != 0),
          final(b.p.final != 0) {}
    __device__ void move(int lines) { token.move(lines); }
    // What directions before have left, `lines` further on.
    __device__ void fetch(Sums& sum, int lines, bool wanted) const {
        Cell there = token;
        there.at += lines * there.step;
        load_into(sum, there.in(b.p.sums, b.p.channels, b.channel), accumulate && wanted);
    }
    __device__ void put(const Sums& sum) const {
        store(token.in(result, b.p.channels, b.channel), narrow_all(sum), b.is_owned && final);
        store(token.in(b.p.sums, b.p.channels, b.channel), sum, b.is_owned && !final);
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
    LineLogits logits;
    Channels x, input_gate;

    __device__ LineInputs() : logits(), x(), input_gate() {}
    __device__ void load_line(const Block& b, Inputs& inputs, int visit) {
        const bool wanted = b.active && visit < b.visit_end;
        logits.refresh(inputs.logits.at, b.p.weight_logits_stride[4], wanted && visit > 0, b.has_previous, b.has_next);
        load_into(x, inputs.x.at, wanted);
        load_into(input_gate, inputs.input_gate.at, wanted);
        inputs.move(1);
    }
    // h of this line before anything comes in from the line before.
    __device__ void add_input(Sums& h) const {
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) h.item[v] += input_gate[v] * x[v];
    }
};

constexpr int AHEAD = 2;  // lines that are on their way while one is computed

// One launch of the recurrence; with OUTPUT the contributions to y are added up, without only the states go on.
template <bool OUTPUT>
__device__ __forceinline__ void walk(const Problem& p, unsigned char* memory) {
    const Block b(p);
    if (b.is_empty()) return;
    LineEnds edges(memory);
    Real* states = behind_counters(memory);
    const Real merge = OUTPUT ? merge_weight(p, b.d) : Real(0);
    const int line_size = b.line_size();
    Inputs inputs(b);
    Stream<const Element> output_gate = output_gate_of(b);
    Total y(b, p.y);
    LineInputs lines[AHEAD];
    Channels gates[AHEAD] = {};
    Sums sums[AHEAD] = {};
    const auto load_ahead = [&](int i, int visit, int lines_on) {
        const bool wanted = b.is_owned && visit < b.visit_end;
        lines[i].load_line(b, inputs, visit);
        if (!OUTPUT) return;
        load_into(gates[i], output_gate.at, wanted);
        y.fetch(sums[i], lines_on, wanted);
        output_gate.move(1);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        load_ahead(i, b.visit_begin + i, i);
        b.clear_sides(states + i * line_size);
    }
    Real* const own = b.place(states);
    int step = b.chunk_of(b.visit_begin), left = b.lines_left(b.visit_begin);
    const Sums entering = load<Sums>(p.states + b.boundary(slot_of(p, step)), b.active && b.visit_begin > 0);
    start_together();
    edges.put_state(b, b, own + line_size, entering);
    edges.end_line(b, 1);
    edges.await_neighbours(b);
#pragma unroll 1
    for (int first = b.visit_begin; first < b.visit_end; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int visit = first + i;
            if (visit >= b.visit_end) break;
            Sums h = {};
            if (visit > 0 && b.active) h = propagate(lines[i].logits, Neighbours(own + (1 - i) * line_size, b.width));
            lines[i].add_input(h);
            edges.put_state(b, b, own + i * line_size, h);
            edges.end_line(b, 1);
            if (OUTPUT) {
                Sums sum = sums[i];
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) sum.item[v] += merge * gates[i][v] * h.item[v];
                y.put(sum);
            }
            if (--left == 0) {  // the chunk ends here
                ++step;
                left = static_cast<int>(p.chunk);
                store(p.states + b.boundary(slot_of(p, step)), h, b.is_owned && visit + 1 < b.length);
            }
            load_ahead(i, visit + AHEAD, AHEAD);
            y.move(1);
            edges.await_neighbours(b);
        }
    }
}

// Where a backward block keeps a chunk in shared memory: lines of [position, channel].
struct ChunkMemory {
    int size, stored_size;  // of a line, with and without the positions on either side
    Real* states;           // this thread's place on line 0, which is the one before the chunk
    Real* messages;         // and on two lines in turn, each to n - 1 and to n + 1
    Real* scratch;
    Element* x_lines;
    Element* gate_lines;
    Element* logit_lines;  // three per line

    __device__ ChunkMemory(const Block& b, unsigned char* memory)
        : size(b.line_size()), stored_size(static_cast<int>(blockDim.y) * b.width) {
        const int chunk = static_cast<int>(b.p.chunk);
        Real* const lines = behind_counters(memory);
        states = b.place(lines);
        messages = states + (chunk + 1) * size;
        scratch = lines + (chunk + 5) * size;
        x_lines = reinterpret_cast<Element*>(scratch + 32);
        gate_lines = x_lines + chunk * stored_size;
        logit_lines = gate_lines + chunk * stored_size;
        for (int i = 0; i < chunk + 5; ++i) b.clear_sides(lines + i * size);
    }
    __device__ void keep(const Block& b, const LineInputs& line, int i) const {
        if (!b.active) return;
        b.stored<Channels>(x_lines + i * stored_size) = line.x;
        b.stored<Channels>(gate_lines + i * stored_size) = line.input_gate;
#pragma unroll
        for (int k = 0; k < 3; ++k) b.stored<Logits>(logit_lines + (3 * i + k) * stored_size) = line.logits.at[k];
    }
    __device__ LineInputs kept(const Block& b, int i) const {
        LineInputs line;
        if (!b.active) return line;
        line.x = b.stored<Channels>(x_lines + i * stored_size);
        line.input_gate = b.stored<Channels>(gate_lines + i * stored_size);
#pragma unroll
        for (int k = 0; k < 3; ++k) line.logits.at[k] = b.stored<Logits>(logit_lines + (3 * i + k) * stored_size);
        return line;
    }
};

// Load the chunk, keep it, and compute its states from the one that enters it. All loads are independent of the states.
__device__ __forceinline__ void recompute_states(const Block& b, LineEnds& edges, const ChunkMemory& lines, int step) {
    const Problem& p = b.p;
    const int count = b.visit_end - b.visit_begin;
    const Sums entering = load<Sums>(p.states + b.boundary(slot_of(p, step)), b.active && b.visit_begin > 0);
    Inputs inputs(b);
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
        LineInputs line;
        line.load_line(b, inputs, b.visit_begin + i);
        lines.keep(b, line, i);
    }
    edges.put_state(b, b, lines.states, entering);
    edges.end_line(b, 1);
    edges.await_neighbours(b);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        Sums h = {};
        const LineInputs line = lines.kept(b, i);
        if (b.active && b.visit_begin + i > 0) {
            h = propagate(line.logits, Neighbours(lines.states + i * lines.size, b.width));
        }
        line.add_input(h);
        edges.put_state(b, b, lines.states + (i + 1) * lines.size, h);
        edges.end_line(b, 1);
        edges.await_neighbours(b);
    }
}

__device__ __forceinline__ void walk_back(const Block& b, LineEnds& edges, const ChunkMemory& lines, Real merge,
                                          Sums& carry, Real& merge_sum) {
    const Problem& p = b.p;
    const int count = b.visit_end - b.visit_begin;
    Stream<const Element> output_gate = output_gate_of(b);
    Stream<const Element> grad_y(p.grad_y, p.grad_y_stride, b.way, b.channel);
    Cell cell(p, b.way, b.d);
    const LogitGradients grad_logits(p, b.channel);
    Total total(b, p.grad_x);
    grad_y.move(count - 1);
    cell.move(count - 1);
    total.move(count - 1);
    output_gate.move(count - 1);
    Channels gate = load<Channels>(output_gate.at, b.active);
    Channels grad = load<Channels>(grad_y.at, b.active);
    Sums grad_x = {};
    total.fetch(grad_x, 0, b.is_owned);
#pragma unroll 1
    for (int i = count - 1; i >= 0; --i) {
        Sums h = {}, dh, grad_output_gate, grad_input_gate;
        const LineInputs line = lines.kept(b, i);
        if (b.active) h = *reinterpret_cast<const Sums*>(lines.states + (i + 1) * lines.size);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            const Real g = merge * grad[v];
            dh.item[v] = gate[v] * g + carry.item[v];
            grad_output_gate.item[v] = g * h.item[v];
            if (b.is_owned) merge_sum += grad[v] * gate[v] * h.item[v];
            grad_input_gate.item[v] = line.x[v] * dh.item[v];
            grad_x.item[v] += line.input_gate[v] * dh.item[v];
        }
        Messages to;
        const bool follows = b.active && b.visit_begin + i > 0;
        Real* to_previous = lines.messages + (i & 1) * 2 * lines.size;
        Real* to_next = to_previous + lines.size;
        if (follows) {
            const Neighbours from(lines.states + i * lines.size, b.width);
            to = Messages(line.logits, from, dh);
            *reinterpret_cast<Sums*>(to_previous) = to.before;
            *reinterpret_cast<Sums*>(to_next) = to.after;
        }
        carry = to.same;
        edges.send_previous(b, b, to_previous, to.before);
        edges.send_next(b, b, to_next, to.after);
        edges.end_line(b, 1);
        store(cell.in(p.grad_input_gate, p.channels, b.channel), narrow_all(grad_input_gate), b.is_owned);
        store(cell.in(p.grad_output_gate, p.channels, b.channel), narrow_all(grad_output_gate), b.is_owned);
        total.put(grad_x);
        grad_x = Sums{};
        output_gate.move(-1);
        grad_y.move(-1);
        load_into(gate, output_gate.at, b.active && i > 0);
        load_into(grad, grad_y.at, b.active && i > 0);
        total.fetch(grad_x, -1, b.is_owned && i > 0);
        total.move(-1);
        grad_logits.put(to.gradient, cell, b.is_owned, b.has_previous, b.has_next);
        cell.move(-1);
        edges.await_neighbours(b);
        if (follows) {
            const Sums from_previous = *reinterpret_cast<const Sums*>(to_next - b.width);
            const Sums from_next = *reinterpret_cast<const Sums*>(to_previous + b.width);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
        }
    }
}

}  // namespace gspn

#if GSPN_CLUSTER > 1
#define GSPN_CLUSTER_DIMENSIONS __cluster_dims__(GSPN_CLUSTER, 1, 1)
#else
#define GSPN_CLUSTER_DIMENSIONS
#endif

// grid: (tiles x slabs x segments x batch, directions of the phase), a cluster being the tiles of a line; block:
// (slab / VECTOR, positions with halo); shared: counters of a cluster, two lines of states.
#if !GSPN_BACKWARD
extern "C" __global__ void GSPN_CLUSTER_DIMENSIONS __launch_bounds__(GSPN_FORWARD_THREADS, 1)
    gspn_scan_forward_kernel(const gspn::Problem p) {
    GSPN_DYNAMIC_SHARED(memory);
    gspn::walk<true>(p, memory);
}
#else
// The same walk without y: leaves the state at the end of every chunk for the backward kernel.
extern "C" __global__ void GSPN_CLUSTER_DIMENSIONS __launch_bounds__(GSPN_FORWARD_THREADS, 1)
    gspn_scan_states_kernel(const gspn::Problem p) {
    GSPN_DYNAMIC_SHARED(memory);
    gspn::walk<false>(p, memory);
}

// Chunks backwards: recompute the states of each from the one that enters it, then walk its lines in reverse.
// shared: counters, chunk + 1 lines of states, two lines of messages to both sides, 32 values for a sum, chunk lines of
// x, its gate and logits.
extern "C" __global__ void GSPN_CLUSTER_DIMENSIONS __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_scan_backward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    Block b(p);
    if (b.is_empty()) return;
    LineEnds edges(memory);
    const Real merge = merge_weight(p, b.d);
    const ChunkMemory lines(b, memory);
    const int first_step = b.chunk_of(b.visit_begin), last_step = b.chunk_of(b.visit_end - 1);
    const bool enters = b.visit_begin > 0, leaves = b.visit_end < b.length;
    // The sum over k of w_k dh that the line visited next sends here.
    Sums carry = load<Sums>(p.carries + b.boundary((last_step + 1) & 1), b.active && leaves);
    Real merge_sum = Real(0);
    start_together();
#pragma unroll 1
    for (int step = last_step; step >= first_step; --step) {
        forget(b.channel);
        forget(b.d);
        forget(b.way.n);
        forget(b.way.batch);
        b.place_visits(step, 1);
        recompute_states(b, edges, lines, step);
        walk_back(b, edges, lines, merge, carry, merge_sum);
    }
    store(p.carries + b.boundary(first_step & 1), carry, b.is_owned && enters);
    const Real block_total = block_sum(merge_sum, lines.scratch);
    const bool leader = threadIdx.x == 0 && threadIdx.y == 0;
    store(p.merge_sums + b.d * p.merge_blocks + p.merge_offset + blockIdx.x, block_total, leader);
}
#endif
