// The fused backward pass: a warp scans one direction of eight channels twice, there for the states, which stay in shared
// memory, and back with logits and gates recomputed. The sums of the weights' gradients stay in its registers for all
// images of its block; those of the proxies' in shared memory, where the blocks of a cluster join them.
#include "blocks.cuh"
#include "projected_gradients.cuh"

namespace gspn {

static_assert(TILES == 1, "a lane holds two positions");

// One warp's direction, and eight channels of the slab. Found anew wherever it is used: no register is left to keep it.
struct Share {
    int d, group;

    __device__ explicit Share(const ProjectedProblem& p) {
        int warp = static_cast<int>(threadIdx.y);
        forget(warp);
        d = warp >> static_cast<int>(p.group_bits);
        group = warp - (d << static_cast<int>(p.group_bits));
    }
    __device__ int channel() const { return group * CHANNELS + 2 * lane_column(); }  // a lane's first of two
};

// The first channel of the block's slab, alike.
__device__ __forceinline__ int first_channel_of(const ProjectedProblem& p) {
    int block = static_cast<int>(blockIdx.x);
    forget(block);
    return block * static_cast<int>(p.slab);
}

// Planes of shared memory. The states of all directions take turns with the sums of the skip's gradients of all warps
// before them, and on the way back with what each direction adds to grad_x; `grad_x` has what the skip adds.
struct Planes {
    Element* proxy;
    Real *grad_proxy, *states, *grad_x, *skip_sums;
    Element *skip_rows, *x, *grad_y;
    int state_size;  // of a direction

    __device__ Planes(const ProjectedProblem& p, unsigned char* memory) {
        const int height = static_cast<int>(p.height), skip = p.skip_weight != nullptr ? static_cast<int>(p.slab) : 0;
        state_size = height * static_cast<int>(p.sum_row);
        proxy = reinterpret_cast<Element*>(memory);
        grad_proxy = reinterpret_cast<Real*>(proxy + height * static_cast<int>(p.proxy_row));
        states = grad_proxy + height * static_cast<int>(p.grad_row);
        const int all_states = static_cast<int>(p.directions) * state_size;
        const int scratch = skip != 0 ? static_cast<int>(blockDim.y) * CHANNELS * PROXY : 0;
        grad_x = states + (all_states > scratch ? all_states : scratch);
        skip_sums = grad_x + (skip != 0 ? state_size : 0);
        skip_rows = reinterpret_cast<Element*>(skip_sums + skip * PROXY);
        x = skip_rows + (GSPN_STORAGE >= 2 ? skip * PROXY : 0);
        grad_y = x + height * static_cast<int>(p.x_row);
    }
    __device__ void fill(const ProjectedProblem& p, int image) const {
        const int first_channel = first_channel_of(p);
        const int channels = static_cast<int>(p.channels), slab = static_cast<int>(p.slab);
        const int pitch = static_cast<int>(p.x_pitch), row = static_cast<int>(p.x_row);
        copy_image(p, p.proxy, p.proxy_stride, image, 0, static_cast<int>(p.proxy_channels), PROXY, proxy,
                   static_cast<int>(p.proxy_pitch), static_cast<int>(p.proxy_row));
        copy_image(p, p.x, p.x_stride, image, first_channel, channels, slab, x, pitch, row);
        copy_image(p, p.grad_y, p.grad_y_stride, image, first_channel, channels, slab, grad_y, pitch, row);
    }
};

// Where the sums of a warp's weights' gradients go: [parts, maps, directions, C, P] of global memory.
struct WeightSink {
    Real* first;  // this part's and direction's, of map 0 and the warp's first channel
    Index map_step;
    int inputs, channels;  // that exist

    __device__ explicit WeightSink(const ProjectedProblem& p)
        : map_step(p.directions * p.channels * p.proxy_channels), inputs(static_cast<int>(p.proxy_channels)) {
        const Share share(p);
        const int first_channel = first_channel_of(p) + share.group * CHANNELS;
        channels = static_cast<int>(p.channels) - first_channel;
        const Index channel = share.d * p.channels + first_channel;
        first = p.weight_sums + Index(blockIdx.y) * MAPS * map_step + channel * inputs;
    }
    __device__ void put(int map, int channel, int input, Real sum, bool active = true) const {
        store(first + map * map_step + channel * inputs + input, sum, active && channel < channels && input < inputs);
    }
    __device__ void add(int map, int channel, int input, Real sum, bool active) const {
        const bool exists = active && channel < channels && input < inputs;
        Real* place = first + map * map_step + channel * inputs + input;
        store(place, load<Real>(place, exists) + sum, exists);
    }
};

// The sums of the skip's weights' gradients of one warp and image: eight rows of shared memory.
struct ScratchSink {
    Real* rows;

