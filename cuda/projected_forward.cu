// The fused forward pass: a warp scans one direction of eight channels, its weights in registers for all images of its
// block, and holds a whole line, so that nothing is awaited from line to line.
#include "projected.cuh"

namespace gspn {

// One warp's direction and channels.
struct Warp {
    int d, group;  // direction; eight channels of the slab
    bool meets;    // whether another direction goes the opposite way

    __device__ explicit Warp(const ProjectedProblem& p) {
        const int groups = static_cast<int>(p.slab) / CHANNELS;
        d = static_cast<int>(threadIdx.y) / groups;
        group = static_cast<int>(threadIdx.y) % groups;
        meets = false;
        for (int other = 0; other < p.directions; ++other) meets |= p.code[other] == (p.code[d] ^ 1);
    }
};

// Planes of shared memory: sums over the directions along columns, over those along rows, then per stage an image's
// proxy and tokens, then the skip's weights.
struct Planes {
    Real* sums[2];
    int kinds, sum_size;

    __device__ Planes(const ProjectedProblem& p, unsigned char* memory) {
        bool rows = false, columns = false;
        for (int d = 0; d < p.directions; ++d) (visits_columns(p.code[d]) ? columns : rows) = true;
        kinds = int(rows) + int(columns);
        sum_size = static_cast<int>(p.height * p.sum_row);
        sums[0] = reinterpret_cast<Real*>(memory);
        sums[1] = sums[0] + (columns && rows ? sum_size : 0);
    }
    __device__ Real* of(Index code) const { return visits_columns(code) ? sums[0] : sums[1]; }
};

struct Stage {
    Element *proxy, *x;

    __device__ Stage(const ProjectedProblem& p, Element* first, int number) {
        const int proxy_size = static_cast<int>(p.height * p.proxy_row), x_size = static_cast<int>(p.height * p.x_row);
        proxy = first + number * (proxy_size + x_size);
        x = proxy + proxy_size;
    }
    __device__ void fill(const ProjectedProblem& p, int image, int first_channel) const {
        const int channels = static_cast<int>(p.channels), inputs = static_cast<int>(p.proxy_channels);
        copy_image(p, p.proxy, p.proxy_stride, image, 0, inputs, PROXY, proxy, static_cast<int>(p.proxy_pitch),
                   static_cast<int>(p.proxy_row));
        copy_image(p, p.x, p.x_stride, image, first_channel, channels, static_cast<int>(p.slab), x,
                   static_cast<int>(p.x_pitch), static_cast<int>(p.x_row));
    }
};

// Scan the lines of one direction, a lane's channels 2 t and 2 t + 1 at SPAN neighbouring positions. Two directions
// along the same lines, from opposite ends, add to one plane: up to the middle each stores, behind it each adds to what
// the other stored, so that the sum does not depend on which is faster.
__device__ __forceinline__ void scan_direction(const ProjectedProblem& p, const Warp& warp, const Map (&maps)[MAPS],
                                               const Stage& stage, const Planes& planes) {
    Real* sums = planes.of(p.code[warp.d]);
    const Real merge = projected_merge_weight(p, warp.d);
    const Lines path(p, p.code[warp.d]);
    const int proxy_pitch = static_cast<int>(p.proxy_pitch), proxy_row = static_cast<int>(p.proxy_row);
    const int x_pitch = static_cast<int>(p.x_pitch), x_row = static_cast<int>(p.x_row);
    const int sum_pitch = static_cast<int>(p.sum_pitch), sum_row = static_cast<int>(p.sum_row);
    const int channel = warp.group * CHANNELS + 2 * lane_column(), first = lane_row() * SPAN;
    const bool meets = warp.meets;
    const int middle = path.backwards ? path.lines / 2 : (path.lines + 1) / 2;
    Real h[SPAN][2] = {};
    Segments segments(path);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
        for (int visit = half == 0 ? 0 : middle; visit < (half == 0 ? middle : path.lines); ++visit) {
            const int line = path.line_of(visit);
            const bool restart = segments.starts(path);
            Real before[2], after[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                before[c] = __shfl_up_sync(0xffffffffu, h[SPAN - 1][c], 4);
                after[c] = __shfl_down_sync(0xffffffffu, h[0][c], 4);
            }
            const Element* proxies = stage.proxy + line * path.line_step(proxy_pitch, proxy_row);
            const Element* tokens = stage.x + line * path.line_step(x_pitch, x_row) + channel;
            Real* results = sums + line * path.line_step(sum_pitch, sum_row) + channel;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                int n[2], inside[2];  // positions, and the nearest on the line
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    n[i] = first + 2 * tile + i;
                    inside[i] = n[i] < path.positions ? n[i] : path.positions - 1;
                }
                const int step = path.position_step(proxy_pitch, proxy_row);
                Real value[MAPS][4];
                project(maps, proxies + inside[0] * step, proxies + inside[1] * step, value);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = 2 * tile + i;
                    const Stored<2> x =
                        *reinterpret_cast<const Stored<2>*>(tokens + inside[i] * path.position_step(x_pitch, x_row));
                    Pack<Real, 2> sum;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int j = 2 * i + c;
                        const Real same = h[at][c], next = at + 1 < SPAN ? h[at + 1 < SPAN ? at + 1 : 0][c] : after[c];
                        Real state = value[3][j] * x[c];
                        if (!restart) {
                            const Ratios ratios(value[0][j], value[1][j], value[2][j], n[i] > 0,
                                                n[i] + 1 < path.positions);
                            state += ratios.mean(before[c], same, next);
                        }
                        before[c] = same;
                        h[at][c] = state;
                        sum.item[c] = merge * value[4][j] * state;
                    }
                    if (n[i] < path.positions) {
                        Pack<Real, 2>& place =
                            *reinterpret_cast<Pack<Real, 2>*>(results + n[i] * path.position_step(sum_pitch, sum_row));
                        if (half == 1 && meets) {
                            sum.item[0] += place.item[0];
                            sum.item[1] += place.item[1];
                        }
                        place = sum;
                    }
                }
            }
        }
        __syncthreads();  // the middle, the end
    }
}

