// The entry points of an instruction set.
#include "projected_gradients.h"

namespace gspn {
namespace GSPN_ISA {

template <class T, void (*function)(const Work<T>&, int64_t, char*)>
static void any_task(const void* context, int64_t task, char* scratch) {
  function(*(const Work<T>*)context, task, scratch);
}

template <class T> static int run_forward(const Projected& call) {
  typedef typename Accumulator<T>::type A;
  Work<T> work(call, false);
  Scratch memory(work.place(nullptr));
  if (!memory.data) return 1;
  work.place(memory.data);
  const int64_t bytes = ForwardScratch<A>().place(nullptr, call, work.grid, work.block, work.group);
  return work.run(packing_tasks(work), work.packing_scratch(), any_task<T, pack<T>>) ||
         work.run(forward_tasks(work), bytes, any_task<T, forward_task<T>>);
}

template <class T> static int run_backward(const Projected& call) {
  typedef typename Accumulator<T>::type A;
  Work<T> work(call, true);
  Scratch memory(work.place(nullptr));
  if (!memory.data) return 1;
  work.place(memory.data);
  const int64_t row = work.grid.padded * sizeof(A);
  const int64_t bytes = BackwardScratch<A>().place(nullptr, call, work.grid, work.group);
  const int64_t panels = call.directions * work.grid.vectors, skips = call.skip_weight ? 1 : 0;
  if (work.run(packing_tasks(work), work.packing_scratch(), any_task<T, pack<T>>) ||
      work.run(work.shares * work.sample_shares, bytes, any_task<T, backward_task<T>>) ||
      work.run(call.batch + panels + skips * work.grid.vectors, 0, any_task<T, join_task<T>>) ||
      work.run(call.directions * kProjected + skips, 2 * row, any_task<T, write_task<T>>))
    return 1;
  // With u' = m u what is projected, du'/dm = u = W_u p: the merge weight's gradient is the product of W_u and that of m W_u.
  for (int64_t d = 0; d < call.directions; ++d) call.grad_merge[d] = work.products[d * kProjected + kOutputGate];
  return 0;
}

#if defined(__AMX_BF16__)  // matrix instructions are for bfloat16 alone
#define GSPN_BY_DTYPE(function) return function<BFloat16>(call);
#else
#define GSPN_BY_DTYPE(function)                         \
  switch (call.dtype) {                                 \
    case kFloat64: return function<double>(call);       \
    case kBFloat16: return function<BFloat16>(call);    \
    case kFloat16: return function<Float16>(call);      \
    default: return function<float>(call);              \
  }
#endif

static int any_forward(const Projected& call) { GSPN_BY_DTYPE(run_forward) }
static int any_backward(const Projected& call) { GSPN_BY_DTYPE(run_backward) }

}  // namespace GSPN_ISA

extern const ProjectedKernels GSPN_TABLE = {GSPN_ISA::any_forward, GSPN_ISA::any_backward};

}  // namespace gspn
