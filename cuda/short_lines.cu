// Short lines: a block keeps one image's plane of a slab of channels on chip for all directions, so that tokens,
// logits and gates are moved once each way. Derivation and figures: README.md.
#include "common.cuh"

namespace gspn {

// One thread per position on a line and VECTOR channels; threadIdx.x walks the channels, so each access of a warp is a
// run of whole rows whichever way the lines lie.
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
    __device__ Sums& sums(Real* plane, int row) const {
        return *reinterpret_cast<Sums*>(plane + row * width + column_offset);
    }
    __device__ Channels& stored(Element* plane, int row) const {
        return *reinterpret_cast<Channels*>(plane + row * width + column_offset);
    }
};

// The lines of one direction and where they lie in the plane.
struct Path {
    Way way;
    int lines, positions, window;
    int first_token, token_step;  // of this thread in the plane
    bool has_previous, has_next, active;

    __device__ Path(const Problem& p, const Thread& t, Index code) {
        way.columns = visits_columns(code);
        way.backwards = visits_backwards(code);
        lines = static_cast<int>(way.columns ? p.width : p.height);
        positions = static_cast<int>(way.columns ? p.height : p.width);
        window = p.window > 0 && p.window < lines ? static_cast<int>(p.window) : lines;
        way.batch = t.batch;
        way.n = t.position;
        way.first = way.backwards ? lines - 1 : 0;
        first_token = static_cast<int>(way.row() * p.width + way.column());
        token_step = static_cast<int>(way.signed_step(p.width, 1));
        has_previous = t.position > 0;
        has_next = t.position + 1 < positions;
        active = t.has_channels && t.position < positions;
    }
    // Visits before the state restarts for the first time; then every `window` visits. Segments are cut by absolute
    // index, so backwards the first one is what remains.
    __device__ int first_segment() const { return way.backwards ? (lines - 1) % window + 1 : window; }
    __device__ unsigned restart_mask() const {
        unsigned mask = 1;
        for (int visit = first_segment(); visit < lines; visit += window) mask |= 1u << visit;
        return mask;
    }
};

// The states of the line before around one thread's position.
struct Neighbours {
    Sums before, same, after;

    __device__ Neighbours(const Thread& t, const Path& path, Real* states) : before(), same(), after() {
        if (!path.active) return;
        same = t.sums(states, t.position);
        if (path.has_previous) before = t.sums(states, t.position - 1);
        if (path.has_next) after = t.sums(states, t.position + 1);
    }
};

__device__ __forceinline__ void propagate(const Path& path, const Logits (&logits)[3], const Neighbours& from,
                                          Sums& h) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        const Weights w(logits, v, path.has_previous, path.has_next);
        h.item[v] += w.weight[0] * from.before.item[v] + w.weight[1] * from.same.item[v] +
                     w.weight[2] * from.after.item[v];
    }
}

// The gates and logits of one direction, line after line.
struct Inputs {
    Stream<const Element> logits, input_gate, output_gate;

    __device__ Inputs(const Problem& p, const Thread& t, const Way& way, Index d)
        : logits(p.weight_logits, p.weight_logits_stride, way, d * p.weight_logits_stride[3] + logit_of(p, t.channel)),
          input_gate(p.input_gate, p.input_gate_stride, way, d * p.input_gate_stride[3] + t.channel),
          output_gate(p.output_gate, p.output_gate_stride, way, d * p.output_gate_stride[3] + t.channel) {}
};

struct LineInputs {
    Logits logits[3];
    Channels input_gate, output_gate;

    __device__ void load_line(const Problem& p, Inputs& inputs, bool wanted, bool restart) {
        load_logits(inputs.logits.at, p.weight_logits_stride[4], wanted && !restart, logits);
        input_gate = load<Channels>(inputs.input_gate.at, wanted);
        output_gate = load<Channels>(inputs.output_gate.at, wanted);
        inputs.logits.move(1);
        inputs.input_gate.move(1);
        inputs.output_gate.move(1);
    }
};

// Load the block's part of a tensor of tokens into shared memory.
__device__ __forceinline__ void load_plane(const Problem& p, const Thread& t, const Element* tensor,
                                           const Index* strides, Element* plane) {
    const int tokens = static_cast<int>(p.height * p.width), width = static_cast<int>(p.width);
    for (int first = 0; first < tokens; first += blockDim.y) {
        const int token = first + t.position;
        const bool active = t.has_channels && token < tokens;
        const Element* at = tensor + t.batch * strides[0] + token / width * strides[1] + token % width * strides[2];
        const Channels channels = load<Channels>(at + t.channel, active);
        if (active) t.stored(plane, token) = channels;
    }
}

