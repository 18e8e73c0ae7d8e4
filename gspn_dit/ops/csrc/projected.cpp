// Entry points of the projected scan.
#include "projected.h"

using namespace gspn;

namespace {

const ProjectedKernels& kernels(const Projected& call) {
#ifdef GSPN_X86
#ifdef GSPN_AMX
  if (call.instruction_set == kAmx && call.dtype == kBFloat16) return kAmxProjected;
#endif
  if (call.instruction_set >= kAvx512) return kAvx512Projected;
  if (call.instruction_set == kAvx2) return kAvx2Projected;
#endif
  return kBaselineProjected;
}

}  // namespace

extern "C" {

int64_t gspn_projected_interface() { return (int64_t)sizeof(Projected) * 1000 + 1; }

// Return 0, or 1 if scratch memory could not be had.
int gspn_projected_forward(const Projected* call) { return kernels(*call).forward(*call); }
int gspn_projected_backward(const Projected* call) { return kernels(*call).backward(*call); }

}  // extern "C"
