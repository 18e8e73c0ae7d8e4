// The C interface between the projected scan's binding in Python and its kernels: plain structs and pointers.
#pragma once
#include "scan.h"
#include "tasks.h"

namespace gspn {

// One call of the projected scan: the scan of scan.h whose logits l = W_l p and gates λ = W_λ p, u = W_u p are linear maps of a
// proxy p of each token, plus (W_s p) x if there is a skip. Mirrored field by field in Python. Strides are in elements, of the
// dimensions in front of the innermost one, whose stride is 1. Weights and outputs are contiguous.
struct Projected {
  int64_t batch, height, width, channels, proxy_channels, groups, directions;
  int64_t window;  // lines per segment, at least 1
  int64_t dtype;   // of all tensors but the merge weight
  int64_t instruction_set;
  int64_t threads;
  int64_t block;   // vectors of channels that a forward task reads at a time, or 0 to choose
  int64_t direction[kMaxDirections];
  double merge[kMaxDirections];
  int64_t x_stride[3], proxy_stride[3], grad_y_stride[3];  // B, H, W
  const void* x;
  const void* proxy;
  const void* logits_weight;       // [D, 3, G, P]
  const void* input_gate_weight;   // [D, C, P]
  const void* output_gate_weight;  // [D, C, P]
  const void* skip_weight;         // [C, P] or null
  const void* grad_y;
  void* y;       // forward's only output
  void* grad_x;  // the other outputs belong to the backward
  void* grad_proxy;
  void* grad_logits_weight;
  void* grad_input_gate_weight;
  void* grad_output_gate_weight;
  void* grad_skip_weight;  // null where there is no skip
  double* grad_merge;      // [D]
  void* parallel;          // GOMP_parallel of the OpenMP runtime that torch uses, or null
};

// The kernels of one instruction set. They return 0, or 1 if scratch memory could not be had.
struct ProjectedKernels {
  int (*forward)(const Projected&);
  int (*backward)(const Projected&);
};

extern const ProjectedKernels kBaselineProjected;
#ifdef GSPN_X86
extern const ProjectedKernels kAvx2Projected;
extern const ProjectedKernels kAvx512Projected;
#ifdef GSPN_AMX
extern const ProjectedKernels kAmxProjected;
#endif
#endif

}  // namespace gspn
