// Short lines: a block keeps one image's plane of a slab of channels on chip for all directions, so that tokens,
// logits and gates are moved once each way. Derivation and figures: README.md.
#include "weights.cuh"

namespace gspn {

// One thread per position on a line and VECTOR channels; threadIdx.x walks the channels, so each access of a warp is a
// run of whole rows whichever way the lines lie. threadIdx.z counts segments of a direction that run side by side.
struct Thread {
    int batch, channel;
    int column_offset;  // of this thread's channels in a row of shared memory
    int position, width;
    bool has_channels;

    __device__ explicit Thread(const Problem& p) {
        const unsigned slabs = static_cast<unsigned>(p.slabs);
        batch = static_cast<int>(blockIdx.x / slabs);
        width = static_cast<int>(p.slab);
        column_offset = threadIdx.x * VECTOR;
        position = threadIdx.y;
        channel = static_cast<int>(blockIdx.x % slabs) * width + column_offset;
        has_channels = channel < p.channels;
    }
    // Lines of states or messages follow each other with one position between them, which is nobody's.
    __device__ int line_size() const { return (blockDim.y + 1) * width; }
    __device__ int size_of_lines(int count) const { return count * line_size() + width; }
    __device__ Sums& sums(Real* plane, int row) const {
        return *reinterpret_cast<Sums*>(plane + row * width + column_offset);
    }
    __device__ Channels& stored(Element* plane, int row) const {
        return *reinterpret_cast<Channels*>(plane + row * width + column_offset);
    }
};

// The lines of one segment of a direction and where they lie in the plane.
struct Path {
    Way way;
    int steps, segments, positions;
    int length;                   // lines of this segment that the thread visits, 0 where it has no position on them
    int first_token, token_step;  // of this thread in the plane
    unsigned sides;               // whether there is a position before this one (1) and after it (2)

    __device__ Path(const Problem& p, const Thread& t, Index code, int segment) {
        way.columns = visits_columns(code);
        way.backwards = visits_backwards(code);
        const int lines = static_cast<int>(way.columns ? p.width : p.height);
        positions = static_cast<int>(way.columns ? p.height : p.width);
        steps = p.window > 0 && p.window < lines ? static_cast<int>(p.window) : lines;
        const int start = segment * steps;
        const bool is_active = t.has_channels && t.position < positions && start < lines;
        length = !is_active ? 0 : start + steps < lines ? steps : lines - start;
        way.batch = t.batch;
        way.n = t.position;
        way.first = way.backwards ? start + length - 1 : start;
        first_token = is_active ? static_cast<int>(way.row() * p.width + way.column()) : 0;
        token_step = static_cast<int>(way.signed_step(p.width, 1));
        sides = (t.position > 0 ? 1 : 0) | (t.position + 1 < positions ? 2 : 0);
        forget(length);  // or both are found anew in every line
        forget(sides);
    }
    __device__ bool has_previous() const { return (sides & 1) != 0; }
    __device__ bool has_next() const { return (sides & 2) != 0; }
    __device__ bool visits(int visit) const { return visit < length; }
    // Nothing comes in from beside so many lines.
    __device__ void clear_sides(const Thread& t, Real* lines, int count) const {
#pragma unroll 1
        for (int i = 0; i <= count; ++i, lines += t.line_size()) {
            if (t.position == 0) t.sums(lines, 0) = Sums{};
            const bool is_inside = positions < static_cast<int>(blockDim.y) && i < count;  // else it is the one above
            if (is_inside && t.position == positions) t.sums(lines, positions + 1) = Sums{};  // its own place
        }
    }
};

__device__ __forceinline__ int segments_of(const Problem& p, Index code) {
    const int lines = static_cast<int>(visits_columns(code) ? p.width : p.height);
    return p.window > 0 && p.window < lines ? (lines - 1) / static_cast<int>(p.window) + 1 : 1;
}

// The gates and logits of one direction, line after line.
struct Inputs {
    Stream<const Element> logits, input_gate, output_gate;