    __device__ void put(int, int channel, int input, Real sum, bool active = true) const {
        if (active) rows[channel * PROXY + input] = sum;
    }
    __device__ void add(int, int channel, int input, Real sum, bool active) const {
        if (active) rows[channel * PROXY + input] += sum;
    }
};

// The two positions on a line that a lane holds, and the nearest on the line; offsets of tokens in the planes.
struct Positions {
    Lines path;
    int n[2], inside[2];

    __device__ Positions(const ProjectedProblem& p, int d) : path(p, p.code[d]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            n[i] = SPAN * lane_row() + i;
            inside[i] = within(n[i]);
        }
    }
    __device__ int within(int position) const { return position < path.positions ? position : path.positions - 1; }
    __device__ bool exists(int i) const { return n[i] < path.positions; }
    __device__ static int offset(const Lines& path, int line, int position, Index pitch, Index row) {
        const int a = static_cast<int>(pitch), b = static_cast<int>(row);
        return line * path.line_step(a, b) + position * path.position_step(a, b);
    }
    __device__ int in_proxy(const ProjectedProblem& p, int line, int position) const {
        return offset(path, line, within(position), p.proxy_pitch, p.proxy_row);
    }
    __device__ int in_tokens(const ProjectedProblem& p, int line, int i) const {
        return offset(path, line, inside[i], p.x_pitch, p.x_row);
    }
    __device__ int in_sums(const ProjectedProblem& p, int line, int i) const {
        return offset(path, line, inside[i], p.sum_pitch, p.sum_row);
    }
    __device__ int in_grad(const ProjectedProblem& p, int line, int i) const {
        return offset(path, line, inside[i], p.grad_pitch, p.grad_row);
    }
};

// Scan there, a lane's channels 2 t and 2 t + 1, and keep the states.
__device__ __forceinline__ void keep_states(const ProjectedProblem& p, const Map (&maps)[MAPS], const Planes& planes) {
    const Share share(p);
    const Positions at(p, share.d);
    const Lines& path = at.path;
    Real* states = planes.states + share.d * planes.state_size + share.channel();
    Segments segments(path);
    Real h[2][2] = {};
#pragma unroll 1
    for (int visit = 0; visit < path.lines; ++visit) {
        const int line = path.line_of(visit);
        const bool restart = segments.starts(path);
        Real value[MAPS - 1][4];
        project(maps, planes.proxy + at.in_proxy(p, line, at.n[0]), planes.proxy + at.in_proxy(p, line, at.n[1]), value);
        Stored<2> x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            x[i] = *reinterpret_cast<const Stored<2>*>(planes.x + at.in_tokens(p, line, i) + share.channel());
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const Real around[4] = {__shfl_up_sync(0xffffffffu, h[1][c], 4), h[0][c], h[1][c],
                                    __shfl_down_sync(0xffffffffu, h[0][c], 4)};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int j = 2 * i + c;
                Real state = value[3][j] * x[i][c];
                if (!restart) {
                    const Ratios ratios(value[0][j], value[1][j], value[2][j], at.n[i] > 0,
                                        at.n[i] + 1 < path.positions);
                    state += ratios.mean(around[i], around[i + 1], around[i + 2]);
                }
                h[i][c] = state;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (at.exists(i)) {
                *reinterpret_cast<Pack<Real, 2>*>(states + at.in_sums(p, line, i)) = {h[i][0], h[i][1]};
            }
        }
    }
}

// What a warp keeps from line to line on the way back.
struct Back {
    Real carried[2][2];  // to a lane's positions and channels, from the line visited next
    Real merge, merge_sum;
    int left;            // visits before the state restarts
};

