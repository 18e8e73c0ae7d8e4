// What the gradients of N maps' values become, tile by tile of 16 tokens: gradients of the maps' weights, summed over all
// tiles of a warp, and of the tile's proxies. A lane holds the gradients of rows g and g + 8 of a tile, channels 2 t and
// 2 t + 1, in the order of the sums of `project`; `proxy_of(row)` is where the proxies of a row lie in shared memory.
//
// Tensor cores take numbers of 16 bits: a gradient is the sum of two such, its upper and its lower part, so that the
// products are as good as those of float32.
#pragma once

#include "projected.cuh"

namespace gspn {

constexpr bool RESTS = PROXY % 16 != 0;

#if GSPN_STORAGE >= 2
template <int N>
struct Gradients {
    unsigned part[2][N][2];  // upper and lower; of a map; of a row, two channels in a word

    __device__ explicit Gradients(const Real (&value)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Real a = value[n][2 * i], b = value[n][2 * i + 1];
                const unsigned upper = narrow_pair(a, b);
                part[0][n][i] = upper;
                part[1][n][i] = narrow_pair(a - widen(static_cast<Element>(upper & 0xffffu)),
                                            b - widen(static_cast<Element>(upper >> 16)));
            }
        }
    }
};

// Sums over tokens, which are the inner dimension of these products: the left operand is 16 proxies transposed, the right
// one a map's gradients. Of the eight inputs that may be left the gradients of two maps are the left operand.
template <int N>
struct WeightSums {
    Real tile[STEPS > 0 ? STEPS : 1][N][4], rest[(N + 1) / 2][4];

    template <typename Sink>
    __device__ void start(const Sink&) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int s = 0; s < STEPS; ++s) tile[s][n][j] = Real(0);
                rest[n / 2][j] = Real(0);
            }
        }
    }
    template <typename ProxyOf, typename Sink>
    __device__ void add(const Gradients<N>& gradients, ProxyOf proxy_of, const Sink&) {
        const unsigned lane = threadIdx.x;
        const Element* row = proxy_of(lane % 8 + 8 * (lane / 16));
        const unsigned half = 8 * (lane / 8 % 2);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            unsigned turned[N + 1][2];  // lane 4 g + t: channel g, rows 2 t, 2 t + 1 of each eight
            turned[N][0] = turned[N][1] = 0;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) turned[n][i] = transposed(gradients.part[part][n][i]);
            }
            unsigned words[4];
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                load_transposed(words, row + 16 * s + half);
#pragma unroll
                for (int n = 0; n < N; ++n) multiply_add(tile[s][n], words, turned[n][0], turned[n][1]);
            }
            if (RESTS) {
                load_transposed(words, row + 16 * STEPS);
#pragma unroll
                for (int m = 0; m < N; m += 2) {
                    const unsigned two[4] = {turned[m][0], turned[m + 1][0], turned[m][1], turned[m + 1][1]};
                    multiply_add(rest[m / 2], two, words[0], words[2]);
                }
            }
        }
    }
    // Give every sum to `sink.put(map, channel, input, sum)`.
    template <typename Sink>
    __device__ void finish(const Sink& sink) const {
        const int g = lane_row(), t = lane_column();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int s = 0; s < STEPS; ++s) sink.put(n, 2 * t + j % 2, 16 * s + 8 * (j / 2) + g, tile[s][n][j]);
                if (RESTS && n % 2 == j / 2) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) sink.put(n, g, 16 * STEPS + 2 * t + i, rest[n / 2][2 * (n % 2) + i]);
                }
            }
        }
    }
};

// Sums over the maps and eight channels: the left operand is the gradients, the right one the maps' weights transposed.
template <int N>
struct ProxyGradient {
    Real sum[PROXY / 8][4];  // in the order of `Map`: 16 inputs in two sums, four neighbouring ones in a lane