__device__ __forceinline__ void store_plane(const Problem& p, const Thread& t, Element* tensor, Real* plane) {
    const int tokens = static_cast<int>(p.height * p.width);
    for (int first = 0; first < tokens; first += blockDim.y) {
        const int token = first + t.position;
        const bool active = t.has_channels && token < tokens;
        Channels channels = {};
        if (active) channels = narrow_all(t.sums(plane, token));
        store(tensor + (Index(t.batch) * tokens + token) * p.channels + t.channel, channels, active);
    }
}

}  // namespace gspn

// grid: slabs x batch; block: (slab / VECTOR, at least the longest line); shared: y, two lines of states, x.
extern "C" __global__ void __launch_bounds__(GSPN_FORWARD_THREADS, 1) gspn_scan_forward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    const Thread t(p);
    const int plane_size = static_cast<int>(p.height * p.width) * t.width, line_size = blockDim.y * t.width;
    Real* y_plane = reinterpret_cast<Real*>(memory);
    Real* states = y_plane + plane_size;
    Element* x_plane = reinterpret_cast<Element*>(states + 2 * line_size);

    load_plane(p, t, p.x, p.x_stride, x_plane);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < p.directions; ++d) {
        const Path path(p, t, p.code[d]);
        const Real merge = merge_weight(p, d);
        Inputs inputs(p, t, path.way, d);
        LineInputs next;
        next.load_line(p, inputs, path.active, true);
        bool restart = true;
        int left = path.first_segment() - 1;  // visits before the next restart
        int token = path.first_token;
#pragma unroll 1
        for (int visit = 0; visit < path.lines; ++visit) {
            const LineInputs now = next;
            next.load_line(p, inputs, path.active && visit + 1 < path.lines, left == 0);
            Sums h = {};
            if (!restart) {
                propagate(path, now.logits, Neighbours(t, path, states + ((visit + 1) & 1) * line_size), h);
            }
            if (path.active) {
                const Channels x = t.stored(x_plane, token);
                Sums y = {};
                if (d > 0) y = t.sums(y_plane, token);
#pragma unroll
                for (int v = 0; v < VECTOR; ++v) {
                    h.item[v] += now.input_gate[v] * x[v];
                    y.item[v] += merge * now.output_gate[v] * h.item[v];
                }
                t.sums(states + (visit & 1) * line_size, t.position) = h;
                t.sums(y_plane, token) = y;
            }
            token += path.token_step;
            restart = left == 0;
            left = (restart ? path.window : left) - 1;
            __syncthreads();  // forward line
        }
    }
    store_plane(p, t, p.y, y_plane);
}

// grid and block as above; shared: grad_x, the states of one direction, two lines of messages, x, grad_y, four lines
// of gates.
extern "C" __global__ void __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_scan_backward_kernel(const gspn::Problem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    __shared__ Real scratch[32];
    Thread t(p);
    const int plane_size = static_cast<int>(p.height * p.width) * t.width, line_size = blockDim.y * t.width;
    Real* grad_plane = reinterpret_cast<Real*>(memory);
    Real* states = grad_plane + plane_size;
    Real* messages = states + plane_size;  // [two lines, to n - 1 or n + 1, position, channel]
    Element* x_plane = reinterpret_cast<Element*>(messages + 4 * line_size);
    Element* grad_y_plane = x_plane + plane_size;
    Element* last_gates = grad_y_plane + plane_size;  // input gates of the last lines

    load_plane(p, t, p.x, p.x_stride, x_plane);
    load_plane(p, t, p.grad_y, p.grad_y_stride, grad_y_plane);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < p.directions; ++d) {
        forget(t.channel);
        forget(t.batch);
        forget(t.position);
        const Path path(p, t, p.code[d]);
        const Real merge = merge_weight(p, d);
        const unsigned restarts = path.restart_mask();
        const int state_size = path.positions * t.width, n = t.position, rows = blockDim.y;
        Inputs inputs(p, t, path.way, d);

        // What the recurrence needs stays in registers, so that the way back reads nothing twice. The way back begins
        // with all of them full and some more in use: the input gates of the last lines wait in shared memory.
        constexpr int KEPT = LINES - SPARED_GATES;
        Logits logits[LINES][3];
        Channels gates[KEPT];
        const auto spared = [&](int visit) -> Channels& { return t.stored(last_gates, (visit - KEPT) * rows + n); };
#pragma unroll
        for (int visit = 0; visit < LINES; ++visit) {
            if (visit < path.lines) {
                const bool wanted = path.active && !(restarts >> visit & 1);
                load_logits(inputs.logits.at, p.weight_logits_stride[4], wanted, logits[visit]);
                const Channels gate = load<Channels>(inputs.input_gate.at, path.active);
                if (visit < KEPT) {
                    gates[visit < KEPT ? visit : 0] = gate;
                } else if (path.active) {
                    spared(visit) = gate;
                }
                inputs.logits.move(1);
                inputs.input_gate.move(1);
            }
        }
        int token = path.first_token;
        Real* line = states;  // of this visit
#pragma unroll
        for (int visit = 0; visit < LINES; ++visit) {
            if (visit < path.lines) {
                Sums h = {};
                if (!(restarts >> visit & 1)) propagate(path, logits[visit], Neighbours(t, path, line - state_size), h);
                if (path.active) {
                    const Channels x = t.stored(x_plane, token);
                    const Channels gate = visit < KEPT ? gates[visit < KEPT ? visit : 0] : spared(visit);
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) h.item[v] += gate[v] * x[v];
                    t.sums(line, t.position) = h;
                }
                token += path.token_step;
                line += state_size;
                __syncthreads();  // state line
            }
        }

        GatePlace place(p, path.way, t.channel, d);
        LogitGradients grad_logits(p, path.way, t.channel, d);
        place.move(path.lines - 1);
        grad_logits.move(path.lines - 1);
        inputs.output_gate.move(path.lines - 1);
        Channels next_gate = load<Channels>(inputs.output_gate.at, path.active);
        Real merge_sum = Real(0);
        Sums carry = {};  // sum over k of w_k dh that the line visited next sends here
