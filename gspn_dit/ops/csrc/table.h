// The table of an instruction set's kernels; included after kernels.h.
namespace gspn {
namespace GSPN_ISA {

#define GSPN_BY_DTYPE(function, ...)                                      \
  switch (scan.dtype) {                                                   \
    case kFloat64: return function<double>(__VA_ARGS__);                  \
    case kBFloat16: return function<BFloat16>(__VA_ARGS__);               \
    case kFloat16: return function<Float16>(__VA_ARGS__);                 \
    default: return function<float>(__VA_ARGS__);                         \
  }

static int64_t any_forward_scratch(const Scan& scan, const Plan& plan) { GSPN_BY_DTYPE(forward_scratch, scan, plan) }
static int64_t any_backward_scratch(const Scan& scan, const Plan& plan) { GSPN_BY_DTYPE(backward_scratch, scan, plan) }
static void any_forward(const Scan& scan, const Plan& plan, const Block& block, char* scratch) {
  GSPN_BY_DTYPE(forward, scan, plan, block, scratch)
}
static void any_backward(const Scan& scan, const Plan& plan, const Block& block, char* scratch) {
  GSPN_BY_DTYPE(backward, scan, plan, block, scratch)
}
static void any_join_parts(const Scan& scan, const Plan& plan, int64_t begin, int64_t end) {
  GSPN_BY_DTYPE(join_parts, scan, plan, begin, end)
}

static void any_join_sums(const Scan& scan, const Plan& plan, void* output, int64_t begin, int64_t end) {
  GSPN_BY_DTYPE(join_sums, scan, plan, output, begin, end)
}

}  // namespace GSPN_ISA

extern const Kernels GSPN_TABLE = {GSPN_ISA::any_forward_scratch,
                                   GSPN_ISA::any_backward_scratch,
                                   GSPN_ISA::any_forward,
                                   GSPN_ISA::any_backward,
                                   GSPN_ISA::any_join_parts,
                                   GSPN_ISA::any_join_sums};

}  // namespace gspn