    __device__ ProxyGradient(const Map (&maps)[N], const Gradients<N>& gradients) {
#pragma unroll
        for (int w = 0; w < PROXY / 8; ++w) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[w][j] = Real(0);
            unsigned turned[N];  // lane 4 g + t: the input at place g, channels 2 t, 2 t + 1
#pragma unroll
            for (int n = 0; n < N; ++n) turned[n] = transposed(maps[n].word[w]);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const auto& of = gradients.part[part];
#pragma unroll
                for (int n = 0; n + 1 < N; n += 2) {
                    const unsigned two[4] = {of[n][0], of[n][1], of[n + 1][0], of[n + 1][1]};
                    multiply_add(sum[w], two, turned[n], turned[n + 1]);
                }
                if (N % 2 != 0) multiply_add(sum[w], of[N - 1], turned[N - 1]);
            }
        }
    }
    // Put the inputs of row i of the tile to a token's place, or add them to what is there.
    __device__ void put(int i, Real* token, bool adds, bool active) const {
        const int t = lane_column();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            put_some<4>(token + 16 * s + 4 * t, {sum[2 * s][2 * i], sum[2 * s][2 * i + 1], sum[2 * s + 1][2 * i],
                                                sum[2 * s + 1][2 * i + 1]}, adds, active);
        }
        if (RESTS) {
            const auto& last = sum[PROXY / 8 - 1];
            put_some<2>(token + 16 * STEPS + 2 * t, {last[2 * i], last[2 * i + 1]}, adds, active);
        }
    }

private:
    template <int COUNT>
    __device__ static void put_some(Real* at, Pack<Real, COUNT> value, bool adds, bool active) {
        if (!active) return;
        Pack<Real, COUNT>& place = *reinterpret_cast<Pack<Real, COUNT>*>(at);
        if (adds) {
            const Pack<Real, COUNT> there = place;
#pragma unroll
            for (int k = 0; k < COUNT; ++k) value.item[k] += there.item[k];
        }
        place = value;
    }
};
#else
template <int N>
struct Gradients {
    Real value[N][4];

    __device__ explicit Gradients(const Real (&given)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) value[n][j] = given[n][j];
        }
    }
};

// The same without tensor cores, by the sums of lanes; the sums over tiles lie where the sink keeps them.
template <int N>
struct WeightSums {
    template <typename Sink>
    __device__ void start(const Sink& sink) const {
        each([&](int n, int c, int input) { sink.put(n, 2 * lane_column() + c, input, Real(0), lane_row() == 0); });
    }
    template <typename ProxyOf, typename Sink>
    __device__ void add(const Gradients<N>& gradients, ProxyOf proxy_of, const Sink& sink) const {
        const Element *low = proxy_of(lane_row()), *high = proxy_of(lane_row() + 8);
        each([&](int n, int c, int input) {
            Real sum = gradients.value[n][c] * low[input] + gradients.value[n][2 + c] * high[input];
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
            sink.add(n, 2 * lane_column() + c, input, sum, lane_row() == 0);
        });
    }
    template <typename Sink>
    __device__ void finish(const Sink&) const {}

private:
    template <typename Use>
    __device__ static void each(Use use) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
#pragma unroll 1
                for (int input = 0; input < PROXY; ++input) use(n, c, input);
            }
        }
    }
};

template <int N>
struct ProxyGradient {
    const Map (&maps)[N];
    const Gradients<N>& gradients;

    __device__ ProxyGradient(const Map (&all)[N], const Gradients<N>& of) : maps(all), gradients(of) {}
    __device__ void put(int i, Real* token, bool adds, bool active) const {
#pragma unroll 1
        for (int input = 0; input < PROXY; ++input) {
            Real sum = Real(0);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const Element* row = maps[n].row[c];
                    const bool exists = row != nullptr && input < maps[n].inputs;
                    sum += gradients.value[n][2 * i + c] * load<Element>(row + input, exists);
                }
            }
            sum += __shfl_down_sync(0xffffffffu, sum, 1);
            sum += __shfl_down_sync(0xffffffffu, sum, 2);
            if (active && lane_column() == 0) token[input] = adds ? token[input] + sum : sum;
        }
    }
};
#endif

}  // namespace gspn