// The gradients of one line's values; what comes to grad_x takes the place of the line's states. With g = grad_y, u and v
// the gates, m the merge weight, i + 1 the line visited next:
//   dh[i, n] = m u g + sum of w_k[i+1, n-k] dh[i+1, n-k]     grad u = m g h     grad v = x dh     grad x = v dh
__device__ __forceinline__ void differentiate_line(const ProjectedProblem& p, const Map (&maps)[MAPS],
                                                   const Planes& planes, int visit, Back& back,
                                                   Real (&value)[MAPS][4]) {
    const Share share(p);
    const Positions at(p, share.d);
    const Lines& path = at.path;
    const int line = path.line_of(visit);
    const bool restart = back.left == 0;
    back.left = restart ? (path.window < visit ? path.window : visit) - 1 : back.left - 1;
    project(maps, planes.proxy + at.in_proxy(p, line, at.n[0]), planes.proxy + at.in_proxy(p, line, at.n[1]), value);
    Real* states = planes.states + share.d * planes.state_size + share.channel();
    const int before = restart ? line : path.line_of(visit - 1);
    Stored<2> x[2], g[2];
    Pack<Real, 2> h[2], from[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int place = at.in_tokens(p, line, i) + share.channel();
        x[i] = *reinterpret_cast<const Stored<2>*>(planes.x + place);
        g[i] = *reinterpret_cast<const Stored<2>*>(planes.grad_y + place);
        h[i] = *reinterpret_cast<const Pack<Real, 2>*>(states + at.in_sums(p, line, i));
        from[i] = *reinterpret_cast<const Pack<Real, 2>*>(states + at.in_sums(p, before, i));
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        const Real around[4] = {__shfl_up_sync(0xffffffffu, from[1].item[c], 4), from[0].item[c], from[1].item[c],
                                __shfl_down_sync(0xffffffffu, from[0].item[c], 4)};
        Real message[2][3];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int j = 2 * i + c;
            const Real upstream = at.exists(i) ? g[i][c] : Real(0), in = value[3][j], out = value[4][j];
            const Real dh = at.exists(i) ? back.merge * out * upstream + back.carried[i][c] : Real(0);
            const Ratios ratios(value[0][j], value[1][j], value[2][j], at.n[i] > 0, at.n[i] + 1 < path.positions);
            Real slope[3];
            ratios.slopes(around[i], around[i + 1], around[i + 2], slope);
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                message[i][k] = restart ? Real(0) : ratios.weight[k] * dh;
                value[k][j] = message[i][k] * slope[k];
            }
            value[3][j] = x[i][c] * dh;
            value[4][j] = back.merge * upstream * h[i].item[c];
            back.merge_sum += upstream * out * h[i].item[c];
            h[i].item[c] = in * dh;
        }
        const Real up = __shfl_up_sync(0xffffffffu, message[1][2], 4);
        const Real down = __shfl_down_sync(0xffffffffu, message[0][0], 4);
        back.carried[0][c] = message[0][1] + message[1][0] + (lane_row() > 0 ? up : Real(0));
        back.carried[1][c] = message[1][1] + message[0][2] + (lane_row() < 7 ? down : Real(0));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (at.exists(i)) *reinterpret_cast<Pack<Real, 2>*>(states + at.in_sums(p, line, i)) = h[i];
    }
}