    __device__ Inputs(const Problem& p, const Thread& t, const Way& way, Index d)
        : logits(p.weight_logits, p.weight_logits_stride, way, d * p.weight_logits_stride[3] + logit_of(p, t.channel)),
          input_gate(p.input_gate, p.input_gate_stride, way, d * p.input_gate_stride[3] + t.channel),
          output_gate(p.output_gate, p.output_gate_stride, way, d * p.output_gate_stride[3] + t.channel) {}
};

// Load the block's part of N tensors of tokens into shared memory, one behind the other.
template <int N>
__device__ __forceinline__ void load_planes(const Problem& p, const Thread& t, const Element* const (&tensors)[N],
                                            const Index* const (&strides)[N], Element* planes) {
    const unsigned tokens = static_cast<unsigned>(p.height * p.width), width = static_cast<unsigned>(p.width);
    const unsigned workers = blockDim.y * blockDim.z;
#pragma unroll(4 / N)
    for (unsigned first = 0; first < tokens; first += workers) {
        const unsigned token = first + threadIdx.z * blockDim.y + t.position, row = token / width;
        const bool active = t.has_channels && token < tokens;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Index at = t.batch * strides[i][0] + row * strides[i][1] + (token - row * width) * strides[i][2];
            const Channels channels = load<Channels>(tensors[i] + at + t.channel, active);
            if (active) t.stored(planes, static_cast<int>(i * tokens + token)) = channels;
        }
    }
}

__device__ __forceinline__ void clear_plane(const Problem& p, const Thread& t, Real* plane) {
    const int tokens = static_cast<int>(p.height * p.width), workers = blockDim.y * blockDim.z;
#pragma unroll 1
    for (int token = threadIdx.z * blockDim.y + t.position; token < tokens; token += workers) {
        t.sums(plane, token) = Sums{};
    }
}

__device__ __forceinline__ void store_plane(const Problem& p, const Thread& t, Element* tensor, Real* plane) {
    const int tokens = static_cast<int>(p.height * p.width), workers = blockDim.y * blockDim.z;
#pragma unroll 1
    for (int first = 0; first < tokens; first += workers) {
        const int token = first + threadIdx.z * blockDim.y + t.position;
        const bool active = t.has_channels && token < tokens;
        Channels channels = {};
        if (active) channels = narrow_all(t.sums(plane, token));
        store(tensor + (Index(t.batch) * tokens + token) * p.channels + t.channel, channels, active);
    }
}

}  // namespace gspn

#if !GSPN_BACKWARD

namespace gspn {

constexpr int AHEAD = 2;  // lines that are on their way while one is computed

struct LineInputs {
    LineLogits logits;
    Channels input_gate, output_gate;

