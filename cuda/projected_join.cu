// The partial sums that the fused backward pass leaves behind, joined in a fixed order. Runs after it on the stream.
#include "projected.cuh"

namespace gspn {

constexpr int SHARES = 4;  // of the terms of a sum, one for each warp

enum Job { PROXY_JOB, LOGITS_JOB, INPUT_GATE_JOB, OUTPUT_GATE_JOB, SKIP_JOB, MERGE_JOB };

// The terms of one result.
struct Terms {
    const Real* first;
    Index outer, outer_step, inner, inner_step;

    // Of result `at` of the launch's job.
    __device__ Terms(const ProjectedProblem& p, Index at) : first(), outer(1), outer_step(0), inner(1), inner_step(0) {
        const Index inputs = p.proxy_channels, row = at / inputs, input = at - row * inputs;
        const Index all = p.channels * inputs;
        if (p.job == PROXY_JOB) {  // over clusters
            outer = p.spans;
            outer_step = p.batch * p.height * p.width * PROXY;
            first = p.proxy_sums + row * PROXY + input;
        } else if (p.job == MERGE_JOB) {  // over parts, slabs, and warps of a direction
            outer = p.parts * p.slabs * (p.slab / CHANNELS);
            outer_step = p.directions;
            first = p.merge_sums + at;
        } else if (p.job == SKIP_JOB) {
            outer = p.parts;
            outer_step = all;
            first = p.skip_sums + at;
        } else {
            const bool logits = p.job == LOGITS_JOB;
            const Index rows = logits ? p.groups : p.channels;  // of a map and direction
            const Index block = row / rows, map = logits ? block % 3 : p.job == INPUT_GATE_JOB ? 3 : 4;
            const Index d = logits ? block / 3 : block;
            inner = p.channels / rows;  // channels that share a row
            inner_step = inputs;
            outer = p.parts;
            outer_step = MAPS * p.directions * all;
            first = p.weight_sums + (map * p.directions + d) * all + (row - block * rows) * inner * inputs + input;
        }
    }
    __device__ const Real* term(Index i) const {
        const Index part = i / inner;
        return first + part * outer_step + (i - part * inner) * inner_step;
    }
};

__device__ __forceinline__ Index results(const ProjectedProblem& p) {
    const Index inputs = p.proxy_channels;
    if (p.job == PROXY_JOB) return p.batch * p.height * p.width * inputs;
    if (p.job == MERGE_JOB) return p.directions;
    if (p.job == SKIP_JOB) return p.channels * inputs;
    return p.directions * (p.job == LOGITS_JOB ? 3 * p.groups : p.channels) * inputs;
}

__device__ __forceinline__ Element* result_of(const ProjectedProblem& p) {
    if (p.job == PROXY_JOB) return p.grad_proxy;
    if (p.job == LOGITS_JOB) return p.grad_logits_weight;
    if (p.job == INPUT_GATE_JOB) return p.grad_input_gate_weight;
    if (p.job == OUTPUT_GATE_JOB) return p.grad_output_gate_weight;
    return p.job == SKIP_JOB ? p.grad_skip_weight : static_cast<Element*>(p.grad_merge_weight);
}

}  // namespace gspn

// grid: enough blocks of 32 results; block: (32, SHARES).
extern "C" __global__ void __launch_bounds__(128) gspn_projected_join_kernel(const gspn::ProjectedProblem p) {
    using namespace gspn;
    __shared__ Real shares[SHARES][32];
    const Index at = Index(blockIdx.x) * 32 + threadIdx.x, count = results(p);
    const Terms terms(p, at < count ? at : 0);
    const Index number = terms.outer * terms.inner;
    Real sum = Real(0);
    for (Index i = threadIdx.y; i < number; i += SHARES) sum += load<Real>(terms.term(i), at < count);
    shares[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = shares[0][threadIdx.x];
    for (int share = 1; share < SHARES; ++share) sum += shares[share][threadIdx.x];
    const bool active = threadIdx.y == 0 && at < count, as_float = p.job == MERGE_JOB && p.merge_is_float != 0;
    store(static_cast<float*>(p.grad_merge_weight) + at, static_cast<float>(sum), active && as_float);
    store(result_of(p) + at, narrow(sum), active && !as_float);
}
