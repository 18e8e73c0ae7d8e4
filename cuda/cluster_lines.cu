// Planes that eight blocks keep on chip together: the blocks of a cluster split the positions of every line into
// strips, hold the sum over directions in their shared memory and hand each other the edges of their strips.
#include "cluster.cuh"

namespace gspn {

constexpr int AHEAD = 4;  // lines that are on their way while one is computed

struct Inputs {
    Stream<const Element> x, logits, input_gate;

    __device__ Inputs(const Problem& p, const Thread& t, const Path& path)
        : x(p.x, p.x_stride, path.way, t.channel),
          logits(p.weight_logits, p.weight_logits_stride, path.way,
                 path.d * p.weight_logits_stride[3] + logit_of(p, t.channel)),
          input_gate(p.input_gate, p.input_gate_stride, path.way, path.d * p.input_gate_stride[3] + t.channel) {}
};

__device__ __forceinline__ Stream<const Element> output_gate_of(const Problem& p, const Thread& t, const Path& path) {
    return {p.output_gate, p.output_gate_stride, path.way, path.d * p.output_gate_stride[3] + t.channel};
}

struct LineInputs {
    LineLogits logits;
    Channels x, input_gate;

    __device__ LineInputs() : logits(), x(), input_gate() {}
    __device__ void load_line(const Problem& p, Inputs& inputs, const Path& path, int visit, int end) {
        const bool wanted = path.visits(visit) && visit < end;
        logits.refresh(inputs.logits.at, p.weight_logits_stride[4], wanted && visit > 0, path.has_previous,
                       path.has_next);
        load_into(x, inputs.x.at, wanted);
        load_into(input_gate, inputs.input_gate.at, wanted);
        inputs.logits.move(1);
        inputs.x.move(1);
        inputs.input_gate.move(1);
    }
};

// Walk the first `end` lines. With OUTPUT the contributions to y are added up in `kept`, without the states at the end
// of every LINES lines are left there.
template <bool OUTPUT>
__device__ __forceinline__ void walk(const Problem& p, const Thread& t, const Path& path, Edges& edges, int end,
                                     Real* states, Real* kept) {
    const int line_size = t.line_size();
    const Real merge = OUTPUT ? merge_weight(p, path.d) : Real(0);
    Inputs inputs(p, t, path);
    Stream<const Element> output_gate = output_gate_of(p, t, path);
    LineInputs lines[AHEAD];
    Channels gates[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        lines[i].load_line(p, inputs, path, i, end);
        gates[i] = load<Channels>(output_gate.at, OUTPUT && path.visits(i));
        output_gate.move(1);
    }
    path.clear_sides(t, states);
    path.clear_sides(t, states + line_size);
    Real *const own = t.place(states), *const own_kept = t.place(kept);
    Place place(t, path, 0);
#pragma unroll 1
    for (int first = 0; first < end; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int visit = first + i;
            if (visit >= end) break;
            const bool active = path.visits(visit);
            Sums h = {}, contribution;
            if (visit > 0 && active) h = propagate(lines[i].logits, Neighbours(own + (~i & 1) * line_size, t.width));
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                h.item[v] += lines[i].input_gate[v] * lines[i].x[v];
                if (OUTPUT) contribution.item[v] = merge * gates[i][v] * h.item[v];
            }
            const bool keeps = !OUTPUT && (visit + 1) % LINES == 0;
            edges.put_state(t, path, own + (i & 1) * line_size, h);
            if (keeps) edges.put_state(t, path, own_kept + visit / LINES * line_size, h);
            if (OUTPUT) {
                if (active) place.add(t, kept, contribution);
                place.move();
            }
            edges.end_line(path, keeps ? 2 : 1);
            lines[i].load_line(p, inputs, path, visit + AHEAD, end);
            if (OUTPUT) load_into(gates[i], output_gate.at, path.visits(visit + AHEAD));
            output_gate.move(1);
            edges.await_neighbours(path);
        }
    }
}

// Where the walks that run side by side keep what is theirs alone, behind the sums that they share.
__device__ __forceinline__ Real* own_memory(const Thread& t, unsigned char* memory, int lines) {
    return shared_sums(memory) + CLUSTER * t.tile_tokens() * t.width + threadIdx.z * lines * t.line_size();
}