// Walk back from the last line to the first. Warps go in step: each adds to the gradients of the proxies in the slot of
// its orientation and channels, so that no two meet at a token, and the order of sums is fixed.
__device__ __forceinline__ void walk_back(const ProjectedProblem& p, const Map (&maps)[MAPS], const Planes& planes,
                                          const WeightSink& sink, WeightSums<MAPS>& sums, Back& back) {
    const int slots = static_cast<int>(p.slots), steps = static_cast<int>(p.steps);
    {
        const Lines path(p, p.code[Share(p).d]);
        const int segment = path.window < path.lines ? path.window : path.lines;
        back.left = path.backwards ? segment - 1 : (path.lines - 1) % path.window;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) back.carried[0][c] = back.carried[1][c] = Real(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const Lines lines(p, p.code[Share(p).d]);
        // Opposite directions would be at the middle of an odd number of lines together.
        int visit = lines.lines - 1 - step + (lines.backwards ? lines.lines % 2 : 0);
        if (visit < 0 || visit >= lines.lines) {
#pragma unroll 1
            for (int slot = 0; slot < slots; ++slot) __syncthreads();
            continue;
        }
        Real value[MAPS][4];
        differentiate_line(p, maps, planes, visit, back, value);
        const Gradients<MAPS> gradients(value);
        forget(visit);
        sums.add(gradients, [&](unsigned row) {
            const Positions at(p, Share(p).d);
            return planes.proxy + at.in_proxy(p, at.path.line_of(visit), static_cast<int>(SPAN * (row % 8) + row / 8));
        }, sink);
        const ProxyGradient<MAPS> product(maps, gradients);
        forget(visit);
        const Share share(p);
        const Positions at(p, share.d);
        const int line = at.path.line_of(visit), groups = static_cast<int>(p.slab) / CHANNELS;
        const int own = share.group + (slots > groups && !at.path.columns ? groups : 0);
#pragma unroll 1
        for (int slot = 0; slot < slots; ++slot) {
            if (slot == own) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    product.put(i, planes.grad_proxy + at.in_grad(p, line, i), true, at.exists(i));
                }
            }
            __syncthreads();  // slot
        }
    }
}

// The skip's map for eight channels of the slab.
__device__ __forceinline__ void load_skip([[maybe_unused]] const ProjectedProblem& p,
                                          [[maybe_unused]] const Planes& planes, int group, Map (&map)[1]) {
    const int first = group * CHANNELS;
#if GSPN_STORAGE >= 2
    map[0].load_shared(planes.skip_rows + (first + lane_row()) * PROXY);
#else
    map[0].load_rows(static_cast<int>(p.proxy_channels), [&](int n) -> const Element* {
        const int channel = first_channel_of(p) + first + n;
        return channel < p.channels ? p.skip_weight + channel * p.proxy_channels : nullptr;
    });
#endif
}

// An image's gradients begin with the skip's, s ⊙ x with s = skip_weight proxy, or with zero. Warps share the tokens; of
// the weights' gradients each keeps its sum aside, for all to be added in order.
__device__ __forceinline__ void start_gradients(const ProjectedProblem& p, const Planes& planes) {
    const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x), threads = static_cast<int>(blockDim.y * 32);
    if (p.skip_weight == nullptr) {
        const int grad_size = static_cast<int>(p.height * p.grad_row);
#pragma unroll 1
        for (int i = thread; i < grad_size; i += threads) planes.grad_proxy[i] = Real(0);
        return;
    }
    const int columns = static_cast<int>(p.width), tokens = static_cast<int>(p.height) * columns;
    const int warp = static_cast<int>(threadIdx.y), warps = static_cast<int>(blockDim.y);
    const auto place = [&](int token, Index pitch, Index row_pitch) {
        const int inside = token < tokens ? token : tokens - 1, row = inside / columns;
        return row * static_cast<int>(row_pitch) + (inside - row * columns) * static_cast<int>(pitch);
    };
#pragma unroll 1
    for (int group = 0; group < static_cast<int>(p.slab) / CHANNELS; ++group) {
        const int channel = group * CHANNELS + 2 * lane_column();
        Map map[1];
        load_skip(p, planes, group, map);
        const ScratchSink sink{planes.states + warp * CHANNELS * PROXY};
        WeightSums<1> sums;
        sums.start(sink);
#pragma unroll 1
        for (int first = 16 * warp; first < tokens; first += 16 * warps) {
            const auto proxy_of = [&](int row) { return planes.proxy + place(first + row, p.proxy_pitch, p.proxy_row); };
            Real value[1][4];
            project(map, proxy_of(lane_row()), proxy_of(lane_row() + 8), value);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = first + lane_row() + 8 * i, at = place(token, p.x_pitch, p.x_row) + channel;
                const Stored<2> x = *reinterpret_cast<const Stored<2>*>(planes.x + at);
                const Stored<2> g = *reinterpret_cast<const Stored<2>*>(planes.grad_y + at);
                Pack<Real, 2> start;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    start.item[c] = value[0][2 * i + c] * g[c];
                    value[0][2 * i + c] = token < tokens ? x[c] * g[c] : Real(0);
                }
                if (token < tokens) {
                    *reinterpret_cast<Pack<Real, 2>*>(planes.grad_x + place(token, p.sum_pitch, p.sum_row) + channel) =
                        start;
                }
            }
            const Gradients<1> gradients(value);
            sums.add(gradients, proxy_of, sink);
            const ProxyGradient<1> product(map, gradients);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = first + lane_row() + 8 * i;
                product.put(i, planes.grad_proxy + place(token, p.grad_pitch, p.grad_row), group > 0, token < tokens);
            }
        }
        sums.finish(sink);
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < CHANNELS * PROXY; i += threads) {
            Real sum = planes.skip_sums[group * CHANNELS * PROXY + i];
#pragma unroll 1
            for (int other = 0; other < warps; ++other) sum += planes.states[other * CHANNELS * PROXY + i];
            planes.skip_sums[group * CHANNELS * PROXY + i] = sum;
        }
        __syncthreads();
    }
}