    __device__ LineInputs() : logits(), input_gate(), output_gate() {}
    __device__ void load_line(const Problem& p, Inputs& inputs, const Path& path, int visit) {
        const bool wanted = path.visits(visit);
        logits.refresh(inputs.logits.at, p.weight_logits_stride[4], wanted && visit > 0, path.has_previous(),
                       path.has_next());
        load_into(input_gate, inputs.input_gate.at, wanted);
        load_into(output_gate, inputs.output_gate.at, wanted);
        inputs.logits.move(1);
        inputs.input_gate.move(1);
        inputs.output_gate.move(1);
    }
};

// One segment per threadIdx.z. `states` holds two lines, in turn that of this visit and the one before.
__device__ __forceinline__ void walk(const Problem& p, const Thread& t, const Path& path, int d, Real* states,
                                     const Element* x_plane, Real* y_plane) {
    const Real merge = merge_weight(p, d);
    Inputs inputs(p, t, path.way, d);
    LineInputs lines[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) lines[i].load_line(p, inputs, path, i);
    path.clear_sides(t, states, AHEAD);
    Real* line[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) line[i] = &t.sums(states + i * t.line_size(), t.position + 1).item[0];
    const Element* x_at = x_plane + path.first_token * t.width + t.column_offset;
    Real* y_at = y_plane + path.first_token * t.width + t.column_offset;
    const int step = path.token_step * t.width;
#pragma unroll 1
    for (int first = 0; first < path.steps; first += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int visit = first + i;
            if (visit >= path.steps) break;
            Sums h = {};
            const bool active = path.visits(visit);
            if (visit > 0 && active) h = propagate(lines[i].logits, Neighbours(line[1 - i], t.width));
            if (active) {
                const Channels x = *reinterpret_cast<const Channels*>(x_at);
                Sums y = *reinterpret_cast<const Sums*>(y_at);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    h.item[v] += lines[i].input_gate[v] * x[v];
                    y.item[v] += merge * lines[i].output_gate[v] * h.item[v];
                }
                *reinterpret_cast<Sums*>(line[i]) = h;
                *reinterpret_cast<Sums*>(y_at) = y;
            }
            x_at += step;
            y_at += step;
            lines[i].load_line(p, inputs, path, visit + AHEAD);
            __syncthreads();  // forward line
        }
    }
}

}  // namespace gspn

// grid: slabs x batch; block: (slab / VECTOR, at least the longest line, segments side by side); shared: y, two lines
// of states per segment, x.
extern "C" __global__ void __launch_bounds__(GSPN_FORWARD_THREADS, 1) gspn_scan_forward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    const Thread t(p);
    const int plane_size = static_cast<int>(p.height * p.width) * t.width;
    Real* y_plane = reinterpret_cast<Real*>(memory);
    Real* states = y_plane + plane_size + threadIdx.z * t.size_of_lines(AHEAD);
    Element* x_plane = reinterpret_cast<Element*>(y_plane + plane_size + blockDim.z * t.size_of_lines(AHEAD));

    clear_plane(p, t, y_plane);
    load_planes<1>(p, t, {p.x}, {p.x_stride}, x_plane);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < p.directions; ++d) {
        const int segments = segments_of(p, p.code[d]);
#pragma unroll 1
        for (int first = 0; first < segments; first += blockDim.z) {
            walk(p, t, Path(p, t, p.code[d], first + threadIdx.z), d, states, x_plane, y_plane);
        }
    }
    store_plane(p, t, p.y, y_plane);
}

#else

namespace gspn {

// What the recurrence of a segment needs stays in registers, so that the way back reads nothing twice. The way back
// begins with all of them full and some more in use: the input gates of the last lines wait in shared memory.
struct Kept {
    static constexpr int GATES = LINES - SPARED_GATES;
    LineLogits logits[LINES];
    Channels gates[GATES];
    Element* spared;  // [line, position, channel]

    __device__ Channels& spared_gate(const Thread& t, int visit) const {
        return t.stored(spared, (visit - GATES) * blockDim.y + t.position);
    }
    __device__ Channels gate(const Thread& t, int visit) const {
        return visit < GATES ? gates[visit < GATES ? visit : 0] : spared_gate(t, visit);
    }
    __device__ void load_lines(const Problem& p, const Thread& t, const Path& path, Inputs& inputs) {
#pragma unroll
        for (int visit = 0; visit < LINES; ++visit) {
            if (visit >= path.steps) break;
            const bool wanted = path.visits(visit);
            logits[visit] = LineLogits();
            logits[visit].refresh(inputs.logits.at, p.weight_logits_stride[4], wanted && visit > 0, path.has_previous(),
                                  path.has_next());
            const Channels gate = load<Channels>(inputs.input_gate.at, wanted);
            if (visit < GATES) {
                gates[visit < GATES ? visit : 0] = gate;
            } else if (wanted) {
                spared_gate(t, visit) = gate;
            }
            inputs.logits.move(1);
            inputs.input_gate.move(1);
        }
    }
};

// Where a segment keeps its states and the messages between positions: lines with one position more on either side.
struct Lines {
    Real* states;    // a line for every visit
    Real* messages;  // [two lines in turn, to n - 1 or n + 1]

