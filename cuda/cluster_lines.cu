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
    Logits logits[3];
    Channels x, input_gate;

    __device__ void load_line(const Problem& p, Inputs& inputs, const Path& path, int visit, int end) {
        const bool wanted = path.active && visit < end;
        load_logits(inputs.logits.at, p.weight_logits_stride[4], wanted && !path.restarts(visit), logits);
        x = load<Channels>(inputs.x.at, wanted);
        input_gate = load<Channels>(inputs.input_gate.at, wanted);
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
        gates[i] = load<Channels>(output_gate.at, OUTPUT && path.active && i < end);
        output_gate.move(1);
    }
#pragma unroll 1
    for (int first = 0; first < end; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int visit = first + i;
            if (visit < end) {
                Sums h = {}, contribution;
                if (!path.restarts(visit)) {
                    propagate(path, lines[i].logits, Neighbours(t, path, states + (~visit & 1) * line_size), h);
                }
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    h.item[v] += lines[i].input_gate[v] * lines[i].x[v];
                    if (OUTPUT) contribution.item[v] = merge * gates[i][v] * h.item[v];
                }
                const bool keeps = !OUTPUT && (visit + 1) % LINES == 0;
                edges.put_state(t, path, states + (visit & 1) * line_size, h);
                if (keeps) edges.put_state(t, path, kept + visit / LINES * line_size, h);
                if (OUTPUT) add_to(kept, t, path, visit, contribution);
                edges.end_line(path, keeps ? 2 : 1);
                lines[i].load_line(p, inputs, path, visit + AHEAD, end);
                gates[i] = load<Channels>(output_gate.at, OUTPUT && path.active && visit + AHEAD < end);
                output_gate.move(1);
                edges.await_neighbours(path);
            }
        }
    }
}

// Where the directions that run side by side keep what is theirs alone, behind the sums that they share.
__device__ __forceinline__ Real* own_memory(const Thread& t, unsigned char* memory, int lines) {
    return shared_sums(memory) + CLUSTER * t.tile_tokens() * t.width + threadIdx.z * lines * t.line_size();
}

// What the recurrence of one chunk of a direction needs, in registers, and its states in shared memory.
struct Chunk {
    int begin, count;
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
        if (i < chunk.count) chunk.lines[i].load_line(p, inputs, path, chunk.begin + i, path.lines);
    }
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        if (i < chunk.count) {
            Sums h = {};
            if (!path.restarts(chunk.begin + i)) {
                propagate(path, chunk.lines[i].logits, Neighbours(t, path, chunk.before(i, line_size)), h);
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
    const int line_size = t.line_size();
    Stream<const Element> output_gate = output_gate_of(p, t, path);
    Stream<const Element> grad_y(p.grad_y, p.grad_y_stride, path.way, t.channel);
    GatePlace place(p, path.way, t.channel, path.d);
    LogitGradients grad_logits(p, path.way, t.channel, path.d);
    place.move(chunk.count - 1);
    grad_logits.move(chunk.count - 1);
    output_gate.move(chunk.count - 1);
    grad_y.move(chunk.count - 1);
    Channels gates[AHEAD], grads[AHEAD];
    const auto load_ahead = [&](int i) {
        if (i < 0 || i >= chunk.count) return;
        gates[i % AHEAD] = load<Channels>(output_gate.at, path.active);
        grads[i % AHEAD] = load<Channels>(grad_y.at, path.active);
        output_gate.move(-1);
        grad_y.move(-1);
    };
#pragma unroll
    for (int i = LINES - 1 + AHEAD; i >= 0; --i) {
        if (i >= LINES || i >= chunk.count) {
            load_ahead(i - AHEAD);
        } else {
            const bool restart = path.restarts(chunk.begin + i);
            const LineInputs& line = chunk.lines[i < LINES ? i : 0];
            const Channels gate = gates[i % AHEAD], grad = grads[i % AHEAD];
            Sums h = {}, dh, grad_output_gate, grad_input_gate, grad_x;
            if (path.active) h = t.sums(chunk.states + i * line_size, t.row + 1);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) {
                dh.item[v] = merge * gate[v] * grad[v] + carry.item[v];
                grad_output_gate.item[v] = merge * grad[v] * h.item[v];
                if (path.active) merge_sum += grad[v] * gate[v] * h.item[v];
                grad_input_gate.item[v] = line.x[v] * dh.item[v];
                grad_x.item[v] = line.input_gate[v] * dh.item[v];
            }
            add_to(total, t, path, chunk.begin + i, grad_x);

            LineGradient gradient;
            carry = Sums{};
            Real* previous_line = chunk.messages + (i & 1) * 2 * line_size;
            Real* next_line = previous_line + line_size;
            Sums to_previous = {}, to_next = {};
            if (!restart) {
                const Neighbours from(t, path, chunk.before(i, line_size));
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    const Weights w(line.logits, v, path.has_previous, path.has_next);
                    Real slope[3];
                    w.gradients(from.before.item[v], from.same.item[v], from.after.item[v], path.has_previous,
                                path.has_next, slope);
                    gradient.add(v, slope, dh.item[v]);
                    to_previous.item[v] = w.weight[0] * dh.item[v];
                    carry.item[v] = w.weight[1] * dh.item[v];
                    to_next.item[v] = w.weight[2] * dh.item[v];
                }
                if (path.active) {
                    t.sums(previous_line, t.row + 1) = to_previous;
                    t.sums(next_line, t.row + 1) = to_next;
                }
            }
            edges.send_previous(t, path, previous_line, to_previous);
            edges.send_next(t, path, next_line, to_next);
            edges.end_line(path, 1);
            load_ahead(i - AHEAD);
            store(p.grad_input_gate + place.offset, narrow_all(grad_input_gate), path.active);
            store(p.grad_output_gate + place.offset, narrow_all(grad_output_gate), path.active);
            grad_logits.put(gradient, place, path.active);
            grad_logits.move(-1);
            place.move(-1);
            edges.await_neighbours(path);
            if (!restart && path.active) {
                Sums from_previous = {}, from_next = {};
                if (path.has_previous) from_previous = t.sums(next_line, t.row);
                if (path.has_next) from_next = t.sums(previous_line, t.row + 2);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
            }
        }
    }
}

}  // namespace gspn