// What the recurrence of one chunk of a direction needs, in registers, and its states in shared memory.
struct Chunk {
    int begin, count;
    // This thread's place on lines in shared memory.
    Real* states;    // a line for each of its lines
    Real* entering;  // the line before the first
    Real* messages;  // two lines in turn, each to n - 1 and to n + 1
    LineInputs lines[LINES];

    __device__ Real* before(int i, int line_size) const { return i > 0 ? states + (i - 1) * line_size : entering; }
};

// All loads are independent of the states, so they are in flight together.
__device__ __forceinline__ void recompute_states(const Problem& p, const Thread& t, const Path& path, Edges& edges,
                                                 Chunk& chunk) {
    const int line_size = t.line_size();
    Inputs inputs(p, t, path);
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        if (i < chunk.count) chunk.lines[i].load_line(p, inputs, path, chunk.begin + i, path.steps);
    }
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        if (i < chunk.count) {
            const int visit = chunk.begin + i;
            Sums h = {};
            if (visit > 0 && path.visits(visit)) {
                h = propagate(chunk.lines[i].logits, Neighbours(chunk.before(i, line_size), t.width));
            }
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) h.item[v] += chunk.lines[i].input_gate[v] * chunk.lines[i].x[v];
            edges.put_state(t, path, chunk.states + i * line_size, h);
            edges.end_line(path, 1);
            edges.await_neighbours(path);
        }
    }
}

// `carry` is the sum over k of w_k dh that the line visited next sends here.
__device__ __forceinline__ void walk_back(const Problem& p, const Thread& t, const Path& path, Edges& edges,
                                          const Chunk& chunk, Real* total, Real merge, Sums& carry, Real& merge_sum) {
    int line_size = t.line_size();
    forget(line_size);
    Stream<const Element> output_gate = output_gate_of(p, t, path);
    Stream<const Element> grad_y(p.grad_y, p.grad_y_stride, path.way, t.channel);
    Cell cell(p, path.way, path.d);
    const LogitGradients grad_logits(p, t.channel);
    Place place(t, path, chunk.begin + chunk.count - 1);
    cell.move(chunk.count - 1);
    output_gate.move(chunk.count - 1);
    grad_y.move(chunk.count - 1);
    Channels gates[AHEAD], grads[AHEAD];
    const auto load_ahead = [&](int i) {
        if (i < 0 || i >= chunk.count) return;
        gates[i % AHEAD] = load<Channels>(output_gate.at, path.visits(chunk.begin + i));
        grads[i % AHEAD] = load<Channels>(grad_y.at, path.visits(chunk.begin + i));
        output_gate.move(-1);
        grad_y.move(-1);
    };
#pragma unroll
    for (int i = LINES - 1 + AHEAD; i >= 0; --i) {
        if (i >= LINES || i >= chunk.count) {
            load_ahead(i - AHEAD);
        } else {
            const int visit = chunk.begin + i;
            const bool active = path.visits(visit);
            const LineInputs& line = chunk.lines[i < LINES ? i : 0];
            const Channels gate = gates[i % AHEAD], grad = grads[i % AHEAD];
            Sums h = {}, dh, grad_output_gate, grad_input_gate, grad_x;
            if (active) h = *reinterpret_cast<const Sums*>(chunk.states + i * line_size);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                const Real g = merge * grad[v];
                dh.item[v] = gate[v] * g + carry.item[v];
                grad_output_gate.item[v] = g * h.item[v];
                if (active) merge_sum += grad[v] * gate[v] * h.item[v];
                grad_input_gate.item[v] = line.x[v] * dh.item[v];
                grad_x.item[v] = line.input_gate[v] * dh.item[v];
            }
            if (active) place.add(t, total, grad_x);
            place.move_back();

            Messages to;
            Real* to_previous = chunk.messages + (i & 1) * 2 * line_size;
            Real* to_next = to_previous + line_size;
            if (visit > 0 && active) {
                const Neighbours from(chunk.before(i, line_size), t.width);
                to = Messages(line.logits, from, dh);
                *reinterpret_cast<Sums*>(to_previous) = to.before;
                *reinterpret_cast<Sums*>(to_next) = to.after;
            }
            carry = to.same;
            edges.send_previous(t, path, to_previous, to.before);
            edges.send_next(t, path, to_next, to.after);
            edges.end_line(path, 1);
            load_ahead(i - AHEAD);
            store(cell.in(p.grad_input_gate, p.channels, t.channel), narrow_all(grad_input_gate), active);
            store(cell.in(p.grad_output_gate, p.channels, t.channel), narrow_all(grad_output_gate), active);
            grad_logits.put(to.gradient, cell, active, path.has_previous, path.has_next);
            cell.move(-1);
            edges.await_neighbours(path);
            if (visit > 0 && active) {
                const Sums from_previous = *reinterpret_cast<const Sums*>(to_next - t.width);
                const Sums from_next = *reinterpret_cast<const Sums*>(to_previous + t.width);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
            }
        }
    }
}

}  // namespace gspn