#pragma unroll
        for (int visit = LINES - 1; visit >= 0; --visit) {
            if (visit < path.lines) {
                token -= path.token_step;
                line -= state_size;
                const Channels output_gate = next_gate;
                inputs.output_gate.move(-1);
                if (visit > 0) next_gate = load<Channels>(inputs.output_gate.at, path.active);
                Sums dh = {}, grad_output_gate = {}, grad_input_gate = {};
                if (path.active) {
                    const Sums h = t.sums(line, t.position);
                    const Channels x = t.stored(x_plane, token), grad_y = t.stored(grad_y_plane, token);
                    const Channels input_gate = visit < KEPT ? gates[visit < KEPT ? visit : 0] : spared(visit);
                    Sums grad_x = {};
                    if (d > 0) grad_x = t.sums(grad_plane, token);
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) {
                        const Real g = grad_y[v], u = output_gate[v];
                        dh.item[v] = merge * u * g + carry.item[v];
                        grad_output_gate.item[v] = merge * g * h.item[v];
                        merge_sum += g * u * h.item[v];
                        grad_input_gate.item[v] = x[v] * dh.item[v];
                        grad_x.item[v] += input_gate[v] * dh.item[v];
                    }
                    t.sums(grad_plane, token) = grad_x;
                }
                store(p.grad_input_gate + place.offset, narrow_all(grad_input_gate), path.active);
                store(p.grad_output_gate + place.offset, narrow_all(grad_output_gate), path.active);

                LineGradient gradient;
                carry = Sums{};
                Real* to_previous = messages + (visit & 1) * 2 * line_size;
                Real* to_next = to_previous + line_size;
                if (!(restarts >> visit & 1)) {
                    const Neighbours from(t, path, line - state_size);
                    Sums previous, next;
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) {
                        const Weights w(logits[visit], v, path.has_previous, path.has_next);
                        Real slope[3];
                        w.gradients(from.before.item[v], from.same.item[v], from.after.item[v], path.has_previous,
                                    path.has_next, slope);
                        gradient.add(v, slope, dh.item[v]);
                        previous.item[v] = w.weight[0] * dh.item[v];
                        carry.item[v] = w.weight[1] * dh.item[v];
                        next.item[v] = w.weight[2] * dh.item[v];
                    }
                    if (path.active) {
                        t.sums(to_previous, t.position) = previous;
                        t.sums(to_next, t.position) = next;
                    }
                }
                grad_logits.put(gradient, place, path.active);
                grad_logits.move(-1);
                place.move(-1);
                __syncthreads();  // gradient line
                if (!(restarts >> visit & 1) && path.active) {
                    Sums from_previous = {}, from_next = {};
                    if (path.has_previous) from_previous = t.sums(to_next, t.position - 1);
                    if (path.has_next) from_next = t.sums(to_previous, t.position + 1);
#pragma unroll
                    for (int v = 0; v < VECTOR; ++v) carry.item[v] += from_previous.item[v] + from_next.item[v];
                }
            }
        }
        const Real total = block_sum(merge_sum, scratch);
        store(p.merge_sums + d * p.merge_blocks + blockIdx.x, total, threadIdx.x == 0 && threadIdx.y == 0);
    }
    store_plane(p, t, p.grad_x, grad_plane);
}