// The skip's weights come into shared memory, and the sums of their gradients begin.
__device__ __forceinline__ void start_skip(const ProjectedProblem& p, const Planes& planes) {
    if (p.skip_weight == nullptr) return;
    const int slab = static_cast<int>(p.slab), threads = static_cast<int>(blockDim.y * 32);
#if GSPN_STORAGE >= 2
    const int first_channel = first_channel_of(p);
    copy_rows(slab, PROXY, [&](int row) {
        return weight_row(p, p.skip_weight, first_channel + row, first_channel + row, planes.skip_rows + row * PROXY);
    });
#endif
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.y * 32 + threadIdx.x); i < slab * PROXY; i += threads) {
        planes.skip_sums[i] = Real(0);
    }
}

__device__ __forceinline__ void write_skip(const ProjectedProblem& p, const Planes& planes) {
    if (p.skip_weight == nullptr) return;
    const int first_channel = first_channel_of(p);
    const int inputs = static_cast<int>(p.proxy_channels), channels = static_cast<int>(p.channels) - first_channel;
    const int slab = static_cast<int>(p.slab), threads = static_cast<int>(blockDim.y * 32);
    const int count = (channels < slab ? channels : slab) * inputs;
    Real* sums = p.skip_sums + (Index(blockIdx.y) * p.channels + first_channel) * inputs;
#pragma unroll 1
    for (int first = 0; first < count; first += threads) {
        const int i = first + static_cast<int>(threadIdx.y * 32 + threadIdx.x);
        const bool active = i < count;
        const int row = active ? i / inputs : 0;
        store(sums + i, active ? planes.skip_sums[row * PROXY + i - row * inputs] : Real(0), active);
    }
}

// Write an image's grad_x, the sum over the skip and the directions, four channels of a token per thread.
__device__ __forceinline__ void write_grad_x(const ProjectedProblem& p, const Planes& planes, int image) {
    const int first_channel = first_channel_of(p);
    const int columns = static_cast<int>(p.width), quads = static_cast<int>(p.slab) / QUAD;
    const int count = static_cast<int>(p.height) * columns * quads, threads = static_cast<int>(blockDim.y * 32);
    const int channels = static_cast<int>(p.channels) - first_channel;
#pragma unroll 1
    for (int first = 0; first < count; first += threads) {
        const int i = first + static_cast<int>(threadIdx.y * 32 + threadIdx.x), inside = i < count ? i : 0;
        const int token = inside / quads, channel = QUAD * (inside - token * quads);
        const int row = token / columns, column = token - row * columns;
        const int place = row * static_cast<int>(p.sum_row) + column * static_cast<int>(p.sum_pitch) + channel;
        Real sum[QUAD];
#pragma unroll
        for (int c = 0; c < QUAD; ++c) sum[c] = p.skip_weight != nullptr ? planes.grad_x[place + c] : Real(0);
#pragma unroll 1
        for (int d = 0; d < static_cast<int>(p.directions); ++d) {
#pragma unroll
            for (int c = 0; c < QUAD; ++c) sum[c] += planes.states[d * planes.state_size + place + c];
        }
        Stored<QUAD> result = {};
#pragma unroll
        for (int c = 0; c < QUAD; ++c) result.set(c, sum[c]);
        Element* to = p.grad_x + (Index(image) * p.height * columns + token) * p.channels + first_channel + channel;
        if (VECTOR >= QUAD) {
            store(to, result, i < count && channel < channels);
        } else {
#pragma unroll
            for (int c = 0; c < QUAD; ++c) store(to + c, narrow(result[c]), i < count && channel + c < channels);
        }
    }
}