    __device__ Real* state(const Thread& t, int visit) const {
        return &t.sums(states + visit * t.line_size(), t.position + 1).item[0];
    }
    __device__ Real* message(const Thread& t, int turn) const {
        return &t.sums(messages + turn * t.line_size(), t.position + 1).item[0];
    }
};

__device__ __forceinline__ void compute_states(const Thread& t, const Path& path, const Kept& kept, const Lines& lines,
                                               const Element* x_plane) {
    const Element* x_at = x_plane + path.first_token * t.width + t.column_offset;
    int step = path.token_step * t.width, line_size = t.line_size(), width = t.width;
    Real* line = lines.state(t, 0);
    forget(step);
    forget(line_size);
    forget(width);
    forget_shared(x_at);
    forget_shared(line);
#pragma unroll
    for (int visit = 0; visit < LINES; ++visit) {
        if (visit >= path.steps) break;
        Sums h = {};
        if (path.visits(visit)) {
            if (visit > 0) h = propagate(kept.logits[visit], Neighbours(line - line_size, width));
            const Channels x = *reinterpret_cast<const Channels*>(x_at), gate = kept.gate(t, visit);
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) h.item[v] += gate[v] * x[v];
        }
        *reinterpret_cast<Sums*>(line) = h;  // zero without a position on the line
        x_at += step;
        line += line_size;
        __syncthreads();  // state line
    }
}

// Returns this thread's part of the gradient of the merge weight. The plane of grad_y follows that of x.
__device__ __forceinline__ Real walk_back(const Problem& p, const Thread& t, const Path& path, int d, const Kept& kept,
                                          const Lines& lines, Stream<const Element>& output_gate,
                                          const Element* x_plane, Real* grad_plane) {
    const Real merge = merge_weight(p, d);
    const int last = path.steps - 1;
    Cell cell(p, path.way, d);
    const LogitGradients grad_logits(p, t.channel);
    cell.move(last);
    output_gate.move(last);
    const int at = (path.first_token + last * path.token_step) * t.width + t.column_offset;
    int plane_size = static_cast<int>(p.height * p.width) * t.width;
    int step = path.token_step * t.width, line_size = t.line_size(), width = t.width;
    Real *line = lines.state(t, last), *messages = lines.message(t, 0), *grad_at = grad_plane + at;
    const Element* x_at = x_plane + at;
    forget(plane_size);
    forget(step);
    forget(line_size);
    forget(width);
    forget_shared(line);
    forget_shared(messages);
    forget_shared(grad_at);
    forget_shared(x_at);
    Channels next_gate = load<Channels>(output_gate.at, path.visits(last));
    Real merge_sum = Real(0);
    Sums carry = {};  // sum over k of w_k dh that the line visited next sends here
#pragma unroll
    for (int visit = LINES - 1; visit >= 0; --visit) {
        if (visit < path.steps) {
            const bool active = path.visits(visit);
            const Channels output_gate_now = next_gate;
            output_gate.move(-1);
            if (visit > 0) load_into(next_gate, output_gate.at, path.visits(visit - 1));
            Sums dh = {};
            Channels grad_output_gate = {}, grad_input_gate = {};
            if (active) {
                const Sums h = *reinterpret_cast<const Sums*>(line);
                const Channels x = *reinterpret_cast<const Channels*>(x_at);
                const Channels grad_y = *reinterpret_cast<const Channels*>(x_at + plane_size);
                const Channels input_gate = kept.gate(t, visit);
                Sums grad_x = *reinterpret_cast<const Sums*>(grad_at), grad_of_output, grad_of_input;
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    const Real g = merge * grad_y[v], u = output_gate_now[v];
                    dh.item[v] = u * g + carry.item[v];
                    grad_of_output.item[v] = g * h.item[v];
                    merge_sum += grad_y[v] * u * h.item[v];
                    grad_of_input.item[v] = x[v] * dh.item[v];
                    grad_x.item[v] += input_gate[v] * dh.item[v];
                }
                *reinterpret_cast<Sums*>(grad_at) = grad_x;
                grad_output_gate = narrow_all(grad_of_output);
                grad_input_gate = narrow_all(grad_of_input);
            }
            store(cell.in(p.grad_input_gate, p.channels, t.channel), grad_input_gate, active);
            store(cell.in(p.grad_output_gate, p.channels, t.channel), grad_output_gate, active);

            Messages to;
            Real *to_previous = messages + 2 * (visit & 1) * line_size, *to_next = to_previous + line_size;
            if (visit > 0) {
                to = Messages(kept.logits[visit], Neighbours(line - line_size, width), dh);
                // From where dh is zero nothing goes out: threads without a position on the line need no exception.
                *reinterpret_cast<Sums*>(to_previous) = to.before;
                *reinterpret_cast<Sums*>(to_next) = to.after;
            }
            carry = to.same;
            grad_logits.put(to.gradient, cell, active, path.has_previous(), path.has_next());
            cell.move(-1);
            x_at -= step;
            grad_at -= step;
            line -= line_size;
            __syncthreads();  // gradient line
            if (visit > 0) {
                const Sums from_previous = *reinterpret_cast<const Sums*>(to_next - width);
                const Sums from_next = *reinterpret_cast<const Sums*>(to_previous + width);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
            }
        }
    }
    return merge_sum;
}

}  // namespace gspn