// The skip's maps for 16 channels of the slab; map i has the channels 4 t + 2 i and 4 t + 2 i + 1.
__device__ __forceinline__ void load_skip(const ProjectedProblem& p, [[maybe_unused]] const Element* skip_rows,
                                          [[maybe_unused]] int first_channel, int strip, Map (&maps)[2]) {
    const int slab = static_cast<int>(p.slab);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const auto channel_of = [&](int n) { return strip + 4 * (n / 2) + 2 * i + n % 2; };
#if GSPN_STORAGE >= 2
        const int channel = channel_of(lane_row());
        maps[i].load_shared(skip_rows + (channel < slab ? channel : 0) * PROXY);
#else
        maps[i].load_rows(static_cast<int>(p.proxy_channels), [&](int n) -> const Element* {
            const int channel = channel_of(n);
            const bool exists = channel < slab && first_channel + channel < p.channels;
            return exists ? p.skip_weight + (first_channel + channel) * p.proxy_channels : nullptr;
        });
#endif
    }
}

// Write an image's y: the sums of both planes and the skip, 16 tokens of 16 channels a turn, four channels a lane.
__device__ __forceinline__ void write_image(const ProjectedProblem& p, const Planes& planes, const Stage& stage,
                                            const Element* skip_rows, int image, int first_channel) {
    const int tokens = static_cast<int>(p.height * p.width), columns = static_cast<int>(p.width);
    const int slab = static_cast<int>(p.slab), strips = (slab + 15) / 16, warps = static_cast<int>(blockDim.y);
    const int channels = static_cast<int>(p.channels);
    const int turns = ((tokens + 15) / 16 * strips + warps - 1) / warps;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        const int unit = turn * warps + static_cast<int>(threadIdx.y), tile = unit / strips;
        const int strip = 16 * (unit - tile * strips), channel = strip + 4 * lane_column();
        int row[2], column[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = 16 * tile + lane_row() + 8 * i, inside = token < tokens ? token : tokens - 1;
            row[i] = inside / columns;
            column[i] = inside - row[i] * columns;
        }
        Real skip[2][4] = {};  // products 0 and 1: of the channels 4 t, 4 t + 1 and 4 t + 2, 4 t + 3
        if (p.skip_weight != nullptr) {
            const int pitch = static_cast<int>(p.proxy_pitch), row_pitch = static_cast<int>(p.proxy_row);
            Map maps[2];
            load_skip(p, skip_rows, first_channel, strip, maps);
            project(maps, stage.proxy + row[0] * row_pitch + column[0] * pitch,
                    stage.proxy + row[1] * row_pitch + column[1] * pitch, skip);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool active = 16 * tile + lane_row() + 8 * i < tokens && channel < slab;
            Stored<4> y = {};
            if (active) {
                const int at = row[i] * static_cast<int>(p.sum_row) + column[i] * static_cast<int>(p.sum_pitch) + channel;
                const Stored<4> x = *reinterpret_cast<const Stored<4>*>(
                    stage.x + row[i] * static_cast<int>(p.x_row) + column[i] * static_cast<int>(p.x_pitch) + channel);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    Real sum = planes.sums[0][at + c];
                    if (planes.kinds == 2) sum += planes.sums[1][at + c];
                    y.set(c, sum + skip[c / 2][2 * i + c % 2] * x[c]);
                }
            }
            Element* result = p.y + ((Index(image) * p.height + row[i]) * p.width + column[i]) * channels +
                              first_channel + channel;
            if (VECTOR >= 4) {
                store(result, y, active && first_channel + channel < channels);
            } else {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    store(result + c, narrow(y[c]), active && first_channel + channel + c < channels);
                }
            }
        }
    }
}

}  // namespace gspn