// Write an image's gradient of the proxies, summed over the slabs of the cluster in their order; its blocks share the
// tokens. Ends when all have read.
__device__ __forceinline__ void write_proxy_sums(const ProjectedProblem& p, const Planes& planes, int image) {
    constexpr int QUADS = PROXY / QUAD;
    if constexpr (CLUSTER > 1) cluster_barrier();
    const int columns = static_cast<int>(p.width), tokens = static_cast<int>(p.height) * columns;
    const int threads = static_cast<int>(blockDim.y * 32), block = static_cast<int>(blockIdx.x);
    Real* sums = p.proxy_sums + (Index(block / CLUSTER) * p.batch + image) * tokens * PROXY;
#pragma unroll 1
    for (int first = block % CLUSTER * threads; first < tokens * QUADS; first += CLUSTER * threads) {
        const int i = first + static_cast<int>(threadIdx.y * 32 + threadIdx.x);
        const bool active = i < tokens * QUADS;
        Pack<Real, 4> sum = {};
        if (active) {
            const int token = i / QUADS, row = token / columns;
            const Real* place = planes.grad_proxy + row * static_cast<int>(p.grad_row) +
                                (token - row * columns) * static_cast<int>(p.grad_pitch) + QUAD * (i - token * QUADS);
            const auto* quad = reinterpret_cast<const Pack<Real, 4>*>(place);
            if constexpr (CLUSTER == 1) {
                sum = *quad;
            } else {
#pragma unroll
                for (int other = 0; other < CLUSTER; ++other) {
                    const Pack<Real, 4> theirs = load_from_block(quad, other);
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum.item[k] += theirs.item[k];
                }
            }
        }
        store(sums + QUAD * i, sum, active);
    }
    if constexpr (CLUSTER > 1) cluster_barrier();
}

}  // namespace gspn

#if GSPN_CLUSTER > 1
#define GSPN_CLUSTER_DIMENSIONS __cluster_dims__(GSPN_CLUSTER, 1, 1)
#else
#define GSPN_CLUSTER_DIMENSIONS
#endif

// grid: slabs x parts; block: (32, directions x slab / 8). Each block takes every `parts`-th image.
extern "C" __global__ void GSPN_CLUSTER_DIMENSIONS __launch_bounds__(GSPN_BACKWARD_THREADS, 1)
    gspn_projected_backward_kernel(const gspn::ProjectedProblem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    Map maps[MAPS];
    load_maps(p, Share(p).d, Share(p).group, first_channel_of(p), reinterpret_cast<Element*>(memory), maps);
    start_skip(p, Planes(p, memory));
    WeightSums<MAPS> sums;
    sums.start(WeightSink(p));
    Back back = {};
    back.merge = projected_merge_weight(p, Share(p).d);
#pragma unroll 1
    for (int image = static_cast<int>(blockIdx.y); image < p.batch; image += static_cast<int>(p.parts)) {
        forget(image);
        Planes(p, memory).fill(p, image);
        await_copies();
        __syncthreads();  // filled
        start_gradients(p, Planes(p, memory));
        keep_states(p, maps, Planes(p, memory));
        __syncthreads();  // the states, and the gradients' start
        walk_back(p, maps, Planes(p, memory), WeightSink(p), sums, back);
        write_grad_x(p, Planes(p, memory), image);
        write_proxy_sums(p, Planes(p, memory), image);
        __syncthreads();  // read
    }
    sums.finish(WeightSink(p));
    write_skip(p, Planes(p, memory));
    Real merge_sum = back.merge_sum;
    for (int offset = 16; offset > 0; offset /= 2) merge_sum += __shfl_down_sync(0xffffffffu, merge_sum, offset);
    const Share share(p);
    const Index warp = (Index(blockIdx.y) * gridDim.x + blockIdx.x) * (p.slab / CHANNELS) + share.group;
    store(p.merge_sums + warp * p.directions + share.d, merge_sum, threadIdx.x == 0);
}
