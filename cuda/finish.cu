// The sums over blocks that the backward kernels leave behind, in a fixed order. They run after them on the stream.
#include "common.cuh"

// grid: directions; block: (256, 1). Adds the partial sums of one direction's merge weight.
extern "C" __global__ void __launch_bounds__(256) gspn_scan_merge_kernel(const gspn::Problem p) {
    using namespace gspn;
    __shared__ Real scratch[32];
    const Index d = blockIdx.x;
    Real sum = Real(0);
    for (Index first = 0; first < p.merge_blocks; first += blockDim.x) {
        const Index block = first + threadIdx.x;
        const bool active = block < p.merge_blocks;
        sum += load<Real>(p.merge_sums + d * p.merge_blocks + block, active);
    }
    sum = block_sum(sum, scratch);
    const bool leader = threadIdx.x == 0;
    const bool is_float = p.merge_is_float != 0;
    store(static_cast<float*>(p.grad_merge_weight) + d, static_cast<float>(sum), leader && is_float);
    store(static_cast<Element*>(p.grad_merge_weight) + d, narrow(sum), leader && !is_float);
}

// grid: enough blocks of (256, 1) for every logit [B, H, W, D, 3, G]. Adds the slabs that a group's channels lie in.
extern "C" __global__ void __launch_bounds__(256) gspn_scan_groups_kernel(const gspn::Problem p) {
    using namespace gspn;
    const Index tokens = p.batch * p.height * p.width * p.directions * 3;
    const Index at = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool active = at < tokens * p.groups;
    const Index group = at % p.groups, token = at / p.groups, width = p.channels / p.groups;
    const Index first = group * width / p.slab, last = ((group + 1) * width - 1) / p.slab;
    Real sum = Real(0);
    for (Index turn = 0; turn <= (width - 1) / p.slab + 1; ++turn) {  // as often for every thread
        const Index slab = first + turn;
        const Index slot = group - slab * p.slab / width;
        sum += load<Real>(p.group_sums + (slab * tokens + token) * p.group_slots + slot, active && slab <= last);
    }
    store(p.grad_weight_logits + at, narrow(sum), active);
}