// grid: slabs x parts; block: (32, directions x slab / 8). Each block takes every `parts`-th image.
extern "C" __global__ void __launch_bounds__(GSPN_FORWARD_THREADS, 1)
    gspn_projected_forward_kernel(const gspn::ProjectedProblem p) {
    using namespace gspn;
    GSPN_DYNAMIC_SHARED(memory);
    const int slab = static_cast<int>(p.slab);
    int first_channel = static_cast<int>(blockIdx.x) * slab;
    const int batch = static_cast<int>(p.batch), parts = static_cast<int>(p.parts);
    Map maps[MAPS];
    load_maps(p, Warp(p).d, Warp(p).group, first_channel, reinterpret_cast<Element*>(memory), maps);
    const Planes planes(p, memory);
    Element* stages = reinterpret_cast<Element*>(planes.sums[0] + planes.kinds * planes.sum_size);
    Element* skip_rows = Stage(p, stages, static_cast<int>(p.stages)).proxy;
#if GSPN_STORAGE >= 2
    if (p.skip_weight != nullptr) {
        copy_rows(slab, PROXY, [&](int row) {
            return weight_row(p, p.skip_weight, first_channel + row, first_channel + row, skip_rows + row * PROXY);
        });
    }
#endif
    int image = static_cast<int>(blockIdx.y);
    Stage(p, stages, 0).fill(p, image, first_channel);
#pragma unroll 1
    for (int turn = 0; image < batch; ++turn, image += parts) {
        forget(first_channel);
        forget(image);
        const bool both = p.stages == 2;
        const Stage now(p, stages, both ? turn & 1 : 0);
        await_copies();
        __syncthreads();  // filled, and the sums of the image before are written
        if (both && image + parts < batch) Stage(p, stages, ~turn & 1).fill(p, image + parts, first_channel);
        scan_direction(p, Warp(p), maps, now, Planes(p, memory));
        write_image(p, Planes(p, memory), now, skip_rows, image, first_channel);
        if (!both && image + parts < batch) {
            __syncthreads();  // read
            now.fill(p, image + parts, first_channel);
        }
    }
}