#if !GSPN_BACKWARD

// grid: clusters of slabs x batch; block: (slab / VECTOR, positions of a strip, walks side by side); shared: two
// counters per walk, sum of y, two lines of states per walk.
extern "C" __global__ void __cluster_dims__(GSPN_CLUSTER, 1, 1) __launch_bounds__(GSPN_FORWARD_THREADS, 1)
    gspn_scan_forward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    const Thread t(p);
    Real* total = shared_sums(memory);
    Edges edges(memory);
    clear(total, t);
    cluster_barrier();
    bool columns = true;
#pragma unroll 1
    for (int orientation = 0; orientation < 2; ++orientation) {
        const int count = start_orientation(p, t, orientation, total, columns);
#pragma unroll 1
        for (int first = 0; first < count; first += blockDim.z) {
            const Path path(p, t, columns, first + threadIdx.z);
            walk<true>(p, t, path, edges, path.steps, own_memory(t, memory, 2), total);
        }
    }
    store_plane(p, t, total, columns, p.y);
}

#else

// grid and block as above; shared: counters, sum of grad_x; per walk LINES lines of states, four of messages and the
// states at the ends of all chunks but the last; per walk 32 values for a sum.
extern "C" __global__ void __cluster_dims__(GSPN_CLUSTER, 1, 1) __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_scan_backward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    const Thread t(p);
    Real* total = shared_sums(memory);
    Edges edges(memory);
    clear(total, t);
    cluster_barrier();
    bool columns = true;
    const Index slots = p.merge_blocks / gridDim.x;
#pragma unroll 1
    for (int orientation = 0; orientation < 2; ++orientation) {
        const int count = start_orientation(p, t, orientation, total, columns);
#pragma unroll 1
        for (int first = 0; first < count; first += blockDim.z) {
            Path path(p, t, columns, first + threadIdx.z);
            const int chunks = (path.steps - 1) / LINES + 1, line_size = t.line_size();
            const int own_lines = static_cast<int>(p.chunk) + 4;
            Real* states = own_memory(t, memory, own_lines);
            Real* ends = states + (LINES + 4) * line_size;
            Real* scratch = states + (blockDim.z - threadIdx.z) * own_lines * line_size;
#pragma unroll 1
            for (int i = 0; i < own_lines; ++i) path.clear_sides(t, states + i * line_size);
            walk<false>(p, t, path, edges, (chunks - 1) * LINES, states, ends);
            Chunk chunk;
            chunk.states = t.place(states);
            chunk.messages = chunk.states + LINES * line_size;
            forget_shared(chunk.states);
            forget_shared(chunk.messages);

            const Real merge = merge_weight(p, path.d);
            Real merge_sum = Real(0);
            Sums carry = {};
#pragma unroll 1
            for (int c = chunks - 1; c >= 0; --c) {
                chunk.begin = c * LINES;
                chunk.count = path.steps - chunk.begin < LINES ? path.steps - chunk.begin : LINES;
                chunk.entering = t.place(ends + (c - 1) * line_size);
                path.go_to(chunk.begin);
                recompute_states(p, t, path, edges, chunk);
                walk_back(p, t, path, edges, chunk, total, merge, carry, merge_sum);
            }
            const Real sum = block_sum(merge_sum, scratch + threadIdx.z * 32);
            const bool leader = threadIdx.x == 0 && threadIdx.y == 0 && path.exists;
            const Index slot = blockIdx.x * slots + path.start / path.steps;
            store(p.merge_sums + path.d * p.merge_blocks + slot, sum, leader);
        }
    }
    store_plane(p, t, total, columns, p.grad_x);
}

#endif