// grid: clusters of slabs x batch; block: (slab / VECTOR, positions of a strip, directions side by side); shared: sum
// of y, two lines of states per direction.
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
            walk<true>(p, t, path, edges, path.lines, own_memory(t, memory, 2), total);
        }
    }
    store_plane(p, t, total, columns, p.y);
}

// grid and block as above; shared: sum of grad_x; per direction LINES lines of states, four of messages and the states
// at the ends of all chunks but the last; per direction 32 values for a sum.
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
#pragma unroll 1
    for (int orientation = 0; orientation < 2; ++orientation) {
        const int count = start_orientation(p, t, orientation, total, columns);
#pragma unroll 1
        for (int first = 0; first < count; first += blockDim.z) {
            Path path(p, t, columns, first + threadIdx.z);
            const int chunks = (path.lines - 1) / LINES + 1, line_size = t.line_size();
            const int own_lines = LINES + 4 + chunks - 1;
            Chunk chunk;
            chunk.states = own_memory(t, memory, own_lines);
            chunk.messages = chunk.states + LINES * line_size;
            Real* ends = chunk.messages + 4 * line_size;
            Real* scratch = own_memory(t, memory, own_lines) + (blockDim.z - threadIdx.z) * own_lines * line_size;
            walk<false>(p, t, path, edges, (chunks - 1) * LINES, chunk.states, ends);

            const Real merge = merge_weight(p, path.d);
            Real merge_sum = Real(0);
            Sums carry = {};
#pragma unroll 1
            for (int c = chunks - 1; c >= 0; --c) {
                chunk.begin = c * LINES;
                chunk.count = path.lines - chunk.begin < LINES ? path.lines - chunk.begin : LINES;
                chunk.entering = ends + (c - 1) * line_size;
                path.start(chunk.begin);
                recompute_states(p, t, path, edges, chunk);
                walk_back(p, t, path, edges, chunk, total, merge, carry, merge_sum);
            }
            const Real sum = block_sum(merge_sum, scratch + threadIdx.z * 32);
            const bool leader = threadIdx.x == 0 && threadIdx.y == 0 && path.exists;
            store(p.merge_sums + path.d * p.merge_blocks + blockIdx.x, sum, leader);
        }
    }
    store_plane(p, t, total, columns, p.grad_x);
}
