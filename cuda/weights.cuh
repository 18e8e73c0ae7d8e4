// The row-stochastic weights, w_k = sigmoid(l_k) / sum of the sigmoids of the neighbours that lie on the line; what they
// make of a line of states; and backwards, what one line sends to the one before it and to the gradients of the logits.
#pragma once

#include "common.cuh"

namespace gspn {

// The three logits of a position; those of neighbours off the line are never loaded and stay minus infinity.
struct LineLogits {
    Logits at[3];

    __device__ LineLogits() : at() {
        at[0].fill(stored_minus_infinity());
        at[2].fill(stored_minus_infinity());
    }
    __device__ void refresh(const Element* from, Index stride, bool active, bool has_previous, bool has_next) {
        load_into(at[0], from, active && has_previous);
        load_into(at[1], from + stride, active);
        load_into(at[2], from + 2 * stride, active && has_next);
    }
    __device__ Real operator()(int k, int v) const { return at[k][SHARED_WEIGHTS ? 0 : v]; }
};

// With e_k = exp(-l_k) and q_k = 1 + e_k, sigmoid(l_k) = 1 / q_k and, free of all divisions but one,
// w_0 = q_1 q_2 / (q_1 q_2 + q_0 q_2 + q_0 q_1). The e_k stay below exp(GSPN_TINY), one of them below
// exp(GSPN_SMALL), and so the product of all q below the largest number.
struct Weights {
    Real power[3], others[3];  // e_k, and the product of the q of the two others
    Real normaliser;

    __device__ Weights(const LineLogits& logits, int v) {
        Real l[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) l[k] = logits(k, v);
        // Differences first: a logit of any size is then exact, and none is infinite but that of no neighbour.
        const Real most = smaller(larger(larger(l[0], l[1]), l[2]), Real(0));
        const Real rest = GSPN_UNIT * smaller(-most, GSPN_SMALL);
        Real q[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            power[k] = raised(at_most(multiply_add(GSPN_UNIT, most - l[k], rest), GSPN_TINY));
            q[k] = Real(1) + power[k];
        }
        others[0] = q[1] * q[2];
        others[1] = q[0] * q[2];
        others[2] = q[0] * q[1];
        normaliser = reciprocal(others[0] + others[1] + others[2]);
    }
    __device__ Real weight(int k) const { return others[k] * normaliser; }
    __device__ Real mean(Real before, Real same, Real after) const {
        return (others[0] * before + others[1] * same + others[2] * after) * normaliser;
    }

    // The derivative of sum of w_k h_k for logit_k is w_k sigmoid(-l_k) (h_k - mean): all of it but w_k.
    __device__ void slopes(const Real (&w)[3], Real before, Real same, Real after, Real (&slope)[3]) const {
        const Real center = w[0] * before + w[1] * same + w[2] * after;
        const Real inverse = reciprocal(others[0] * (Real(1) + power[0]));
        slope[0] = others[0] * power[0] * inverse * (before - center);
        slope[1] = others[1] * power[1] * inverse * (same - center);
        slope[2] = others[2] * power[2] * inverse * (after - center);
    }
};

// The states of the line before around one position. Beside the line they are zero. In a cluster only threads with a
// position may look: what others find there, another block may be writing.
struct Neighbours {
    Sums before, same, after;

    // `at` is this position's place in shared memory, `pitch` the distance from one to the next.
    __device__ Neighbours(const Real* at, int pitch)
        : before(*reinterpret_cast<const Sums*>(at - pitch)),
          same(*reinterpret_cast<const Sums*>(at)),
          after(*reinterpret_cast<const Sums*>(at + pitch)) {}
};

__device__ __forceinline__ Sums propagate(const LineLogits& logits, const Neighbours& from) {
    Sums h;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
        h.item[v] = Weights(logits, v).mean(from.before.item[v], from.same.item[v], from.after.item[v]);
    }
    return h;
}