// grid and block as above; shared: grad_x; per segment a line of states per visit, four lines of messages, 32 values for
// a sum; x, grad_y, four lines of gates per segment.
extern "C" __global__ void __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_scan_backward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    Thread t(p);
    const int plane_size = static_cast<int>(p.height * p.width) * t.width, line_size = t.line_size();
    const int state_lines = static_cast<int>(p.chunk), own_size = t.size_of_lines(state_lines + 4);
    Real* grad_plane = reinterpret_cast<Real*>(memory);
    const Lines lines = {grad_plane + plane_size + threadIdx.z * own_size,
                         grad_plane + plane_size + threadIdx.z * own_size + state_lines * line_size};
    Real* scratch = grad_plane + plane_size + blockDim.z * own_size;
    Element* x_plane = reinterpret_cast<Element*>(scratch + blockDim.z * 32);
    Element* grad_y_plane = x_plane + plane_size;
    Kept kept;
    kept.spared = grad_y_plane + plane_size + threadIdx.z * SPARED_GATES * blockDim.y * t.width;

    clear_plane(p, t, grad_plane);
    load_planes<2>(p, t, {p.x, p.grad_y}, {p.x_stride, p.grad_y_stride}, x_plane);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < p.directions; ++d) {
        const int segments = segments_of(p, p.code[d]);
        Real merge_sum = Real(0);
#pragma unroll 1
        for (int first = 0; first < segments; first += blockDim.z) {
            forget(t.channel);
            forget(t.batch);
            forget(t.position);
            const Path path(p, t, p.code[d], first + threadIdx.z);
            path.clear_sides(t, lines.states, state_lines + 4);
            Inputs inputs(p, t, path.way, d);
            kept.load_lines(p, t, path, inputs);
            compute_states(t, path, kept, lines, x_plane);
            merge_sum += walk_back(p, t, path, d, kept, lines, inputs.output_gate, x_plane, grad_plane);
        }
        const Real total = block_sum(merge_sum, scratch + threadIdx.z * 32);
        const Index slot = Index(blockIdx.x) * blockDim.z + threadIdx.z;
        store(p.merge_sums + d * p.merge_blocks + slot, total, threadIdx.x == 0 && threadIdx.y == 0);
    }
    store_plane(p, t, p.grad_x, grad_plane);
}

#endif