// Sum values over this lane and the lanes above it that hold channels of the same position and group; the totals of a
// group arrive in its first lane. Each position's lanes lie side by side in one warp.
__device__ __forceinline__ void sum_to_first_lane(Real (&value)[3], int group) {
    const int lane = threadIdx.x;
    const int lanes = blockDim.x;
#pragma unroll 1
    for (int offset = 1; offset < lanes; offset *= 2) {
        const int other_group = __shfl_down_sync(0xffffffffu, group, offset);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const Real other = __shfl_down_sync(0xffffffffu, value[k], offset);
            if (lane + offset < lanes && other_group == group) value[k] += other;
        }
    }
}

// The gradients of one thread's three logits on a line: per channel as they are stored, or the sum over its channels.
struct LineGradient {
    Sums channels[3];
    Real sum[3];

    __device__ LineGradient() : channels(), sum() {}
    __device__ void add(int v, const Real (&value)[3]) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            if (SHARED_WEIGHTS) {
                sum[k] += value[k];
            } else {
                channels[k].item[v] = value[k];
            }
        }
    }
};

// What one line of a backward walk sends to the line before it: to the positions before, at and after this one.
struct Messages {
    Sums before, same, after;
    LineGradient gradient;

    __device__ Messages() : before(), same(), after(), gradient() {}
    __device__ Messages(const LineLogits& logits, const Neighbours& from, const Sums& dh) : gradient() {
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
            const Weights weights(logits, v);
            const Real w[3] = {weights.weight(0), weights.weight(1), weights.weight(2)};
            Real slope[3];
            weights.slopes(w, from.before.item[v], from.same.item[v], from.after.item[v], slope);
            before.item[v] = w[0] * dh.item[v];
            same.item[v] = w[1] * dh.item[v];
            after.item[v] = w[2] * dh.item[v];
            gradient.add(v, {slope[0] * before.item[v], slope[1] * same.item[v], slope[2] * after.item[v]});
        }
    }
};

// Where one thread stores the gradients of its three logits: per channel, or summed over the channels of its group.
struct LogitGradients {
    int logit;     // the first one's place among those of a token and direction
    char* first;   // it, at the first token and direction
    unsigned bytes, pitch;  // of a token and direction's, and from one of the three to the next
    bool to_sums, is_first;

    __device__ LogitGradients(const Problem& p, int channel)
        : logit(static_cast<int>(logit_of(p, channel))),
          first(reinterpret_cast<char*>(p.grad_weight_logits + logit)),
          bytes(static_cast<unsigned>(3 * p.groups * sizeof(Element))),
          pitch(static_cast<unsigned>(p.groups * sizeof(Element))),
          to_sums(SHARED_WEIGHTS && p.group_sums != nullptr),
          is_first(false) {
        if (!SHARED_WEIGHTS) return;
        const unsigned width = static_cast<unsigned>(p.channels) / static_cast<unsigned>(p.groups);
        const unsigned slab = static_cast<unsigned>(channel) / static_cast<unsigned>(p.slab);
        is_first = threadIdx.x == 0 || static_cast<unsigned>(channel) % width == 0;
        if (!to_sums) return;
        const Index slot = logit - slab * static_cast<unsigned>(p.slab) / width;
        const Index tokens = p.batch * p.height * p.width * p.directions;
        first = reinterpret_cast<char*>(p.group_sums + slab * tokens * 3 * p.group_slots + slot);
        bytes = static_cast<unsigned>(3 * p.group_slots * sizeof(Real));
        pitch = static_cast<unsigned>(p.group_slots * sizeof(Real));
    }
    // Exactly 0 for neighbours off the line.
    __device__ void put(const LineGradient& gradient, const Cell& cell, bool active, bool has_previous,
                        bool has_next) const {
        char* const place = cell.in(first, bytes);
        const bool exists[3] = {has_previous, true, has_next};
        if (!SHARED_WEIGHTS) {
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                Channels channels = narrow_all(gradient.channels[k]);
                if (!exists[k]) channels = Channels{};
                store(place + k * pitch, channels, active);
            }
            return;
        }
        Real total[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) total[k] = active && exists[k] ? gradient.sum[k] : Real(0);
        sum_to_first_lane(total, logit);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            if (to_sums) {
                store(place + k * pitch, total[k], active && is_first);
            } else {
                store(place + k * pitch, narrow(total[k]), active && is_first);
            }
        }
    }
};

}  // namespace gspn
